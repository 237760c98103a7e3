"""A training run killed at random moments and resumed ends with the bits of one that was not.

Its checkpoints are written under a temporary name and renamed.
"""

import itertools
import multiprocessing
import os
import random
import signal
import tempfile
from pathlib import Path

import torch
from torch import nn

from bench.reliability.finding import BUFFER_DTYPES, MOMENT_DTYPES, Finding, require, same
from cm_fused import AdamCM

STEPS_BETWEEN_CHECKPOINTS = 20
# A run is killed within so many seconds: it gets through some checkpoints, or none.
LONGEST_LIFE = 0.04
Precision = tuple[torch.dtype, torch.dtype]


def run(quick: bool) -> Finding:
    """Kill and resume a run of every precision."""
    kills, steps = (5, 1000) if quick else (50, 6000)
    chance = random.Random(0)
    total = 0
    precisions = list(itertools.product(BUFFER_DTYPES, MOMENT_DTYPES))
    for precision in precisions[:: 7 if quick else 1]:
        with tempfile.TemporaryDirectory() as folder:
            never_killed, killed = Path(folder, "never_killed.pt"), Path(folder, "killed.pt")
            _run_until_done(never_killed, precision, steps, 0, chance)
            _run_until_done(killed, precision, steps, kills, chance)
            alike = same(torch.load(never_killed), torch.load(killed))
            require(alike, f"a killed run with {precision} ended with other bits")
            total += kills
    return Finding(
        "kill and resume", total, "SIGKILLs at random moments", "the same bits at the end"
    )


def _run_until_done(
    path: Path, precision: Precision, steps: int, kills: int, chance: random.Random
) -> None:
    """Start the run as often as it takes, the first times to kill it."""
    # A fork has torch imported already; nothing has run in threads before.
    context = multiprocessing.get_context("fork")
    killed = 0
    while True:
        worker = context.Process(target=_train, args=(path, precision, steps))
        worker.start()
        if killed < kills:
            worker.join(chance.uniform(0, LONGEST_LIFE))
            if worker.is_alive():
                worker.kill()
                killed += 1
        worker.join()
        if worker.exitcode == 0:
            require(killed == kills, f"the run had finished after {killed} of {kills} kills")
            return
        require(worker.exitcode == -signal.SIGKILL, f"the run failed: {worker.exitcode}")


def _train(path: Path, precision: Precision, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    buffer_dtype, moment_dtype = precision
    optimizer = AdamCM(
        model.parameters(), lr=1e-2, buffer_dtype=buffer_dtype, moment_dtype=moment_dtype
    )
    first = 0
    if path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for t in range(first, steps):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        if (t + 1) % STEPS_BETWEEN_CHECKPOINTS == 0:
            parts = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": t + 1,
            }
            torch.save(parts, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
