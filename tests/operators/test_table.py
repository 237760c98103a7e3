"""`refresh_table_`: the host's copy of a bucket's table follows the tensors."""

import runpy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cm_fused._backends.triton import columns
from cm_fused._backends.triton.columns import COLUMNS, PARAM_DTYPES, WIDTH
from cm_fused._state.table import KEYS as KEYS_OF_STATE
from cm_fused.philox import ShardLayout
from tests.support.cases import needs_cpu_backend
from tests.support.rows import REFUSED, Refused
from tests.support.samples import SAMPLES, Sample, full_sample, sample
from tests.support.training import SHAPES

pytestmark = needs_cpu_backend

UNCHANGED, GRADS_MOVED, CHANGED, NEEDS_COPIES = range(4)
# What a table holds where nobody writes.
UNTOUCHED = 77
KEYS = ("params", "grads", *full_sample().state)


def _columns() -> list[str]:
    names: str = torch.ops.cm_fused.table_columns()
    return names.split(",")


class Table:
    """A sample's state, registered, and its table."""

    def __init__(self, case: Sample) -> None:
        self.case = case
        self.state = case.register()
        self.rows = torch.full((len(case.params), WIDTH), UNTOUCHED)

    def refresh(self) -> int:
        """Call the operator."""
        result: int = torch.ops.cm_fused.refresh_table_(
            self.state.id, self.case.params, self.case.grads, self.rows
        )
        return result

    def column(self, name: str) -> Tensor:
        """Return a column by its name."""
        return self.rows[:, _columns().index(name)]

    def expected(self) -> list[list[int]]:
        """Return the rows as the tensors say them."""
        return [self._row(i, param) for i, param in enumerate(self.case.params)]

    def _row(self, i: int, param: Tensor) -> list[int]:
        layout = self.case.shard_layouts[3 * i : 3 * i + 3] or ShardLayout()
        numbers: dict[str, int] = {
            "param": param.data_ptr(),
            "grad": self.case.grads[i].data_ptr(),
            **{key: 0 for key in full_sample().state},
            **{key: tensors[i].data_ptr() for key, tensors in self.case.state.items()},
            "numel": param.numel(),
            "dtypes": PARAM_DTYPES.index(param.dtype) * (1 + len(PARAM_DTYPES)),
            "param_index": i,
            **dict(zip(("shard_offset", "shard_length", "shard_stride"), layout, strict=True)),
        }
        row = [numbers.get(name, UNTOUCHED) for name in _columns()]
        return row + [UNTOUCHED] * (WIDTH - len(row))


DENSE = [name for name in SAMPLES if "strided" not in name]


@pytest.mark.parametrize("name", DENSE)
def test_columns(name: str) -> None:
    """Every column names its tensor, and the caller's columns are left alone."""
    table = Table(SAMPLES[name]())
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()
    assert table.refresh() == UNCHANGED
    assert table.rows.tolist() == table.expected()


def test_shard_layouts() -> None:
    """A parameter that is part of a larger one says where in it."""
    case = sample()
    case.shard_layouts = list(range(3, 3 + 3 * len(case.params)))
    table = Table(case)
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()


def test_slot_without_pending_slots() -> None:
    """Critical gradients have no pending slot: the caller's address stays."""
    table = Table(sample().without("pending_slot"))
    assert table.refresh() == CHANGED
    slots = table.column("pending_slot")
    assert slots.tolist() == [UNTOUCHED] * len(SHAPES)
    assert table.refresh() == UNCHANGED
    slots[0] = 5
    assert table.refresh() == UNCHANGED
    assert slots[0] == 5


@pytest.mark.parametrize("new", [False, True], ids=["data", "tensor"])
@pytest.mark.parametrize("key", KEYS)
def test_moved_tensors_are_seen(key: str, new: bool) -> None:
    """A tensor that lies elsewhere is a changed table, once."""
    table = Table(full_sample())
    table.refresh()
    before = table.rows.clone()
    tensors = table.case.lists()[key]
    if new and key in ("params", "grads"):
        tensors[0] = tensors[0].clone()
    else:
        tensors[0].data = tensors[0].data.clone()
    assert table.refresh() == (GRADS_MOVED if key == "grads" else CHANGED)
    assert table.rows.tolist() == table.expected()
    assert not torch.equal(table.rows, before)
    assert table.refresh() == UNCHANGED


def test_another_table_is_written() -> None:
    """What is cached of a state does not stand for what a table holds."""
    table = Table(sample())
    table.refresh()
    table.rows = torch.zeros_like(table.rows)
    assert table.refresh() == CHANGED
    table.column("numel")[1] += 1
    assert table.refresh() == CHANGED


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "negated": lambda t: torch._neg_view(t.clone()),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("role", ["params", "grads"])
def test_other_strides_need_copies(role: str, name: str) -> None:
    """A param or grad that lies otherwise than its exp_avg is told, and nothing written."""
    table = Table(sample())
    table.refresh()
    before = table.rows.clone()
    tensors = table.case.lists()[role]
    tensors[0] = STRIDED[name](tensors[0])
    tensors[1] = tensors[1].clone()
    assert table.refresh() == NEEDS_COPIES
    assert torch.equal(table.rows, before)
    tensors[0] = tensors[0].clone(memory_format=torch.contiguous_format).resolve_neg()
    assert table.refresh() == (GRADS_MOVED if role == "grads" else CHANGED)


def test_expanded_gradient_needs_copies() -> None:
    """A gradient of one element in many places lies otherwise too, and implied zeros nowhere."""
    table = Table(sample())
    table.case.grads[0] = torch.ones(()).expand(SHAPES[0])
    assert table.refresh() == NEEDS_COPIES
    table.case.grads[0] = torch._efficientzerotensor(SHAPES[0])
    assert table.refresh() == NEEDS_COPIES


def test_memory_order_of_the_state() -> None:
    """Tensors that are all channels_last lie alike; empty and one-element ones always do."""
    case = sample(shapes=((2, 3, 4, 5), (0, 2), (1, 1)))
    for key in ("params", "grads", "exp_avg", "exp_avg_sq"):
        tensors = case.lists()[key]
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        tensors[1] = tensors[1].t().contiguous().t()
    case.state["critical_buffer"][0] = torch.stack([case.state["exp_avg"][0]] * 3)
    case.params[2] = torch.zeros(1, 7)[:, :1].as_strided((1, 1), (7, 3))
    table = Table(case)
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()


def test_sizes_of_64_bits() -> None:
    """Numbers of elements beyond 32 bits are held whole; tensors may be on any device."""
    numel = 2**33 + 5

    def meta(*shape: int) -> list[Tensor]:
        return [torch.empty(shape, device="meta")]

    state = {key: meta(numel) for key in ("exp_avg", "exp_avg_sq")}
    state |= {"critical_buffer": meta(3, numel), "priorities": meta(3), "step": meta()}
    table = Table(Sample(meta(numel), meta(numel), state))
    assert table.refresh() == CHANGED
    assert table.column("numel").tolist() == [numel]


def test_no_params() -> None:
    """An empty bucket has an empty table."""
    assert Table(sample(shapes=())).refresh() == UNCHANGED


# Checks

# Numbers in device memory are not read: CPU steps alone check them.
BAD_STATES = [bad for bad in REFUSED if "step" in bad.ops and not bad.is_number]


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("bad", BAD_STATES, ids=str)
def test_bad_tensors_leave_the_table(bad: Refused, refreshed: bool) -> None:
    """A tensor that does not fit is the CPU step's error, at every call."""
    table = Table(full_sample())
    if refreshed:
        table.refresh()
    before = table.rows.clone()
    bad.spoil(table.case)
    table.state = table.case.register()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=bad.message):
            table.refresh()
    assert torch.equal(table.rows, before)


BAD_TABLES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "dtype": (lambda t: t.int(), "table must have dtype Long, got Int"),
    "width": (lambda t: t[:, :12], r"table must have shape \(params, 24\), got \(5, 12\)"),
    "rows": (lambda t: t[1:], "table must have one row for each of the 5 params, got 4"),
    "strides": (lambda t: t.t().contiguous().t(), "table must be contiguous, got strides"),
    "device": (lambda t: t.to("meta"), "table must be on cpu, got "),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_table_is_refused(name: str) -> None:
    """A table that is not contiguous int64 (n, 24) on the CPU is an error that says so."""
    change, message = BAD_TABLES[name]
    table = Table(sample())
    table.rows = change(table.rows)
    with pytest.raises(RuntimeError, match=message):
        table.refresh()


def test_columns_must_fit_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state tensor too many is an error at import.

    The older tests compare the two lists of columns and the two widths, never columns with a width:
    a 25th column lay in the next parameter's row.
    """
    more = tuple(f"another_{i}" for i in range(WIDTH - len(COLUMNS) + 1))
    monkeypatch.setattr("cm_fused._state.table.KEYS", (*KEYS_OF_STATE, *more))
    with pytest.raises(RuntimeError, match=rf"room for {WIDTH + 1} columns, got {WIDTH}; raise"):
        runpy.run_path(columns.__file__)


def test_unknown_state_is_refused() -> None:
    """A state that is not registered is an error that shows its id."""
    table = Table(sample())
    torch.ops.cm_fused.release_state(table.state.id)
    with pytest.raises(RuntimeError, match="ids must be of registered states, got"):
        table.refresh()


def test_schema() -> None:
    """The operator changes its table and nothing else."""
    table = Table(sample())
    torch.library.opcheck(
        torch.ops.cm_fused.refresh_table_.default,
        (table.state.id, table.case.params, table.case.grads, table.rows),
        test_utils=("test_schema", "test_autograd_registration"),
    )
