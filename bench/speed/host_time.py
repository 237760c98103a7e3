"""The cost of a step for the host, beside torch's fused AdamW: ``python -m bench.speed.host_time``.

Both optimizers step in turns, on one thread; a ratio is that of the medians of rounds' medians. On
a GPU the times are CPU seconds of the thread. The device is not waited for in a step, but before
each, so that its queue is empty.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.optim import AdamW, Optimizer

import cm_fused
from bench import machine
from bench.speed import report

PACKAGE = str(Path(cm_fused.__file__).parent)
# The first of which is left out: it fills the buffers, and prepares what is prepared once.
ROUNDS = 16
_SMOKE_ROUNDS = 3
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamCM": cm_fused.AdamCM,
    # Without clipping, which is no option of it.
    "AdamW": lambda groups, **options: AdamW(groups, fused=True),
}


@dataclass(frozen=True)
class Case:
    """Parameters that are stepped. `target` is the ratio aimed at, None if none was measured.

    If `alternating`, every other tensor has a gradient, in turns; if `new_addresses`, each gradient
    is another tensor than in the step before.
    """

    name: str
    groups: int
    tensors: int
    target: float | None
    steps: int = 20
    numel: int = 64
    alternating: bool = False
    sharded: bool = False
    new_addresses: bool = False
    max_grad_norm: float | None = None


CASES = (
    Case("1 tensor of 16", 1, 1, 0.9, 200, numel=16),
    Case("2 groups of 10 tensors", 2, 10, 0.4, 100),
    Case("100 tensors", 1, 100, 0.3),
    Case("100 groups of 1 tensor", 100, 1, 0.2),
    Case("200 tensors, every other one in turns", 1, 200, 0.6, alternating=True),
    Case("100 groups of 2, every other tensor in turns", 100, 2, 0.6, alternating=True),
    Case("24 tensors, fully_shard on 2 processes", 1, 24, 1.0, sharded=True),
)
CUDA_CASES = tuple(
    Case(f"{tensors} tensor{'s' * (tensors > 1)}{words}", 1, tensors, None, steps, **options)
    for tensors, steps in ((1, 200), (161, 20), (1000, 20))
    for words, options in (
        ("", {}),
        (", new addresses", {"new_addresses": True}),
        (", max_grad_norm", {"max_grad_norm": 1.0}),
    )
)


class Stepped:
    """An optimizer with the gradients of its steps."""

    def __init__(self, case: Case, name: str, device: str = "cpu") -> None:
        self.alternating, size = case.alternating, case.tensors
        self.device = device
        layers = [nn.Linear(case.numel // 2, 2, bias=False) for _ in range(case.groups * size)]
        nn.Sequential(*layers).to(device)
        if case.sharded:
            fully_shard(nn.Sequential(*layers))
        self.params = [layer.weight for layer in layers]
        sets = 2 if case.new_addresses else 1
        self.grads = [[param.detach().clone() for param in self.params] for _ in range(sets)]
        starts = range(0, len(layers), size)
        groups = [{"params": self.params[i : i + size]} for i in starts]
        options = {"max_grad_norm": case.max_grad_norm} if case.max_grad_norm else {}
        self.optimizer = OPTIMIZERS[name](groups, **options)

    def timed_step(self, turn: int) -> float:
        """Set the gradients of a turn, then step; return the step's seconds."""
        grads = self.grads[turn % len(self.grads)]
        for i, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            param.grad = grad if not self.alternating or i % 2 == turn % 2 else None
        machine.synchronize(self.device)
        clock = time.perf_counter if self.device == "cpu" else time.thread_time
        start = clock()
        self.optimizer.step()
        return clock() - start


def measure(case: Case, device: str = "cpu", num_rounds: int = ROUNDS) -> list[float]:
    """Return the microseconds of a step of each of `OPTIMIZERS`."""
    torch.set_num_threads(1)
    both = [Stepped(case, name, device) for name in OPTIMIZERS]
    rounds = []
    for _ in range(num_rounds):
        turns = [[stepped.timed_step(turn) for stepped in both] for turn in range(case.steps)]
        rounds.append([median(times) for times in zip(*turns, strict=True)])
    return [1e6 * median(medians) for medians in zip(*rounds[1:], strict=True)]


def _measure_rank(rank: int, case: Case, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(measure(case)))
    dist.destroy_process_group()


def _measure_on_two(case: Case) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_measure_rank, (case, Path(folder)), nprocs=2)  # type: ignore[no-untyped-call]
        return json.loads((Path(folder) / "0.json").read_text())


def _calls(work: Callable[[], object]) -> str:
    """Return the number of Python calls of a piece of work; cm_fused's without comprehensions."""
    called: list[tuple[str, str]] = []

    def note(frame: Any, event: str, argument: object) -> None:
        called.extend([(frame.f_code.co_filename, frame.f_code.co_name)] * (event == "call"))

    sys.setprofile(note)
    work()
    sys.setprofile(None)
    own = [file for file, name in called if file.startswith(PACKAGE) and name[0] != "<"]
    counts = len(called), len(dict(called)), len(own), len(set(own))
    return "{} in {} files, {} of cm_fused's in {}".format(*counts)


def _print_calls() -> None:
    stepped = Stepped(Case("", 1, 2, 0), "AdamCM")
    for turn in range(12):
        stepped.timed_step(turn)
    print("step() of two parameters:", _calls(stepped.optimizer.step))
    saved = stepped.optimizer.state_dict()
    print("load_state_dict():", _calls(lambda: stepped.optimizer.load_state_dict(saved)))


def _row(case: Case, device: str, num_rounds: int) -> dict[str, Any]:
    both = _measure_on_two(case) if case.sharded else measure(case, device, num_rounds)
    return {**asdict(case), "microseconds": both, "ratio": both[0] / both[1]}


def main() -> None:
    """Print a table of all cases, or the calls."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.host_time")
    parser.add_argument("--device", choices=machine.DEVICES, default="cpu")
    parser.add_argument("--smoke", action="store_true", help="few rounds: shows that it runs")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--results", type=Path, help="a GPU's results file to update")
    parser.add_argument("--calls", action="store_true", help="count Python's calls instead")
    arguments = parser.parse_args()
    if arguments.calls:
        return _print_calls()
    device = arguments.device
    cases, num_rounds = CASES if device == "cpu" else CUDA_CASES, ROUNDS
    if arguments.smoke:
        cases, num_rounds = tuple(replace(case, steps=1) for case in cases), _SMOKE_ROUNDS
    rows = []
    print(report.HOST_TIME_HEADER)
    for case in cases:
        rows.append(_row(case, device, num_rounds))
        print(report.host_time_line(rows[-1]), flush=True)
    if arguments.out:
        of = {"machine": machine.describe(device), "versions": machine.versions(), "cases": rows}
        arguments.out.write_text(json.dumps(of, indent=1) + "\n")
    if arguments.results:
        results = json.loads(arguments.results.read_text())
        text = json.dumps({**results, "host_time": rows}, indent=1, ensure_ascii=False)
        arguments.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
