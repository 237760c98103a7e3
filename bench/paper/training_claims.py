"""The paper's claims on trained models, from the files that their runs left."""

from collections.abc import Iterator
from pathlib import Path

import torch

from bench.paper import buffers
from bench.paper.statistics import Claim, paired
from bench.paper.sweep import Run, finished

_OURS = "Adam+CM"
_PAIRS = (
    (_OURS, "Adam"),
    (_OURS, "Adam+CG"),
    (_OURS, "Adam+SAM"),
    ("Adam+SAM+CM", "Adam+SAM"),
    ("AdamW+CM", "Adam"),
    (_OURS, "AdEMAMix"),
)


def training_claims(runs_file: Path) -> Iterator[Claim]:
    """Return the claims on the final held-out loss, seed by seed.

    Args:
        runs_file: What `bench.paper.train` wrote, with the same seeds for every system.
    """
    runs = list(finished(runs_file).values())
    for task in dict.fromkeys(run.config.task for run in runs):
        for ours, other in _PAIRS:
            better, worse = (_losses(runs, task, system) for system in (ours, other))
            # AdEMAMix is not in the paper: the same question, asked of today's rival.
            yield Claim(
                "not in the paper" if other == "AdEMAMix" else "T1-c",
                "stand-in",
                f"{task}: {ours} has a lower held-out loss than {other}",
                f"final held-out loss, {other} − {ours}, {len(better)} seeds",
                "—",
                paired(worse - better),
            )


def _losses(runs: list[Run], task: str, system: str) -> torch.Tensor:
    chosen = [r for r in runs if (r.config.task, r.config.system) == (task, system)]
    chosen.sort(key=lambda run: run.config.seed)
    return torch.tensor([run.loss for run in chosen], dtype=torch.float64)


def buffer_claims(folder: Path) -> Iterator[Claim]:
    """Return the claims on the buffers of real runs.

    Args:
        folder: What `bench.paper.buffers` wrote.
    """
    for figure, quantity, text, (more, less) in (
        ("F10c", "variance", "momenta vary less in the buffer than gradients",
         ("Adam+CG", _OURS)),
        ("F10d", "agreement", "momenta agree more with the one of highest priority",
         (_OURS, "Adam+CG")),
    ):  # fmt: skip
        high, low = (
            buffers.series(sorted(folder.glob(f"{system}-*.csv")), quantity)[1].mean(1)
            for system in (more, less)
        )
        yield Claim(
            figure,
            "stand-in",
            f"{buffers.TASK}: {text}",
            f"{quantity}, mean over the run, {more} − {less}, {len(high)} seeds",
            "—",
            paired(high - low),
        )
