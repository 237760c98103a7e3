"""The paper's claims on the toy surfaces, each as a difference that it predicts to be positive."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.paper.experiments import CAPACITIES, LEARNING_RATE, SHARPNESS, Outcome
from bench.paper.results import (
    BUFFER_RATES,
    DECAYS,
    DIMENSIONS,
    LANDSCAPES,
    OTHERS,
    OURS,
    TABLE_CAPACITIES,
    Results,
)
from bench.paper.statistics import Claim, mean_interval

_MEASURES: dict[str, Callable[[Outcome], Tensor]] = {
    "final loss": lambda outcome: outcome.losses,
    "final sharpness": lambda outcome: outcome.sharpness,
}


def claims(results: Results) -> list[Claim]:
    """Return every claim with its difference."""
    return [
        *_reaches_the_minimum(results),
        *_cancels(results),
        *_escapes(results),
        *_escapes_more_with(results),
        *_outcomes(results),
        *_table_2(results),
    ]


def _reaches_the_minimum(results: Results) -> Iterator[Claim]:
    for landscape in dict.fromkeys(name for name, _ in results.distances):
        for other in OTHERS:
            gap = results.distances[landscape, other] - results.distances[landscape, OURS]
            yield Claim(
                "Fig. 1, 3, 13, 14",
                f"{landscape}: {OURS} ends nearer to the global minimum than {other}",
                f"distance at the end, {other} − {OURS}, lr {LEARNING_RATE}",
                mean_interval(gap),
            )


def _cancels(results: Results) -> Iterator[Claim]:
    for lr in BUFFER_RATES:
        yield Claim(
            "Fig. 2, 11",
            f"Ackley, first 10 steps, lr {lr:g}: gradients cancel in the buffer, momenta less",
            "1 − |mean of the slots| / mean |slot|, Adam+CG − Adam+CM",
            mean_interval(results.cancelled["Adam+CG", lr] - results.cancelled[OURS, lr]),
        )


def _escapes(results: Results) -> Iterator[Claim]:
    for dimension in DIMENSIONS:
        for other in OTHERS:
            gap = results.escape[OURS, dimension] - results.escape[other, dimension]
            yield Claim(
                "Fig. 4",
                f"D = {dimension}: {OURS} escapes sharp minima more often than {other}",
                f"share of coordinates at the flat minimum, {OURS} − {other}, mean over sharpness",
                mean_interval(gap.mean(0)),
            )


def _escapes_more_with(results: Results) -> Iterator[Claim]:
    for dimension in DIMENSIONS:
        ours = results.escape[OURS, dimension]
        yield Claim(
            "Fig. 4",
            f"D = {dimension}: {OURS} escapes the more often the sharper the minimum",
            f"share at the flat minimum, s = {SHARPNESS[-1]:g} − s = {SHARPNESS[0]:g}",
            mean_interval(ours[-1] - ours[0]),
        )
    large, small = TABLE_CAPACITIES[-1], CAPACITIES[0]
    gap = results.escape_capacity[OURS, large] - results.escape_capacity[OURS, small]
    yield Claim(
        "Fig. 12",
        f"{OURS} escapes more often with a larger buffer",
        f"share at the flat minimum, C = {large} − C = {small}, D = {DIMENSIONS[0]}",
        mean_interval(gap.mean(0)),
    )


def _outcomes(results: Results) -> Iterator[Claim]:
    for landscape in LANDSCAPES:
        for measure, of in _MEASURES.items():
            for other in OTHERS:
                gap = of(results.best[landscape.name, other]) - of(
                    results.best[landscape.name, OURS]
                )
                yield Claim(
                    "Fig. 5",
                    f"{landscape.name}: {OURS} reaches a lower {measure.split()[-1]} than {other}",
                    f"{measure}, {other} − {OURS}, each at its best rate",
                    mean_interval(gap),
                )


def _table_2(results: Results) -> Iterator[Claim]:
    cells = [(capacity, decay) for capacity in TABLE_CAPACITIES for decay in DECAYS]
    for landscape in LANDSCAPES:
        for measure, of in _MEASURES.items():
            gaps = [
                of(results.grid[(landscape.name, "Adam+CG", *cell)])
                - of(results.grid[(landscape.name, OURS, *cell)])
                for cell in cells
            ]
            yield Claim(
                "Table 2",
                f"{landscape.name}: {OURS} has a lower {measure.split()[-1]} than Adam+CG "
                "whatever C and λ",
                f"{measure}, Adam+CG − {OURS}, mean over C and λ",
                mean_interval(torch.stack(gaps).mean(0)),
            )
