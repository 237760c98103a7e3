"""The priority kernels against a model of the priority buffer written from the specification."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cm_fused._backends import library
from cm_fused._backends.triton.columns import COLUMNS
from tests.support.cases import needs_cpu_backend, needs_triton, skip_if
from tests.support.priority_rows import Rows

# The operator for the CPU, and on a GPU for CUDA: both are csrc/priority/priority.h.
OPERATOR = pytest.param("operator", marks=needs_cpu_backend)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, skip_if(library.cuda_unavailable_reason)])
TRITON = pytest.param("triton", marks=needs_triton)
on_each_kernel = pytest.mark.parametrize("kernel", [OPERATOR, CUDA, TRITON])


# Sums of a few of these are exact, in any order; the last make keys that are not finite.
FINITE = (0.0, 0.25, 1.0, 1.0 + 2**-40, 4.0, 9.0, 2.0**100)
NORMS = (*FINITE, 1e300, float("inf"), float("nan"))


@dataclass
class Model:
    """One tensor's buffer: keys are float32, in the order in which slots were filled."""

    capacity: int
    keys: list[np.float32] = field(default_factory=list)
    step: int = 0
    slot: int = -1
    filled: int = 0

    def update(self, sq_norm: float, priority_decay: float) -> None:
        """Take steps 5 and 6 of the specification."""
        with np.errstate(over="ignore", invalid="ignore"):
            key = np.float32(np.sqrt(np.float64(sq_norm)))
        self.filled = len(self.keys)
        self.slot = -1
        if np.isfinite(key):
            if len(self.keys) < self.capacity:
                self.slot = len(self.keys)
                self.keys.append(key)
            elif key > min(self.keys):
                self.slot = self.keys.index(min(self.keys))
                self.keys[self.slot] = key
        self.keys = [key * np.float32(priority_decay) for key in self.keys]
        self.step += 1

    def priorities(self) -> list[float]:
        """Return the keys as the state has them."""
        unfilled = [-float("inf")] * (self.capacity - len(self.keys))
        return [float(key) for key in self.keys] + unfilled


# The norms of a step's chunks, those it is given instead, and found_inf.
Step = tuple[list[float], float | list[float] | None, float | None]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], list[Step]]:
    """Draw the numbers of chunks of a bucket's tensors, and for each step the norms."""
    num_chunks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    # Mostly few values, so that keys tie.
    values = draw(st.sampled_from([(1.0, 4.0), FINITE, NORMS]))
    norms = st.lists(st.sampled_from(values), min_size=sum(num_chunks), max_size=sum(num_chunks))
    given = st.none() | st.sampled_from(values)
    for_each = st.lists(st.sampled_from(values), min_size=len(num_chunks), max_size=len(num_chunks))
    steps = st.tuples(norms, given | for_each, st.sampled_from([None, 0.0, 1.0]))
    return num_chunks, draw(st.lists(steps, min_size=1, max_size=20))


@on_each_kernel
@settings(deadline=None, max_examples=300)
@given(
    run=runs(),
    capacity=st.integers(1, 8),
    priority_decay=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    group_scope=st.booleans(),
    filled=st.booleans(),
)
def test_rows_follow_the_model(
    run: tuple[list[int], list[Step]],
    capacity: int,
    priority_decay: float,
    group_scope: bool,
    filled: bool,
    kernel: str,
) -> None:
    """Keys, slots, fill and step counts are the specification's after every step, to the bit."""
    num_chunks, steps = run
    rows = Rows(num_chunks, capacity, kernel, filled=filled)
    table = rows.table.clone()
    models = [Model(capacity) for _ in num_chunks]
    for chunk_sq_norms, sq_norm, found_inf in steps:
        before = [t.clone() for t in (rows.priorities, rows.slots, rows.steps, rows.filled)]
        rows.update(
            chunk_sq_norms,
            sq_norm,
            found_inf,
            capacity=capacity,
            priority_decay=priority_decay,
            group_scope=group_scope,
        )
        if found_inf:
            after = (rows.priorities, rows.slots, rows.steps, rows.filled)
            assert all(map(torch.equal, before, after))
            continue
        own = [sum(part) for part in rows.split(chunk_sq_norms)]
        if isinstance(sq_norm, list):
            own = sq_norm
        elif sq_norm is not None:
            own = [sq_norm] * len(models)
        elif group_scope:
            own = [sum(chunk_sq_norms)] * len(models)
        for model, value in zip(models, own, strict=True):
            model.update(value, priority_decay)
        assert rows.priorities.tolist() == [model.priorities() for model in models]
        assert rows.slots.tolist() == [model.slot for model in models]
        assert rows.steps.tolist() == [model.step for model in models]
        assert rows.filled.tolist() == [model.filled if filled else 99 for model in models]
        assert torch.equal(rows.table, table)


@on_each_kernel
@pytest.mark.parametrize("group_scope", [True, False])
def test_no_slots(group_scope: bool, kernel: str) -> None:
    """Without slots only steps are counted, whatever the norms are; skipped ones are not."""
    rows = Rows([1, 0, 3], 0, kernel)
    for found_inf in (None, 0.0, 1.0):
        for sq_norm in (None, 4.0, [1.0, torch.nan, 2.0]):
            options = {"capacity": 0, "priority_decay": 0.5, "group_scope": group_scope}
            rows.update([torch.nan] * 4, sq_norm, found_inf, **options)
    assert rows.steps.tolist() == [6.0] * 3
    assert set(rows.slots.tolist()) == set(rows.filled.tolist()) == {99}


@pytest.mark.parametrize("kernel", [OPERATOR, CUDA])
@pytest.mark.parametrize("group_scope", [True, False])
def test_many_rows(group_scope: bool, kernel: str) -> None:
    """A table of any length is updated in one call, each row by its own norm or the group's."""
    rows = Rows([i % 3 for i in range(21_000)], 2, kernel)
    chunk_sq_norms = [float(i % 7) for i in range(21_000)]
    rows.update(chunk_sq_norms, capacity=2, priority_decay=1.0, group_scope=group_scope)
    norms = [sum(chunk_sq_norms if group_scope else part) for part in rows.split(chunk_sq_norms)]
    expected = torch.tensor(norms, dtype=torch.float64).sqrt().float()
    assert torch.equal(rows.priorities[:, 0].cpu(), expected)
    assert bool((rows.priorities[:, 1] == -torch.inf).all())
    assert bool((rows.slots == 0).all())
    assert bool((rows.steps == 1).all())


@on_each_kernel
def test_no_rows(kernel: str) -> None:
    """An empty bucket is nothing to do."""
    Rows([], 2, kernel).update([], capacity=2, priority_decay=0.7, group_scope=True)


@pytest.mark.parametrize("group_scope", [True, False])
@needs_cpu_backend
def test_opcheck(group_scope: bool) -> None:
    """Schema, autograd registration, fake kernel and functionalization agree with the operator."""
    rows = Rows([1, 2], capacity=2)
    torch.library.opcheck(
        torch.ops.cm_fused.update_priorities_.default,
        (rows.table, torch.ones(3, dtype=torch.float64), None, None),
        {"capacity": 2, "priority_decay": 0.7, "group_scope": group_scope},
    )


def _set(table: Tensor, column: int, value: int) -> Tensor:
    table = table.clone()
    table[1, column] = value
    return table


CHUNKS = r"table\[1\] must name chunks of the 3 in chunk_sq_norms, got"
DOUBLE = "must have dtype Double, got Float"
DECAY = r"priority_decay must be in \[0, 1\], got"
# The argument, what is made of a good one, and what the error says.
BAD_ARGUMENTS: tuple[tuple[str, Callable[[Any], Any], str], ...] = (
    ("table", lambda t: t.int(), "table must have dtype Long, got Int"),
    ("table", lambda t: t[:, :15].clone(), r"table must have shape \(params, 24"),
    ("table", lambda t: t[0], r"table must have shape .*got \(24\)"),
    ("table", lambda t: t.t().contiguous().t(), r"table must be contiguous, .* strides \(1, 2\)"),
    ("table", lambda t: _set(t, COLUMNS["first_chunk"], -1), f"{CHUNKS} 2 from -1"),
    ("table", lambda t: _set(t, COLUMNS["num_chunks"], -1), f"{CHUNKS} -1 from 1"),
    ("table", lambda t: _set(t, COLUMNS["num_chunks"], 3), f"{CHUNKS} 3 from 1"),
    ("table", lambda t: _set(t, COLUMNS["num_chunks"], 2**63 - 1), f"{CHUNKS} .* from 1"),
    *(
        ("table", lambda t, c=column: _set(t, c, 0), rf"table\[1\] .* address in column {column}")
        for column in (COLUMNS["priorities"], COLUMNS["pending_slot"], COLUMNS["step"])
    ),
    ("chunk_sq_norms", lambda t: t.float(), f"chunk_sq_norms {DOUBLE}"),
    ("chunk_sq_norms", lambda t: t[None], r"must have one dimension, got shape \(1, 3\)"),
    ("chunk_sq_norms", lambda t: t.repeat_interleave(2)[::2], "must be contiguous with 3 elements"),
    ("sq_norm", lambda _: torch.ones(()), f"sq_norm {DOUBLE}"),
    ("sq_norm", lambda _: torch.ones(3).double(), r"sq_norm must be contiguous with 2 elements"),
    ("found_inf", lambda _: torch.ones(()), f"found_inf {DOUBLE}"),
    ("capacity", lambda _: -1, "capacity must be >= 0, got -1"),
    *(("priority_decay", lambda _, v=v: v, f"{DECAY} {v}") for v in (-0.1, 1.5, float("nan"))),
)


@needs_cpu_backend
@pytest.mark.parametrize(("argument", "change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_change_nothing(
    argument: str, change: Callable[[Any], Any], message: str
) -> None:
    """An argument that does not fit is a RuntimeError naming it; no row has changed."""
    rows = Rows([1, 2], capacity=2)
    arguments: dict[str, Any] = {
        "table": rows.table,
        "chunk_sq_norms": torch.ones(3, dtype=torch.float64),
        "sq_norm": None,
        "found_inf": None,
        "capacity": 2,
        "priority_decay": 0.7,
        "group_scope": False,
    }
    arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cm_fused.update_priorities_(**arguments)
    assert rows.steps.tolist() == [0.0, 0.0]
    assert bool((rows.priorities == -torch.inf).all())
