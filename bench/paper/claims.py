"""The paper's claims on the toy surfaces, each as a difference that it predicts to be positive."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from bench.paper.experiments import (
    ACKLEY_BOX,
    ACKLEY_SEEDS,
    BEST,
    CAPACITY,
    CELLS,
    CONSTANT,
    DECAY,
    DECAYS,
    DEFAULT_BUFFER,
    ESCAPES,
    FIGURE_STARTS,
    LANDSCAPES,
    LINE_CAPACITIES,
    LINE_STARTS,
    MORE_STARTS,
    OURS,
    PACKAGE,
    PAIR,
    PAPER,
    SEEDS,
    SHARPNESS,
    WIDE,
    Outcome,
    Scan,
    at_flat,
    at_zero,
)
from bench.paper.paper_numbers import FIGURE_5, TABLE_2
from bench.paper.results import Results
from bench.paper.statistics import Claim, counted, equivalent, paired

OTHERS = ("Adam", "Adam+SAM", "Adam+CG")
NO_NUMBER = "—"
NEAR = 0.5
_DEFAULT_CELL = CELLS[0]
_LARGE_CELL = (CAPACITY, DECAY)
_USUAL_ACKLEY = f"±{ACKLEY_BOX}"

CRITERIA = {"ends within 0.1 of 0": at_zero, "ends nearer to 0": at_flat}

Measure = Callable[[Outcome], Tensor]
_MEASURES: dict[str, Measure] = {
    "loss": lambda outcome: outcome.losses,
    "sharpness": lambda outcome: outcome.sharpness,
}
_PARTS = {"loss": "F5-loss", "sharpness": "F5-sharp"}


def claims(results: Results) -> list[Claim]:
    """Return every claim that a toy surface decides, in every setting."""
    rows: list[Claim] = []
    for landscape in LANDSCAPES:
        scan, starts = results.scans[landscape.name, landscape.starts], landscape.starts
        if landscape.name == "Goldstein-Price":
            rows += _figure_1(scan, starts, NEAR / landscape.scale)
        rows += _figure_5(landscape.name, scan, starts)
        if landscape.name == "Levy":
            rows += _table_2(scan, starts)
    return [
        *rows,
        *_figure_2(results),
        *_figure_3(results),
        *_figure_4(results),
        *_figure_6(results),
        *_figure_11(results),
        *_figure_12(results),
        *_figures_17_and_18(results),
    ]


def _gap(more: Outcome, less: Outcome, of: Measure) -> Tensor:
    return of(more) - of(less)


def _figure_1(scan: Scan, starts: str, radius: float) -> Iterator[Claim]:
    cells = {s: _DEFAULT_CELL if s in PAIR else _LARGE_CELL for s in (*OTHERS, OURS)}
    found = {system: scan[(MORE_STARTS, system, *cell)] for system, cell in cells.items()}
    loss, sharpness = _MEASURES["loss"], _MEASURES["sharpness"]

    def row(part: str, text: str, more: str, less: str, name: str, of: Measure) -> Claim:
        measure = f"{name}, {more} − {less}"
        gap = _gap(found[more], found[less], of)
        setting = f"{PAPER}, {MORE_STARTS}"
        text = f"Goldstein-Price: {text}"
        return Claim(part, setting, text, measure, NO_NUMBER, paired(gap), starts=starts)

    sam = "Adam+SAM"
    yield row("F1-i", "Adam ends low", sam, "Adam", "final loss", loss)
    yield row("F1-i", "Adam ends sharp", "Adam", OURS, "final sharpness", sharpness)
    yield row("F1-ii", "SAM ends flatter than Adam", "Adam", sam, "final sharpness", sharpness)
    yield row("F1-ii", "SAM ends higher than Adam", sam, "Adam", "final loss", loss)
    for more, less in product(PAIR, ("Adam", sam)):
        text = f"{more} explores more than {less}"
        yield row("F1-iii", text, more, less, "path length", lambda found: found.length)
    for other in OTHERS:
        text = f"{OURS} ends nearer to (0, −1) than {other}"
        yield row("F1-iv", text, other, OURS, "distance", lambda found: found.distance)
    for other in OTHERS:
        yield row(
            "F14",
            f"{OURS} finds the global minimum more often than {other}",
            OURS,
            other,
            f"share within {NEAR:g} of (0, −1)",
            lambda found: (found.distance < radius).double(),
        )


def _variants(scan: Scan, names: Sequence[str]) -> Iterator[tuple[str, Callable[..., Outcome]]]:
    """Yield settings in words, with what finds the outcome of a system and a cell in it."""
    for name in names:

        def find(system: str, cell: tuple[int, float] = _LARGE_CELL, name: str = name) -> Outcome:
            if name == PAPER:
                return scan[(MORE_STARTS, system, *cell)].first(SEEDS)
            return scan[(name, system, *cell)]

        yield (f"{PAPER}, {MORE_STARTS}" if name == MORE_STARTS else name), find


def _figure_5(surface: str, scan: Scan, starts: str) -> Iterator[Claim]:
    names = (PAPER, MORE_STARTS, CONSTANT, BEST, WIDE, PACKAGE)
    for setting, find in _variants(scan, names):
        for (name, of), other in product(_MEASURES.items(), OTHERS):
            theirs = (getattr(FIGURE_5[surface, s], name) for s in (other, OURS))
            yield Claim(
                _PARTS[name],
                setting,
                f"{surface}: {OURS} has a lower {name} than {other}",
                f"final {name}, {other} − {OURS}",
                _difference(*theirs),
                paired(_gap(find(other), find(OURS), of)),
                starts=starts,
            )
        yield from _figure_5_sam(surface, find("Adam"), find("Adam+SAM"), setting, starts)


def _figure_5_sam(
    surface: str, adam: Outcome, sam: Outcome, setting: str, starts: str
) -> Iterator[Claim]:
    theirs = {system: FIGURE_5[surface, system] for system in ("Adam", "Adam+SAM", OURS)}
    for (name, of), sign in zip(_MEASURES.items(), (1, -1), strict=True):
        values = {system: getattr(numbers, name) for system, numbers in theirs.items()}
        gap = sign * _gap(sam, adam, of)
        paper = _difference(*(sign * values[system] for system in ("Adam+SAM", "Adam")))
        if surface == "Levy":
            margin = (values["Adam"] - values[OURS]) / 10
            text = f"Levy: Adam+SAM and Adam have the same {name}"
            measure = f"{margin:.3g} (a tenth of the paper's gain) − |final {name}, SAM − Adam|"
            estimate = equivalent(gap, margin)
        else:
            order = "higher" if sign > 0 else "lower"
            text = f"{surface}: Adam+SAM has a {order} {name} than Adam"
            measure = f"final {name}, {'SAM − Adam' if sign > 0 else 'Adam − SAM'}"
            estimate = paired(gap)
        yield Claim("F5-sam", setting, text, measure, paper, estimate, starts=starts)


def _difference(more: float, less: float) -> str:
    return f"{more - less:.2f}".replace("-", "−")


def _table_2(scan: Scan, starts: str) -> Iterator[Claim]:
    large, small = _LARGE_CELL, (5, DECAY)
    for setting, find in _variants(scan, (PAPER, MORE_STARTS, PACKAGE)):
        for name, of in _MEASURES.items():
            theirs = [getattr(TABLE_2[(OURS, *cell)], name) for cell in (small, large)]
            yield Claim(
                "T2-a",
                setting,
                f"Levy: {OURS} has a lower {name} with the larger buffer",
                f"final {name}, C = 5 − C = 20, λ = 0.99",
                _difference(*theirs),
                paired(_gap(find(OURS, small), find(OURS, large), of)),
                starts=starts,
            )
        for name, of in _MEASURES.items():
            best = min((find("Adam+CG", cell) for cell in CELLS), key=_mean(of))
            worst = max((find(OURS, cell) for cell in CELLS), key=_mean(of))
            theirs = [getattr(TABLE_2[key], name) for key in _worst_and_best(name)]
            yield Claim(
                "T2-b",
                setting,
                f"Levy: {OURS} always has a lower {name} than Adam+CG",
                f"final {name}, best Adam+CG − worst {OURS} of three (C, λ)",
                _difference(*theirs),
                paired(_gap(best, worst, of)),
                starts=starts,
            )


def _mean(of: Measure) -> Callable[[Outcome], float]:
    return lambda outcome: of(outcome).mean().item()


def _worst_and_best(name: str) -> tuple[tuple[str, int, float], tuple[str, int, float]]:
    """Return the paper's best row of Adam+CG and its worst of ours."""
    rows = {system: [key for key in TABLE_2 if key[0] == system] for system in ("Adam+CG", OURS)}
    value = {key: getattr(numbers, name) for key, numbers in TABLE_2.items()}
    return min(rows["Adam+CG"], key=value.__getitem__), max(rows[OURS], key=value.__getitem__)


def _figure_2(results: Results) -> Iterator[Claim]:
    gradients, momenta = (results.first_buffers[system] for system in PAIR)
    ends = results.ackley[_USUAL_ACKLEY]
    first = "Ackley: in the first 10 steps "
    measured = (
        (
            f"{first}gradients cancel in the buffer, momenta less",
            f"1 − |mean of the slots| / mean |slot|, Adam+CG − {OURS}",
            gradients.cancellation().mean(0) - momenta.cancellation().mean(0),
        ),
        (
            f"{first}Adam+CG's buffer mean and new gradient cancel",
            "− their cosine",
            -gradients.cosine().mean(0),
        ),
        (
            f"{first}{OURS}'s buffer mean and new momentum agree more",
            f"cosine with the buffer's mean, {OURS} − Adam+CG",
            momenta.cosine().mean(0) - gradients.cosine().mean(0),
        ),
        (
            f"{first}Adam+CG's updates are small",
            f"length of an update, {OURS} − Adam+CG",
            momenta.update_length().mean(0) - gradients.update_length().mean(0),
        ),
        (
            f"Ackley: {OURS} ends near the global minimum",
            f"distance at the end, Adam+CG − {OURS}",
            ends[DEFAULT_BUFFER, "Adam+CG"].distance - ends[DEFAULT_BUFFER, OURS].distance,
        ),
    )
    for text, measure, gaps in measured:
        counts = {PAPER: ACKLEY_SEEDS, f"{PAPER}, {MORE_STARTS}": len(gaps)}
        for setting, count in counts.items():
            found = paired(gaps[:count])
            yield Claim("F2", setting, text, measure, NO_NUMBER, found, starts=_USUAL_ACKLEY)


def _figure_3(results: Results) -> Iterator[Claim]:
    usual = results.ackley[_USUAL_ACKLEY]
    settings = [
        (PAPER, PAPER, _USUAL_ACKLEY, ACKLEY_SEEDS),
        (f"{PAPER}, {MORE_STARTS}", PAPER, _USUAL_ACKLEY, None),
    ]
    for name in (CONSTANT, PACKAGE):
        settings.append((f"{name}, no search", name, _USUAL_ACKLEY, None))
    settings.append((f"{DEFAULT_BUFFER}, {WIDE}", WIDE, _USUAL_ACKLEY, None))
    for starts in results.ackley:
        settings.append(("no search", DEFAULT_BUFFER, starts, None))
    for setting, variant, starts, count in settings:
        found = {
            system: outcome.first(count) if count else outcome
            for (name, system), outcome in results.ackley[starts].items()
            if name == variant
        }
        yield from _figure_3_rows(found, setting, starts)
    for other in OTHERS:
        gap = _gap(usual[DEFAULT_BUFFER, other], usual[DEFAULT_BUFFER, OURS], _MEASURES["loss"])
        yield Claim(
            "F13",
            f"{PAPER}, {FIGURE_STARTS} starts",
            f"Ackley: {OURS} ends lower than {other}",
            f"final loss, {other} − {OURS}",
            NO_NUMBER,
            paired(gap[:FIGURE_STARTS]),
            starts=_USUAL_ACKLEY,
        )


def _figure_3_rows(found: dict[str, Outcome], setting: str, starts: str) -> Iterator[Claim]:
    for ours, other in product((OURS, "Adam+SAM+CM"), OTHERS):
        yield Claim(
            "F3",
            setting,
            f"Ackley: {ours} ends lower than {other}",
            f"final loss, {other} − {ours}",
            NO_NUMBER,
            paired(_gap(found[other], found[ours], _MEASURES["loss"])),
            starts=starts,
        )
    for other in OTHERS:
        gap = found[OURS].moved - found[other].moved
        yield Claim(
            "F3",
            setting,
            f"Ackley: {other} stays nearer to its start",
            f"distance from start to end, {OURS} − {other}",
            NO_NUMBER,
            paired(gap),
            starts=starts,
        )


def _figure_4(results: Results) -> Iterator[Claim]:
    for setting in dict.fromkeys(name for name, _ in results.escapes):
        shares = {
            system: at_flat(ends).double()
            for (name, system), (_, ends) in results.escapes.items()
            if name == setting
        }
        for other in OTHERS:
            gaps = shares[OURS] - shares[other]
            for where, gap in (("mean over s", gaps.mean(0)), ("s = 100", gaps[-1])):
                yield Claim(
                    "F4",
                    setting,
                    f"D = 10: {OURS} escapes more often than {other}, {where}",
                    f"share of {ESCAPES} runs wholly in the flat minimum, {OURS} − {other}",
                    NO_NUMBER,
                    paired(gap),
                )
        yield Claim(
            "F4",
            setting,
            f"D = 10: {OURS} escapes more often as s grows",
            f"share of {ESCAPES} runs, s = {SHARPNESS[-1]:g} − s = {SHARPNESS[0]:g}",
            NO_NUMBER,
            paired(shares[OURS][-1] - shares[OURS][0]),
        )


def _figure_6(results: Results) -> Iterator[Claim]:
    nearest = torch.tensor([start < 0.5 for start in LINE_STARTS])
    ends = {key: path[-1] for key, path in results.lines.items()}
    adam = ends["Adam", 5, DECAYS[0]]
    hits = int(((adam < 0.5) == nearest).sum())
    yield Claim(
        "F6",
        PAPER,
        "Adam mostly goes to the minimum nearest to its start",
        f"cells that do ({hits}) − cells that do not",
        NO_NUMBER,
        counted(2 * hits - adam.numel(), adam.numel()),
    )
    yield from _more_cells("F6", *_DEFAULT_CELL, ends)


def _more_cells(
    part: str, capacity: int, decay: float, ends: dict[tuple[str, int, float], Tensor]
) -> Iterator[Claim]:
    ours, other = (ends[system, capacity, decay][..., None] for system in (OURS, "Adam+CG"))
    for criterion, at in CRITERIA.items():
        counts = [int(at(cells).sum()) for cells in (ours, other)]
        yield Claim(
            part,
            f"{PAPER}, {criterion}",
            f"{OURS} ends at 0 for more cells (s, x0) than Adam+CG, C = {capacity}, λ = {decay}",
            f"cells at 0, {OURS} ({counts[0]}) − Adam+CG ({counts[1]})",
            NO_NUMBER,
            counted(counts[0] - counts[1], ours.numel()),
        )


def _figures_17_and_18(results: Results) -> Iterator[Claim]:
    ends = {key: path[-1] for key, path in results.lines.items()}
    for part, decay in (("F17", DECAYS[0]), ("F18", DECAYS[1])):
        for capacity in LINE_CAPACITIES:
            yield from _more_cells(part, capacity, decay, ends)
        for system, (criterion, at) in product(PAIR, CRITERIA.items()):
            by_capacity = torch.stack(
                [at(ends[system, c, decay][..., None]) for c in LINE_CAPACITIES]
            )
            differing = by_capacity.any(0) & ~by_capacity.all(0)
            yield Claim(
                part,
                f"{PAPER}, {criterion}",
                f"C matters for {system}, λ = {decay}",
                "cells that end at 0 with one C of 5, 10, 20 and not with another",
                NO_NUMBER,
                counted(int(differing.sum()), differing.numel()),
            )


def _figure_11(results: Results) -> Iterator[Claim]:
    opposed, outcomes = results.opposition.opposed, results.opposition.outcomes
    most = (opposed >= 4).double()
    rows = (
        (
            "eq. 12: four of five slots of Adam+CG oppose each other in most steps",
            "share of steps 5 to 100 with four slots or more that have an opposite − 1/2",
            most.mean(0) - 0.5,
        ),
        (
            "eq. 12: three consecutive steps with four opposed slots occur in most runs",
            "share of runs that have them − 1/2",
            (most[2:] * most[1:-1] * most[:-2]).any(0).double() - 0.5,
        ),
        (
            f"eq. 12: Adam+CG is stuck in a sharper minimum than {OURS}",
            f"final sharpness, Adam+CG − {OURS}",
            _gap(outcomes["Adam+CG"], outcomes[OURS], _MEASURES["sharpness"]),
        ),
        (
            f"eq. 12: Adam+CG is stuck in a higher minimum than {OURS}",
            f"final loss, Adam+CG − {OURS}",
            _gap(outcomes["Adam+CG"], outcomes[OURS], _MEASURES["loss"]),
        ),
    )
    for text, measure, gaps in rows:
        setting = f"{PAPER}, {MORE_STARTS}"
        yield Claim("F11", setting, text, measure, NO_NUMBER, paired(gaps), starts=_USUAL_ACKLEY)


def _figure_12(results: Results) -> Iterator[Claim]:
    for dimension in (1, 10):
        for decay, (criterion, at) in product(DECAYS, CRITERIA.items()):
            shares = {
                (system, capacity): at(ends).double()
                for (d, system, capacity, b), ends in results.capacity_escapes.items()
                if d == dimension and (b == decay or system in ("Adam", "Adam+SAM"))
            }
            paper = PAPER if dimension == 1 else f"D = {dimension}"
            setting = f"{paper}, λ = {decay}, {criterion}"
            rows = (*_figure_12_left(shares), *_figure_12_right(shares))
            for part, text, measure, gap in rows:
                yield Claim(part, setting, text, measure, NO_NUMBER, paired(gap))


_Row = tuple[str, str, str, Tensor]


def _figure_12_left(shares: dict[tuple[str, int], Tensor]) -> Iterable[_Row]:
    at_10 = {system: values for (system, capacity), values in shares.items() if capacity == 10}
    for other in OTHERS:
        gap = at_10[OURS] - at_10[other]
        name = f"share of {ESCAPES} runs, {OURS} − {other}"
        text = f"{OURS} reaches 0 more often than {other}"
        yield "F12i", f"{text}, s > 2", f"{name}, mean over s > 2", gap[1:].mean(0)
    best = max(OTHERS, key=lambda other: at_10[other][0].mean().item())
    name = f"share of {ESCAPES} runs, {best} (the best of the others) − {OURS}, s = 2"
    yield "F12i", f"not so for s = 2: {best} does", name, at_10[best][0] - at_10[OURS][0]
    for other in ("Adam", "Adam+SAM"):
        text = f"Adam+CG falls below {other} as s grows"
        measure = f"share of {ESCAPES} runs, {other} − Adam+CG, s = 100"
        yield "F12i", text, measure, at_10[other][-1] - at_10["Adam+CG"][-1]


def _figure_12_right(shares: dict[tuple[str, int], Tensor]) -> Iterable[_Row]:
    for small, large in ((5, 10), (10, 20), (1, 20)):
        gap = (shares[OURS, large] - shares[OURS, small]).mean(0)
        text = f"{OURS} escapes more often with C = {large} than with C = {small}"
        measure = f"share of {ESCAPES} runs, mean over s, C = {large} − C = {small}"
        yield "F12ii", text, measure, gap


# What no toy surface decides: id, claim, what it needs.
_TRAINED = (
    ("F7-a", "PTB: CM variants have a lower validation PPL and converge faster"),
    ("F7-b", "PTB: Adam+CG is second best after the learning rate falls"),
    ("F7-c", "PTB: both CM variants overfit after they converged"),
    ("T1-a", "CIFAR, no search: best Adam+CM (ResNet34), Adam+SAM+CM (WRN-1)"),
    ("T1-b", "CIFAR, search: best Adam+SAM+CM (CIFAR-10), Adam+CM (CIFAR-100)"),
    ("T1-c", "CIFAR: a CM variant is the best in each column"),
    ("F8L", "CIFAR-10, WRN-1: CM variants converge faster, Adam+SAM+CM ends best"),
    ("F8R", "CIFAR: final sharpness falls as the buffer of momenta grows"),
    ("F9", "ImageNet: AdamW+CM converges faster and ends best"),
    ("F10a", "CIFAR-100, WRN-1: Adam+CM has a lower sharpness in training"),
    ("F10b", "CIFAR-100, WRN-1: Adam+CM travels farthest"),
    ("F10c", "CIFAR-100, WRN-1: momenta vary less in the buffer than gradients"),
    ("F10d", "CIFAR-100, WRN-1: momenta agree more with the largest slot"),
    ("F15", "CIFAR, no search, accuracy per epoch: Adam+SAM+CM best overall"),
    ("F16", "CIFAR, search, accuracy per epoch: CM variants end higher"),
)
_NEEDS = {
    "PTB": ("Penn Treebank", "lstm-ptb"),
    "CIFAR-100, WRN-1": ("CIFAR-100", "wrn-cifar100"),
    "CIFAR": ("CIFAR", "wrn-cifar10"),
    "ImageNet": ("ImageNet", "efficientnet-folder"),
}


def not_run(decided: Iterable[Claim]) -> Iterator[Claim]:
    """Yield a row for each claim on the paper's own data that no row decides yet."""
    known = {claim.id for claim in decided if claim.setting.startswith(PAPER)}
    for part, text in _TRAINED:
        if part in known:
            continue
        data, task = next(need for name, need in _NEEDS.items() if text.startswith(name))
        needs = f"needs {data}: `python -m bench.paper.train {task} --data FOLDER`"
        yield Claim(part, PAPER, text, "", NO_NUMBER, None, needs)
