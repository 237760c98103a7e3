"""`refresh_table_`: the host's copy of a bucket's table follows the tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused._bucket import Bucket
from cm_fused.philox import Places
from tests.operators.test_ops import BAD_LISTS, SAMPLES, BadLists, Sample, sample
from tests.support.cases import needs_cpu_backend
from tests.support.training import SHAPES

pytestmark = needs_cpu_backend

UNCHANGED, CHANGED, NEEDS_COPIES = 0, 1, 2
TABLE_WIDTH = 24
# The lists in the order of the columns of addresses.
COLUMNS = (
    "params",
    "grads",
    "exp_avgs",
    "exp_avg_sqs",
    "max_exp_avg_sqs",
    "critical_buffers",
    "critical_sums",
    "compensations",
    "critical_scales",
    "exp_avg_scales",
    "exp_avg_sq_scales",
    "priorities",
    "pending_slots",
    "steps",
)
SLOT, NUMEL = COLUMNS.index("pending_slots"), len(COLUMNS)
PARAM_DTYPE = NUMEL + 1
PLACES = NUMEL + 3
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What a table holds where nobody writes.
UNTOUCHED = 77


def _bucket(case: Sample) -> Bucket:
    return Bucket(**case.lists(), element_places=list(case.element_places))


class Table:
    """A sample's state, held, and its table."""

    def __init__(self, case: Sample) -> None:
        self.case = case
        self.held: int = torch.ops.cm_fused.hold_state(*_bucket(case).state())
        self.rows = torch.full((len(case.params), TABLE_WIDTH), UNTOUCHED)

    def refresh(self) -> int:
        """Call the operator."""
        result: int = torch.ops.cm_fused.refresh_table_(
            self.held, self.case.params, self.case.grads, self.rows
        )
        return result

    def expected(self) -> list[list[int]]:
        """Return the rows as the tensors say them."""
        lists = [self.case.lists()[role] for role in COLUMNS]
        return [
            [
                *(tensors[i].data_ptr() if tensors else 0 for tensors in lists),
                param.numel(),
                DTYPES.index(param.dtype),
                i,
                *(self.case.element_places[3 * i : 3 * i + 3] or Places()),
                *[UNTOUCHED] * (TABLE_WIDTH - PLACES - len(Places())),
            ]
            for i, param in enumerate(self.case.params)
        ]


def _sample_with(role: str) -> Sample:
    """Return a sample whose list of this role is not empty."""
    if role == "compensations":
        return SAMPLES["float8"]()
    if role.endswith("scales"):
        return SAMPLES["int8"]()
    return sample(amsgrad=True, running_sum=True)


DENSE = [name for name in SAMPLES if "strided" not in name]


@pytest.mark.parametrize("name", DENSE)
def test_columns(name: str) -> None:
    """Every column names its tensor, and the caller's columns are left alone."""
    table = Table(SAMPLES[name]())
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()
    assert table.refresh() == UNCHANGED
    assert table.rows.tolist() == table.expected()


def test_places() -> None:
    """A parameter that is part of a larger one says where in it."""
    case = sample()
    case.element_places = tuple(range(3, 3 + 3 * len(case.params)))
    table = Table(case)
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()


def test_slot_without_pending_slots() -> None:
    """Critical gradients have no pending slot: the caller's address stays."""
    case = sample()
    case.pending_slots = []
    table = Table(case)
    assert table.refresh() == CHANGED
    assert table.rows[:, SLOT].tolist() == [UNTOUCHED] * len(SHAPES)
    assert table.refresh() == UNCHANGED
    table.rows[0, SLOT] = 5
    assert table.refresh() == UNCHANGED
    assert table.rows[0, SLOT] == 5


def _new_grad(case: Sample) -> None:
    case.grads[2:] = [grad.clone() for grad in case.grads[2:]]


def _new_data(case: Sample) -> None:
    case.params[0].data = case.params[0].data.clone()


def _move(role: str) -> Callable[[Sample], None]:
    def move(case: Sample) -> None:
        tensors = case.lists()[role]
        tensors[0].data = tensors[0].data.clone()

    return move


@pytest.mark.parametrize(
    ("change", "role"),
    [(_new_grad, ""), (_new_data, ""), *((_move(role), role) for role in COLUMNS)],
    ids=["new_grad", "new_data", *COLUMNS],
)
def test_moved_tensors_are_seen(change: Callable[[Sample], None], role: str) -> None:
    """A tensor that lies elsewhere is a changed table, once."""
    table = Table(_sample_with(role) if role else sample(amsgrad=True, running_sum=True))
    table.refresh()
    before = table.rows.clone()
    change(table.case)
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()
    assert not torch.equal(table.rows, before)
    assert table.refresh() == UNCHANGED


def test_another_table_is_written() -> None:
    """What a state knows of its tensors does not stand for what a table holds."""
    table = Table(sample())
    table.refresh()
    table.rows = torch.zeros_like(table.rows)
    assert table.refresh() == CHANGED
    table.rows[1, NUMEL] += 1
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
    assert table.refresh() == CHANGED


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
    state = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    for role in state:
        tensors = case.lists()[role]
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        tensors[1] = tensors[1].t().contiguous().t()
    case.critical_buffers[0] = torch.stack([case.exp_avgs[0]] * 3)
    case.params[2] = torch.zeros(1, 7)[:, :1].as_strided((1, 1), (7, 3))
    table = Table(case)
    assert table.refresh() == CHANGED
    assert table.rows.tolist() == table.expected()


def test_sizes_of_64_bits() -> None:
    """Numbers of elements beyond 32 bits are held whole; tensors on any device are described."""
    numel = 2**33 + 5
    meta: dict[str, Any] = {"device": "meta"}
    case = Sample(
        params=[torch.empty(numel, **meta)],
        grads=[torch.empty(numel, **meta)],
        exp_avgs=[torch.empty(numel, **meta)],
        exp_avg_sqs=[torch.empty(numel, **meta)],
        max_exp_avg_sqs=[],
        critical_buffers=[torch.empty(3, numel, **meta)],
        critical_sums=[],
        priorities=[torch.empty(3, **meta)],
        pending_slots=[torch.empty((), dtype=torch.int64, **meta)],
        steps=[torch.empty((), **meta)],
    )
    table = Table(case)
    assert table.refresh() == CHANGED
    assert table.rows[0, NUMEL] == numel


def test_no_params() -> None:
    """An empty bucket has an empty table."""
    assert Table(sample(shapes=())).refresh() == UNCHANGED


# Checks

# Of what lies in device memory, which is not read: CPU steps alone check it.
READ = (
    *("pending_slot_", "step_", "dtype_sq_norm", "shape_sq_norm", "shape_local_sq_norms"),
    *("dtype_lr_tensor", "dtype_grad_factor", "dtype_found_inf"),
)
BAD_STATES = [bad for bad in BAD_LISTS if "adam_cm_" in bad.ops and not bad.name.startswith(READ)]


@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.parametrize("bad", BAD_STATES, ids=str)
def test_bad_lists_leave_the_table(bad: BadLists, refreshed: bool) -> None:
    """A list that does not fit is the CPU step's error, at every call; the table is unchanged."""
    case = sample(amsgrad=True, running_sum=True)
    table = Table(case)
    if refreshed:
        table.refresh()
    before = table.rows.clone()
    bad.spoil(case)
    table.held = torch.ops.cm_fused.hold_state(*Bucket(**case.lists()).state())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=bad.message):
            table.refresh()
    assert torch.equal(table.rows, before)


@pytest.mark.parametrize("role", [role for role in COLUMNS if role != "params"])
def test_other_device_is_refused(role: str) -> None:
    """Every tensor must be where its parameter is."""
    case = _sample_with(role)
    tensors = case.lists()[role]
    tensors[1] = tensors[1].to("meta")
    with pytest.raises(RuntimeError, match=rf"{role}\[1\] must be on cpu, got "):
        Table(case).refresh()


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


def test_unknown_state_is_refused() -> None:
    """A state that is not held is an error that shows its id."""
    table = Table(sample())
    torch.ops.cm_fused.release_state(table.held)
    with pytest.raises(RuntimeError, match="held must name a state that is held, got"):
        table.refresh()


def test_schema() -> None:
    """The operator changes its table and nothing else."""
    table = Table(sample())
    torch.library.opcheck(
        torch.ops.cm_fused.refresh_table_.default,
        (table.held, table.case.params, table.case.grads, table.rows),
        test_utils=("test_schema", "test_autograd_registration"),
    )
