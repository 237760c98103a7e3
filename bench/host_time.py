"""What a step costs the host, beside torch's fused AdamW: ``python -m bench.host_time``.

The tensors are so small that the arithmetic costs nothing. Both optimizers step in turns in one
process, on one thread; a ratio is that of the medians of the rounds' medians. ``--out FILE`` writes
the figures as JSON, ``--calls`` counts Python's calls of a step and of load_state_dict instead.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from bench import machine
from cm_fused import AdamCM

Seconds = dict[str, float]
# Steps before the timed ones: they fill the buffer, and what is prepared once is ready.
WARM_UP = 12
ROUNDS = 15


@dataclass(frozen=True)
class Case:
    """What is stepped.

    Attributes:
        name: For the table.
        groups: Param groups.
        tensors: Of each group.
        target: The largest ratio that is good enough.
        numel: Of each tensor.
        alternating: Tensors of even and of odd position have gradients in turns.
        sharded: With fully_shard, on two processes.
        steps: Of a round.
    """

    name: str
    groups: int
    tensors: int
    target: float
    numel: int = 64
    alternating: bool = False
    sharded: bool = False
    steps: int = 20


CASES = (
    Case("1 tensor of 16", 1, 1, 0.9, numel=16, steps=200),
    Case("2 groups of 10 tensors", 2, 10, 0.4, steps=100),
    Case("100 tensors", 1, 100, 0.3),
    Case("100 groups of 1 tensor", 100, 1, 0.2),
    Case("200 tensors, half with gradients in turns", 1, 200, 0.6, alternating=True),
    Case("100 groups of 2, half with gradients in turns", 100, 2, 0.6, alternating=True),
    Case("24 tensors, fully_shard, 2 processes", 1, 24, 1.0, sharded=True),
)


def _params(case: Case) -> list[nn.Parameter]:
    count = case.groups * case.tensors
    if not case.sharded:
        return [nn.Parameter(torch.randn(case.numel)) for _ in range(count)]
    layers = (nn.Linear(case.numel, 2, bias=False) for _ in range(count))
    return list(fully_shard(nn.Sequential(*layers)).parameters())


class Stepped:
    """An optimizer and the gradients of its steps."""

    def __init__(self, case: Case, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]):
        self.params = _params(case)
        size = case.tensors
        starts = range(0, len(self.params), size)
        self.optimizer = make([{"params": self.params[start : start + size]} for start in starts])
        self.grads = [torch.randn_like(param).detach() for param in self.params]
        self.alternating = case.alternating

    def timed_step(self, turn: int) -> float:
        """Set the gradients of a turn, then step; return the step's seconds."""
        for i, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            param.grad = grad if not self.alternating or i % 2 == turn % 2 else None
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


def measure(case: Case) -> Seconds:
    """Return the seconds of a step of each optimizer."""
    torch.set_num_threads(1)
    both = {
        "AdamCM": Stepped(case, lambda groups: AdamCM(groups)),
        "AdamW": Stepped(case, lambda groups: torch.optim.AdamW(groups, fused=True)),
    }
    medians: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(WARM_UP):
        for stepped in both.values():
            stepped.timed_step(turn)
    for _ in range(ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in both}
        for turn in range(case.steps):
            for name, stepped in both.items():
                times[name].append(stepped.timed_step(turn))
        for name, of_name in times.items():
            medians[name].append(median(of_name))
    return {name: median(of_name) for name, of_name in medians.items()}


def _measure_sharded(rank: int, case: Case, port: int, results: Any) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    seconds = measure(case)
    if rank == 0:
        results.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def _measure_on_two(case: Case) -> Seconds:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_measure_sharded, (case, port, results), nprocs=2)
    seconds: Seconds = results.get()
    return seconds


def calls(work: Callable[[], object]) -> tuple[int, int]:
    """Return how many Python functions a piece of work calls, and in how many files."""
    files: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            files.append(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(files), len(set(files))


def _print_calls() -> None:
    stepped = Stepped(Case("", 1, 2, 0.0), lambda groups: AdamCM(groups))
    for turn in range(WARM_UP):
        stepped.timed_step(turn)
    saved = stepped.optimizer.state_dict()
    works = {
        "step() of two parameters": stepped.optimizer.step,
        "load_state_dict()": lambda: stepped.optimizer.load_state_dict(saved),
    }
    for name, work in works.items():
        print("{}: {} Python calls in {} files".format(name, *calls(work)))


def main() -> None:
    """Measure all cases; print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--calls", action="store_true", help="count Python's calls instead")
    arguments = parser.parse_args()
    if arguments.calls:
        _print_calls()
        return
    rows = []
    print(f"{'microseconds a step':47} AdamCM   AdamW  ratio  target")
    for case in CASES:
        seconds = _measure_on_two(case) if case.sharded else measure(case)
        ours, theirs = seconds["AdamCM"] * 1e6, seconds["AdamW"] * 1e6
        rows.append({**asdict(case), "microseconds": [ours, theirs], "ratio": ours / theirs})
        print(f"{case.name:47} {ours:6.0f} {theirs:7.0f} {ours / theirs:6.2f} {case.target:7.1f}")
    if arguments.out:
        described = {"machine": machine.describe("cpu"), "versions": machine.versions()}
        arguments.out.write_text(json.dumps({**described, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
