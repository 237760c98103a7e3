"""The paper's claims on trained models, from the files that runs on other data left.

No row here is of the paper's own data: Penn Treebank, CIFAR and ImageNet are in no package. A row
puts a claim to an analogue, and its setting says so.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch

from bench.paper.contenders import BASELINES, PAPERS
from bench.paper.statistics import Claim, paired
from bench.paper.sweep import Run, finished
from bench.paper.tasks import TASKS

_OURS = ("Adam+CM", "Adam+SAM+CM")
_OTHERS = ("Adam", "Adam+CG", "Adam+SAM")
# Adam+CM's basin, Fig. 7.
_BASIN_EPOCH = 18

# What is compared, by preset; see `bench.paper.train.PRESETS`.
_SETTINGS = {
    "paper-tuned": "settings of Tables 6 to 8",
    "paper-default": "defaults, the best rate of Adam's search for all",
    "search": "each system's own best rate of Table 5's",
    "fine-search": "each system's own best rate, of Table 5's and three more between them",
}
_NO_NUMBER = "—"

Runs = Mapping[str, Sequence[Run]]
Value = Callable[[Run], float]
Row = tuple[str, str, str, list[float]]


def training_claims(folder: Path) -> Iterator[Claim]:
    """Return the claims, seed by seed.

    Args:
        folder: The folder ``--out`` of `bench.paper.train`.
    """
    for task in (name for name in TASKS if (folder / name).is_dir()):
        for preset, words in _SETTINGS.items():
            runs = _by_system(finished(folder / task / f"{preset}.jsonl").values())
            if runs:
                of_task = _language if TASKS[task].text else _images
                rows = [*of_task(runs), *_readings(runs), *_baselines(runs)]
                yield from _claims(f"analogue {task}: {words}", rows)
        capacities = finished(folder / task / "capacities.jsonl").values()
        if capacities:
            yield from _claims(f"analogue {task}: defaults", _capacities(capacities))


def _claims(setting: str, rows: Iterable[Row]) -> Iterator[Claim]:
    for part, text, measure, samples in rows:
        if len(samples) < 2:
            continue
        known = all(map(math.isfinite, samples))
        yield Claim(
            part,
            setting,
            text,
            f"{measure}, {len(samples)} seeds",
            _NO_NUMBER,
            paired(torch.tensor(samples, dtype=torch.float64)) if known else None,
            "" if known else "a run diverged",
        )


def _by_system(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        groups.setdefault(run.config.system, []).append(run)
    return groups


def _gap(runs: Runs, value: Value, more: str, less: str) -> list[float]:
    """Return a quantity of one system less that of another, of the seeds that both have."""
    first, second = (
        {run.config.seed: math.nan if run.diverged else value(run) for run in runs.get(system, ())}
        for system in (more, less)
    )
    return [first[seed] - second[seed] for seed in first if seed in second]


def best_score(run: Run) -> float:
    """Return perplexity or accuracy after the epoch where it was best."""
    return run.scores[run.best_epoch - 1]


def _rise(run: Run) -> float:
    return 100 * (run.scores[-1] / best_score(run) - 1)


def _first_epochs(runs: Runs) -> Value:
    """Return how long a run takes to a score that all of its seed's reach.

    The score is the worst of the best scores of the paper's systems, so that it is one for all.
    """
    text = TASKS[next(iter(runs.values()))[0].config.task].text
    worst: dict[int, float] = {}
    for run in (run for system in PAPERS for run in runs.get(system, ()) if not run.diverged):
        seed, score = run.config.seed, best_score(run)
        worst[seed] = (max if text else min)(worst.get(seed, score), score)

    def epochs(run: Run) -> float:
        goal = worst[run.config.seed]
        reached = ((s <= goal) if text else (s >= goal) for s in run.scores)
        return 1 + next(i for i, there in enumerate(reached) if there)

    return epochs


def _language(runs: Runs) -> Iterator[Row]:
    unit = "best held-out perplexity"
    first = _first_epochs(runs)
    for ours in _OURS:
        for other in _OTHERS:
            lower = f"{ours} has a lower perplexity than {other}"
            yield "F7-a", lower, f"{unit}, {other} − {ours}", _gap(runs, best_score, other, ours)
            measure = f"epochs to a perplexity that all reach, {other} − {ours}"
            faster = f"{ours} converges faster than {other}"
            yield "F7-a", faster, measure, _gap(runs, first, other, ours)
    epochs = [_BASIN_EPOCH + 0.5 - run.best_epoch for run in runs.get("Adam+CM", ())]
    text = f"Adam+CM has its lowest perplexity by epoch {_BASIN_EPOCH}"
    yield "F7-a", text, f"{_BASIN_EPOCH} + 1/2 − its epoch", epochs
    # That Adam+CG is second best is this, and that the variants with momenta are better (F7-a).
    for other in ("Adam", "Adam+SAM"):
        gap = _gap(runs, best_score, other, "Adam+CG")
        measure = f"{unit}, {other} − Adam+CG"
        yield "F7-b", f"Adam+CG has a lower perplexity than {other}", measure, gap
    yield "F7-b", *_after_drop(runs)
    for ours in _OURS:
        rises = [math.nan if run.diverged else _rise(run) for run in runs.get(ours, ())]
        yield "F7-c", f"{ours} overfits after it converged", "last − best perplexity, %", rises
        text = f"{ours} overfits more than Adam"
        yield "F7-c", text, f"the same, {ours} − Adam", _gap(runs, _rise, ours, "Adam")


def _after_drop(runs: Runs) -> tuple[str, str, list[float]]:
    falls = [
        math.nan if run.diverged else run.scores[drop - 1] - min(run.scores[drop:])
        for run in runs.get("Adam+CG", ())
        for drop in run.config.drops[:1]
    ]
    text = "Adam+CG gets lower after the learning rate falls"
    return text, "perplexity at the drop − the lowest after it", falls


def _mean_of(name: str, log: bool = False) -> Value:
    def value(run: Run) -> float:
        found = [getattr(reading, name) for reading in run.measures]
        known = [number for number in found if number is not None]
        return fmean(map(_log10, known) if log else known)

    return value


def _last_of(name: str, log: bool = False) -> Value:
    def value(run: Run) -> float:
        number = getattr(run.measures[-1], name)
        return _log10(number) if log else number

    return value


def _log10(number: float | None) -> float:
    return math.log10(number) if number is not None and number > 0 else math.nan


def _images(runs: Runs) -> Iterator[Row]:
    first = _first_epochs(runs)
    for ours in _OURS:
        for other in _OTHERS:
            text = f"{ours} has a higher accuracy than {other}"
            measure = f"best held-out accuracy in points, {ours} − {other}"
            yield "T1-c", text, measure, _gap(runs, best_score, ours, other)
            measure = f"epochs to an accuracy that all reach, {other} − {ours}"
            faster = f"{ours} converges faster than {other}"
            yield "F8L", faster, measure, _gap(runs, first, other, ours)


def _readings(runs: Runs) -> Iterator[Row]:
    """Yield the rows of Fig. 10."""
    every = (reading for group in runs.values() for run in group for reading in run.measures)
    was_taken = any(reading.sharpness is not None for reading in every)
    sharp = _mean_of("sharpness", log=True)
    for other in _OTHERS:
        text = f"Adam+CM has a lower sharpness in training than {other}"
        measure = f"log10 of the largest eigenvalue, mean over training, {other} − Adam+CM"
        if was_taken:
            yield "F10a", text, measure, _gap(runs, sharp, other, "Adam+CM")
        text = f"Adam+CM's parameters travel farther than {other}'s"
        measure = f"distance from the start at the end, Adam+CM − {other}"
        yield "F10b", text, measure, _gap(runs, _last_of("distance"), "Adam+CM", other)
    for name, log, measure in (
        ("variance", True, "log10 of the variance over the slots"),
        ("relative_variance", False, "variance over the slots / their mean square"),
    ):
        gap = _gap(runs, _mean_of(name, log), "Adam+CG", "Adam+CM")
        text = "momenta vary less in the buffer than gradients"
        yield "F10c", text, f"{measure}, mean over training, Adam+CG − Adam+CM", gap
    text = "momenta agree more with the slot of highest priority"
    measure = "mean cosine, mean over training, Adam+CM − Adam+CG"
    yield "F10d", text, measure, _gap(runs, _mean_of("agreement"), "Adam+CM", "Adam+CG")


def _baselines(runs: Runs) -> Iterator[Row]:
    """Yield the question that the paper does not ask: against today's baselines."""
    text = any(TASKS[run.config.task].text for group in runs.values() for run in group)
    for other in BASELINES:
        more, less = (other, "Adam+CM") if text else ("Adam+CM", other)
        unit = "best held-out perplexity" if text else "best held-out accuracy in points"
        claim = f"Adam+CM is better than {other}"
        yield (
            "not in the paper",
            claim,
            f"{unit}, {more} − {less}",
            _gap(runs, best_score, more, less),
        )


def _capacities(runs: Iterable[Run]) -> Iterator[Row]:
    """Yield Fig. 8, right: the sharpness at the end against the buffer's capacity."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.config.hyperparameters.capacity, run.config.seed)):
        groups.setdefault(f"C = {run.config.hyperparameters.capacity}", []).append(run)
    names = list(groups)
    pairs = [*itertools.pairwise(names), (names[0], names[-1])]
    for small, large in pairs:
        text = f"Adam+CM ends flatter with {large} than with {small}"
        measure = f"log10 of the largest eigenvalue at the end, {small} − {large}"
        yield "F8R", text, measure, _gap(groups, _last_of("sharpness", log=True), small, large)
