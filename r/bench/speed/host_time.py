"""What a step costs the host, beside torch's fused AdamW: ``python -m bench.speed.host_time``.

Both optimizers step in turns, on one thread; a ratio is that of the medians of rounds' medians.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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

PACKAGE = str(Path(cm_fused.__file__).parent)
# The first of which is left out: it fills the buffers, and prepares what is prepared once.
ROUNDS = 16
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamCM": lambda groups: cm_fused.AdamCM(groups),
    "AdamW": lambda groups: AdamW(groups, fused=True),
}


@dataclass(frozen=True)
class Case:
    """What is stepped. If `alternating`, every other tensor has a gradient, in turns."""

    name: str
    groups: int
    tensors: int
    target: float
    steps: int = 20
    numel: int = 64
    alternating: bool = False
    sharded: bool = False


CASES = (
    Case("1 tensor of 16", 1, 1, 0.9, 200, numel=16),
    Case("2 groups of 10 tensors", 2, 10, 0.4, 100),
    Case("100 tensors", 1, 100, 0.3),
    Case("100 groups of 1 tensor", 100, 1, 0.2),
    Case("200 tensors, every other one in turns", 1, 200, 0.6, alternating=True),
    Case("100 groups of 2, every other tensor in turns", 100, 2, 0.6, alternating=True),
    Case("24 tensors, fully_shard on 2 processes", 1, 24, 1.0, sharded=True),
)


class Stepped:
    """An optimizer with the gradients of its steps."""

    def __init__(self, case: Case, name: str) -> None:
        self.alternating, size = case.alternating, case.tensors
        layers = [nn.Linear(case.numel // 2, 2, bias=False) for _ in range(case.groups * size)]
        if case.sharded:
            fully_shard(nn.Sequential(*layers))
        self.params = [layer.weight for layer in layers]
        self.grads = [param.detach().clone() for param in self.params]
        starts = range(0, len(layers), size)
        self.optimizer = OPTIMIZERS[name]([{"params": self.params[i : i + size]} for i in starts])

    def timed_step(self, turn: int) -> float:
        """Set the gradients of a turn, then step; return the step's seconds."""
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            param.grad = grad if not self.alternating or i % 2 == turn % 2 else None
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


def measure(case: Case) -> list[float]:
    """Return the microseconds of a step of each of `OPTIMIZERS`."""
    torch.set_num_threads(1)
    both = [Stepped(case, name) for name in OPTIMIZERS]
    rounds = []
    for _ in range(ROUNDS):
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


def main() -> None:
    """Print a table of all cases, or the calls."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.host_time")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--calls", action="store_true", help="count Python's calls instead")
    arguments = parser.parse_args()
    if arguments.calls:
        return _print_calls()
    rows = []
    print(f"{'microseconds a step':47} AdamCM   AdamW  ratio  target")
    for case in CASES:
        ours, theirs = _measure_on_two(case) if case.sharded else measure(case)
        rows.append({**asdict(case), "microseconds": [ours, theirs], "ratio": ours / theirs})
        print(f"{case.name:47} {ours:6.0f} {theirs:7.0f} {ours / theirs:6.2f} {case.target:7.1f}")
    if arguments.out:
        of = {"machine": machine.describe("cpu"), "versions": machine.versions(), "cases": rows}
        arguments.out.write_text(json.dumps(of, indent=1) + "\n")


if __name__ == "__main__":
    main()
