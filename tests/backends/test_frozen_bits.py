"""Every option leaves the bits that it left when they were stored; see `tests.support.frozen`."""

from typing import Any

import pytest
import torch

from tests.support.cases import BACKENDS
from tests.support.frozen import (
    CASES,
    PARTS,
    Case,
    Run,
    place_of,
    stored,
    unavailable_reason,
)

STORED = stored()


def _params() -> list[Any]:
    """Return the backends and cases whose bits are known here."""
    params: list[Any] = []
    for backend in BACKENDS:
        place, reason = place_of(backend), unavailable_reason(backend)
        # What torch adds up belongs to its version and to the processor.
        known = backend != "eager" or torch.__version__.split("+")[0] == STORED["torch"]
        if place not in STORED["bits"] or not known:
            continue
        marks = [pytest.mark.skipif(reason is not None, reason=reason or "")]
        # Interpreted, all of them take a minute.
        marks += [pytest.mark.slow] if backend == "triton" else []
        bits = STORED["bits"][place]
        # None: changed on a machine that could not write them, see `unavailable_reason`.
        params += [
            pytest.param(backend, case, id=f"{backend}-{case}", marks=marks)
            for case in CASES
            if bits.get(str(case), "") is not None
        ]
    return params


@pytest.mark.parametrize(("backend", "case"), _params())
def test_frozen_bits(backend: str, case: Case) -> None:
    """Parameters, state and running sums after all steps are bit for bit those stored."""
    expected = STORED["bits"][place_of(backend)][str(case)]
    actual = Run(case, backend).hashes()
    differing = [part for part, a, b in zip(PARTS, actual, expected, strict=True) if a != b]
    assert not differing, f"{backend}, {case}: other bits in {', '.join(differing)}"


def test_every_case_is_stored() -> None:
    """No case is without hashes on any backend, and no hashes without a case."""
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)
    for place, hashes in STORED["bits"].items():
        assert list(hashes) == names, place
