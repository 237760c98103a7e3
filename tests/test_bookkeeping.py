"""`update_priorities_` against a model of the priority buffer written from the specification."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import needs_cpu_backend

pytestmark = needs_cpu_backend

TABLE_WIDTH = 16
PRIORITIES, SLOT, STEP, FIRST_CHUNK, NUM_CHUNKS, FILLED = 7, 8, 9, 11, 12, 13

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


class Rows:
    """The tensors that a table names, in new state."""

    def __init__(self, num_chunks: list[int], capacity: int, *, filled: bool = True) -> None:
        rows = len(num_chunks)
        self.num_chunks = num_chunks
        self.priorities = torch.full((rows, capacity), -torch.inf)
        self.slots = torch.full((rows,), 99)
        self.steps = torch.zeros(rows)
        self.filled = torch.full((rows,), 99)
        self.table = torch.zeros(rows, TABLE_WIDTH, dtype=torch.int64)
        for column, tensor in (
            (PRIORITIES, self.priorities),
            (SLOT, self.slots),
            (STEP, self.steps),
            (FILLED, self.filled),
        ):
            stride = tensor.stride(0) * tensor.element_size()
            self.table[:, column] = tensor.data_ptr() + stride * torch.arange(rows)
        if not filled:
            self.table[:, FILLED] = 0
        chunks = torch.tensor(num_chunks, dtype=torch.int64)
        self.table[:, NUM_CHUNKS] = chunks
        self.table[:, FIRST_CHUNK] = chunks.cumsum(0) - chunks

    def update(
        self, chunk_sq_norms: list[float], sq_norm: float | None = None, **options: Any
    ) -> None:
        """Call the operator."""
        torch.ops.cm_fused.update_priorities_(
            self.table,
            torch.tensor(chunk_sq_norms, dtype=torch.float64),
            None if sq_norm is None else torch.tensor(sq_norm, dtype=torch.float64),
            **options,
        )

    def split(self, chunk_sq_norms: list[float]) -> list[list[float]]:
        """Return each row's part of the chunks."""
        ends = np.cumsum(self.num_chunks)
        return [chunk_sq_norms[end - n : end] for end, n in zip(ends, self.num_chunks, strict=True)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], list[tuple[list[float], float | None]]]:
    """Draw the numbers of chunks of a bucket's tensors, and for each step the norms."""
    num_chunks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    # Mostly few values, so that keys tie.
    values = draw(st.sampled_from([(1.0, 4.0), FINITE, NORMS]))
    norms = st.lists(st.sampled_from(values), min_size=sum(num_chunks), max_size=sum(num_chunks))
    steps = st.tuples(norms, st.none() | st.sampled_from(values))
    return num_chunks, draw(st.lists(steps, min_size=1, max_size=20))


@settings(deadline=None, max_examples=300)
@given(
    run=runs(),
    capacity=st.integers(1, 8),
    priority_decay=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    group_scope=st.booleans(),
    filled=st.booleans(),
)
def test_rows_follow_the_model(
    run: tuple[list[int], list[tuple[list[float], float | None]]],
    capacity: int,
    priority_decay: float,
    group_scope: bool,
    filled: bool,
) -> None:
    """Keys, slots, fill and step counts are the specification's after every step, to the bit."""
    num_chunks, steps = run
    rows = Rows(num_chunks, capacity, filled=filled)
    table = rows.table.clone()
    models = [Model(capacity) for _ in num_chunks]
    for chunk_sq_norms, sq_norm in steps:
        rows.update(
            chunk_sq_norms,
            sq_norm,
            capacity=capacity,
            priority_decay=priority_decay,
            group_scope=group_scope,
        )
        group = sum(chunk_sq_norms) if sq_norm is None else sq_norm
        for model, part in zip(models, rows.split(chunk_sq_norms), strict=True):
            model.update(group if group_scope else sum(part), priority_decay)
        assert rows.priorities.tolist() == [model.priorities() for model in models]
        assert rows.slots.tolist() == [model.slot for model in models]
        assert rows.steps.tolist() == [model.step for model in models]
        assert rows.filled.tolist() == [model.filled if filled else 99 for model in models]
        assert torch.equal(rows.table, table)


@pytest.mark.parametrize("group_scope", [True, False])
def test_many_rows(group_scope: bool) -> None:
    """A table of any length is updated in one call, each row by its own norm or the group's."""
    rows = Rows([i % 3 for i in range(21_000)], capacity=2)
    chunk_sq_norms = [float(i % 7) for i in range(21_000)]
    rows.update(chunk_sq_norms, capacity=2, priority_decay=1.0, group_scope=group_scope)
    norms = [sum(chunk_sq_norms if group_scope else part) for part in rows.split(chunk_sq_norms)]
    expected = torch.tensor(norms, dtype=torch.float64).sqrt().float()
    assert torch.equal(rows.priorities[:, 0], expected)
    assert bool((rows.priorities[:, 1] == -torch.inf).all())
    assert bool((rows.slots == 0).all())
    assert bool((rows.steps == 1).all())


def test_no_rows() -> None:
    """An empty bucket is nothing to do."""
    Rows([], capacity=2).update([], capacity=2, priority_decay=0.7, group_scope=True)


@pytest.mark.parametrize("group_scope", [True, False])
def test_opcheck(group_scope: bool) -> None:
    """Schema, autograd registration, fake kernel and functionalization agree with the operator."""
    rows = Rows([1, 2], capacity=2)
    torch.library.opcheck(
        torch.ops.cm_fused.update_priorities_.default,
        (rows.table, torch.ones(3, dtype=torch.float64), None),
        {"capacity": 2, "priority_decay": 0.7, "group_scope": group_scope},
    )


def _set(table: Tensor, column: int, value: int) -> Tensor:
    table = table.clone()
    table[1, column] = value
    return table


CHUNKS = r"table\[1\] must name chunks of the 3 in chunk_sq_norms, got"
BAD_ARGUMENTS: dict[str, tuple[dict[str, Callable[[Any], Any]], str]] = {
    "table dtype": ({"table": lambda t: t.int()}, "table must have dtype Long, got Int"),
    "table width": ({"table": lambda t: t[:, :15].clone()}, r"table must have shape \(params, 16"),
    "table dimensions": ({"table": lambda t: t[0]}, r"table must have shape .*got \(16\)"),
    "table strides": (
        {"table": lambda t: t.t().contiguous().t()},
        r"table must be contiguous, got strides \(1, 2\)",
    ),
    "first chunk": ({"table": lambda t: _set(t, FIRST_CHUNK, -1)}, f"{CHUNKS} 2 from -1"),
    "number of chunks": ({"table": lambda t: _set(t, NUM_CHUNKS, -1)}, f"{CHUNKS} -1 from 1"),
    "last chunk": ({"table": lambda t: _set(t, NUM_CHUNKS, 3)}, f"{CHUNKS} 3 from 1"),
    "far chunk": ({"table": lambda t: _set(t, NUM_CHUNKS, 2**63 - 1)}, f"{CHUNKS} .* from 1"),
    "norms dtype": (
        {"chunk_sq_norms": lambda t: t.float()},
        "chunk_sq_norms must have dtype Double, got Float",
    ),
    "norms dimensions": (
        {"chunk_sq_norms": lambda t: t[None]},
        r"chunk_sq_norms must have one dimension, got shape \(1, 3\)",
    ),
    "norms strides": (
        {"chunk_sq_norms": lambda t: t.repeat_interleave(2)[::2]},
        r"chunk_sq_norms must be contiguous with 3 elements, .* strides \(2\)",
    ),
    "sq_norm dtype": (
        {"sq_norm": lambda _: torch.ones(())},
        "sq_norm must have dtype Double, got Float",
    ),
    "sq_norm shape": (
        {"sq_norm": lambda _: torch.ones(2, dtype=torch.float64)},
        r"sq_norm must be contiguous with 1 elements, got shape \(2\)",
    ),
    "capacity": ({"capacity": lambda _: 0}, "capacity must be >= 1, got 0"),
    "small decay": ({"priority_decay": lambda _: -0.1}, r"must be in \[0, 1\], got -0.1"),
    "large decay": ({"priority_decay": lambda _: 1.5}, r"must be in \[0, 1\], got 1.5"),
    "nan decay": ({"priority_decay": lambda _: float("nan")}, r"must be in \[0, 1\], got nan"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_change_nothing(name: str) -> None:
    """An argument that does not fit is a RuntimeError naming it; no row has changed."""
    changes, message = BAD_ARGUMENTS[name]
    rows = Rows([1, 2], capacity=2)
    arguments: dict[str, Any] = {
        "table": rows.table,
        "chunk_sq_norms": torch.ones(3, dtype=torch.float64),
        "sq_norm": None,
        "capacity": 2,
        "priority_decay": 0.7,
        "group_scope": False,
    }
    for argument, change in changes.items():
        arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cm_fused.update_priorities_(**arguments)
    assert rows.steps.tolist() == [0.0, 0.0]
    assert bool((rows.priorities == -torch.inf).all())
