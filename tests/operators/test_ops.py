"""The operators of the C++ library, called as they are: schemas, fakes, checks of every list."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cm_fused import rounding
from cm_fused._backends import cpu
from cm_fused._bucket import Bucket
from tests.support.training import SHAPES, assert_same

HYPERPARAMETERS: dict[str, Any] = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "priority_decay": 0.7,
    "group_scope": True,
    "mean_over_capacity": True,
    "eps_inside_sqrt": True,
    "maximize": False,
    "decoupled_weight_decay": False,
    "stochastic_update": False,
    "l2_in_aggregate": False,
    "sum_of_norms": False,
    "seed": 0,
}


@dataclass
class Sample:
    """The lists of one call, in the order of the schema."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    critical_buffers: list[Tensor]
    critical_sums: list[Tensor]
    priorities: list[Tensor]
    pending_slots: list[Tensor]
    steps: list[Tensor]
    critical_scales: list[Tensor] = field(default_factory=list)
    exp_avg_scales: list[Tensor] = field(default_factory=list)
    exp_avg_sq_scales: list[Tensor] = field(default_factory=list)
    compensations: list[Tensor] = field(default_factory=list)
    sq_norm: Tensor | None = None
    lr_tensor: Tensor | None = None
    grad_factor: Tensor | None = None
    found_inf: Tensor | None = None
    local_sq_norms: Tensor | None = None
    element_places: tuple[int, ...] = ()
    hyperparameters: dict[str, Any] = field(default_factory=lambda: dict(HYPERPARAMETERS))

    def lists(self) -> dict[str, Any]:
        """All lists of tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, list)}

    def arguments(self, op: str) -> tuple[Any, ...]:
        """The positional arguments of an operator."""
        if op == "commit_":
            return (
                *(self.exp_avgs, self.critical_buffers, self.critical_sums, self.pending_slots),
                *(self.critical_scales, self.exp_avg_scales),
            )
        if op == "sq_norms":
            return self.params, self.grads, self.grad_factor
        if op == "keep_books_":
            sq_norm = torch.tensor(4.0).double() if self.sq_norm is None else self.sq_norm
            return self.priorities, self.pending_slots, self.steps, sq_norm, self.found_inf
        lists = self.lists()
        if op == "adam_cg_":
            del lists["pending_slots"]
        scalars = self.scalars()
        if op == "adam_cm_":
            scalars = (*scalars, self.local_sq_norms)
        return (*lists.values(), list(range(len(self.params))), self.element_places, *scalars)

    def scalars(self) -> tuple[Tensor | None, ...]:
        """The scalars that come in tensors."""
        return self.sq_norm, self.lr_tensor, self.grad_factor, self.found_inf

    def keywords(self, op: str) -> dict[str, Any]:
        """The keyword arguments of an operator."""
        if op == "commit_":
            return {}
        if op == "keep_books_":
            return {"priority_decay": self.hyperparameters["priority_decay"]}
        if op == "sq_norms":
            names = ("weight_decay", "maximize", "decoupled_weight_decay")
            return {name: self.hyperparameters[name] for name in names}
        return self.hyperparameters

    def call(self, op: str) -> Any:
        """Call `torch.ops.cm_fused.<op>`."""
        return getattr(torch.ops.cm_fused, op)(*self.arguments(op), **self.keywords(op))


def sample(
    dtype: torch.dtype = torch.float32,
    *,
    capacity: int = 3,
    amsgrad: bool = False,
    running_sum: bool = False,
    strided: bool = False,
    given_sq_norm: bool = False,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> Sample:
    """Return arguments in the middle of training: two slots filled, one of them yet to commit."""
    generator = torch.Generator().manual_seed(0)
    state_dtype = torch.float64 if dtype is torch.float64 else torch.float32

    def noise(*shape: int, of: torch.dtype = state_dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(of)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0] if strided else tensor

    buffers = [noise(capacity, *shape) for shape in shapes]
    for buffer in buffers:
        buffer[2:] = 0
    keys = [1.0, 0.5, *[-torch.inf] * capacity][:capacity]
    return Sample(
        params=[spread(noise(*shape, of=dtype)) for shape in shapes],
        grads=[spread(noise(*shape, of=dtype)) for shape in shapes],
        exp_avgs=[noise(*shape) for shape in shapes],
        exp_avg_sqs=[noise(*shape).square() for shape in shapes],
        max_exp_avg_sqs=[noise(*shape).square() for shape in shapes] if amsgrad else [],
        critical_buffers=buffers,
        critical_sums=[buffer.sum(0) for buffer in buffers] if running_sum else [],
        priorities=[torch.tensor(keys) for _ in shapes],
        pending_slots=[torch.tensor(min(1, capacity - 1)) for _ in shapes],
        steps=[torch.tensor(2.0) for _ in shapes],
        sq_norm=torch.tensor(4.0, dtype=torch.float64) if given_sq_norm else None,
    )


def rounded_sample(
    dtype: torch.dtype, buffer_dtype: torch.dtype, moment_dtype: torch.dtype
) -> Sample:
    """Return arguments with state of low precision; a half parameter has a compensation."""
    wide = sample(dtype, capacity=5)
    half = dtype in (torch.bfloat16, torch.float16)
    flat = [rounding.as_flat(buffer, leading=1) for buffer in wide.critical_buffers]
    slots = [rounding.quantize(values, buffer_dtype) for values in flat]
    rounded = replace(
        wide,
        critical_buffers=[
            stored.contiguous().view_as(buffer)
            for (stored, _), buffer in zip(slots, wide.critical_buffers, strict=True)
        ],
        critical_scales=[scales for _, scales in slots if scales is not None],
        compensations=[torch.zeros_like(param) for param in wide.params] if half else [],
    )
    for name, signed in (("exp_avgs", True), ("exp_avg_sqs", False)):
        moments = getattr(wide, name)
        if moment_dtype is not torch.int8:
            setattr(rounded, name, [moment.to(moment_dtype) for moment in moments])
            continue
        codes = [
            rounding.quantize_moment(rounding.as_flat(moment), None, signed=signed)
            for moment in moments
        ]
        shaped = [
            code.contiguous().view_as(moment)
            for (code, _), moment in zip(codes, moments, strict=True)
        ]
        setattr(rounded, name, shaped)
        setattr(rounded, name.removesuffix("s") + "_scales", [scales for _, scales in codes])
    return rounded


SAMPLES: dict[str, Callable[[], Sample]] = {
    "plain": sample,
    "amsgrad": lambda: sample(amsgrad=True),
    "running_sum": lambda: sample(capacity=5, running_sum=True),
    "everything": lambda: sample(amsgrad=True, capacity=5, running_sum=True, given_sq_norm=True),
    "one_slot": lambda: sample(capacity=1),
    "float64": lambda: sample(torch.float64, amsgrad=True),
    "bfloat16": lambda: sample(torch.bfloat16, capacity=5, running_sum=True),
    "float16": lambda: sample(torch.float16),
    "strided": lambda: sample(strided=True),
    "strided_bfloat16": lambda: sample(torch.bfloat16, strided=True),
    "int8": lambda: rounded_sample(torch.float32, torch.int8, torch.int8),
    "float8": lambda: rounded_sample(torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16),
    "empty": lambda: sample(shapes=((0,), (0, 3))),
}
STEPS = ("adam_cm_", "adam_cg_")
OPS = (*STEPS, "sq_norms", "keep_books_", "commit_")

of_each_op = pytest.mark.parametrize("op", OPS)
of_each_step = pytest.mark.parametrize("op", STEPS)


# Schemas and fakes


# Tracing takes a second each: not every sample.
@pytest.mark.parametrize("name", ["plain", "everything", "float64", "strided_bfloat16", "empty"])
@of_each_op
def test_opcheck(op: str, name: str) -> None:
    """Schema, autograd registration, fake kernel and functionalization agree with the kernel."""
    case = SAMPLES[name]()
    overload = getattr(torch.ops.cm_fused, op).default
    torch.library.opcheck(overload, case.arguments(op), case.keywords(op))


@of_each_step
def test_opcheck_with_places(op: str) -> None:
    """So it is where parameters are parts of larger ones."""
    case = rounded_sample(torch.float32, torch.int8, torch.bfloat16)
    case.element_places = (6, 1, 1) * len(case.params)
    overload = getattr(torch.ops.cm_fused, op).default
    torch.library.opcheck(overload, case.arguments(op), case.keywords(op))


@pytest.mark.parametrize("name", SAMPLES)
@of_each_op
def test_fake_call(op: str, name: str) -> None:
    """Under FakeTensorMode an operator computes nothing and its result has the right form."""
    with FakeTensorMode():
        case = SAMPLES[name]()
        result = case.call(op)
    if op == "sq_norms":
        form = (result.shape, result.dtype, result.device.type)
        assert form == ((len(case.params),), torch.float64, "cpu")
    else:
        assert result is None


@pytest.mark.parametrize("name", SAMPLES)
@of_each_step
def test_steps_write_what_they_declare(op: str, name: str) -> None:
    """A step changes each list its schema marks, and gradients and the given norm never."""
    case, before = SAMPLES[name](), SAMPLES[name]()
    case.call(op)
    assert_same(case.grads, before.grads)
    assert_same(case.sq_norm, before.sq_norm)
    for role in ("params", "exp_avgs", "exp_avg_sqs", "priorities", "steps"):
        for mine, theirs in zip(case.lists()[role], before.lists()[role], strict=True):
            # A single rounded value may well stay what it is.
            few = mine.numel() < 3 and mine.itemsize < 4 and role.startswith("exp_avg")
            assert mine.numel() == 0 or few or not torch.equal(mine, theirs), role
    if op == "adam_cg_":
        assert_same(case.pending_slots, before.pending_slots)


# Scalars that come in tensors


def _float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@of_each_step
def test_learning_rate_in_a_tensor(op: str) -> None:
    """lr_tensor is lr, to the bit."""
    case, twin = sample(capacity=5), sample(capacity=5)
    case.lr_tensor = _float64(twin.hyperparameters["lr"])
    case.hyperparameters["lr"] = -1.0
    case.call(op)
    twin.call(op)
    assert_same(case.lists(), twin.lists())


@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@of_each_step
def test_gradients_are_multiplied_first(
    op: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """grad_factor gives the bits of gradients that were multiplied before, in the norm too."""
    case, twin = sample(dtype), sample(dtype)
    for each in (case, twin):
        each.hyperparameters.update(options)
    case.grad_factor = _float64(0.3)
    twin.grads = [grad * torch.tensor(0.3, dtype=dtype) for grad in twin.grads]
    before = [grad.clone() for grad in case.grads]
    assert torch.equal(case.call("sq_norms"), twin.call("sq_norms"))
    for each in (case, twin):
        each.call(op)
    assert_same(case.grads, before)
    case.grads = twin.grads
    assert_same(case.lists(), twin.lists())


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("op", ["adam_cm_", "adam_cg_", "keep_books_"])
def test_found_inf_changes_nothing(op: str, name: str) -> None:
    """Where found_inf is not 0 no bit changes; 0 is as if it were not given."""
    case, before, twin = SAMPLES[name](), SAMPLES[name](), SAMPLES[name]()
    case.found_inf = _float64(1.0)
    case.call(op)
    assert_same(case.lists(), before.lists())
    case.found_inf = _float64(0.0)
    case.call(op)
    twin.call(op)
    assert_same(case.lists(), twin.lists())


@pytest.mark.parametrize("group_scope", [False, True])
def test_books_that_are_kept_later(group_scope: bool) -> None:
    """The pass with local_sq_norms and then keep_books_ are the whole step, to the bit."""
    case, twin = sample(capacity=3), sample(capacity=3)
    for each in (case, twin):
        each.hyperparameters["group_scope"] = group_scope
    for _ in range(6):
        before = [t.clone() for t in (*case.priorities, *case.steps, *case.pending_slots)]
        case.local_sq_norms = torch.zeros(len(SHAPES), dtype=torch.float64)
        case.call("adam_cm_")
        assert_same(before, [*case.priorities, *case.steps, *case.pending_slots][: len(before)])
        assert torch.equal(case.local_sq_norms, twin.call("sq_norms"))
        case.sq_norm = case.local_sq_norms.sum() if group_scope else case.local_sq_norms
        case.call("keep_books_")
        case.sq_norm = None
        twin.call("adam_cm_")
        assert_same(case.lists(), twin.lists())


@of_each_step
def test_norm_of_each_tensor_is_taken(op: str) -> None:
    """sq_norm may have one sum for each tensor, whatever the scope."""
    case, twin = sample(), sample()
    twin.hyperparameters["group_scope"] = False
    case.sq_norm = case.call("sq_norms")
    for each in (case, twin):
        each.call(op)
    assert_same(case.lists(), twin.lists())


@of_each_step
def test_sum_of_norms(op: str) -> None:
    """A group's key is the sum of its tensors' norms; each key over its tensor is what it was."""
    case, twin = sample(), sample()
    case.hyperparameters["sum_of_norms"] = True
    twin.sq_norm = twin.call("sq_norms").sqrt().sum().square()
    for each in (case, twin):
        each.call(op)
    assert_same(case.lists(), twin.lists())
    case, twin = sample(), sample()
    for each in (case, twin):
        each.hyperparameters["group_scope"] = False
    case.hyperparameters["sum_of_norms"] = True
    for each in (case, twin):
        each.call(op)
    assert_same(case.lists(), twin.lists())


# What they compute beyond the steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda g: g.clone(),
        lambda g: g.t().contiguous().t(),
        lambda g: torch.stack([g, g], -1)[..., 0],
        lambda g: g[:, :1].expand(g.shape),
        lambda g: g[0, 0].expand(g.shape),
        lambda g: torch.cat([g, g])[::2],
        lambda g: torch._neg_view(g.clone()),
    ],
    ids=["contiguous", "transposed", "strided", "rows", "expanded", "every_other", "negated"],
)
def test_sq_norms_of_any_strides(
    view: Callable[[Tensor], Tensor], l2: bool, dtype: torch.dtype
) -> None:
    """sq_norms adds the squares of the values, however the gradient lies in memory."""
    generator = torch.Generator().manual_seed(0)
    param, noise = (torch.randn(70, 3, generator=generator).to(dtype) for _ in range(2))
    grad = view(noise)
    result = torch.ops.cm_fused.sq_norms(
        [param], [grad], None, weight_decay=0.5, maximize=False, decoupled_weight_decay=not l2
    )
    g = grad.double() + (0.5 * param.double() if l2 else 0)
    torch.testing.assert_close(result, g.square().sum()[None], rtol=1e-5, atol=0)


def test_sq_norms_of_several_tensors() -> None:
    """sq_norms has each tensor's, the empty one's and those of several chunks included."""
    grads = [torch.full((numel,), 0.5) for numel in (0, 1, 63, 64, 65, 16383, 16384, 16385, 50000)]
    result = torch.ops.cm_fused.sq_norms(
        grads, grads, None, weight_decay=0.0, maximize=False, decoupled_weight_decay=False
    )
    assert result.tolist() == [0.25 * grad.numel() for grad in grads]


@pytest.mark.parametrize("running_sum", [False, True])
def test_commit(running_sum: bool) -> None:
    """commit_ puts each momentum in its pending slot, once, and the running sum follows."""
    case, before = (sample(running_sum=running_sum) for _ in range(2))
    for slot, pending in enumerate(case.pending_slots):
        pending.fill_(slot % 4 - 1)
    for _ in range(2):
        case.call("commit_")
        for i, buffer in enumerate(before.critical_buffers):
            if (slot := i % 4 - 1) >= 0:
                buffer[slot] = case.exp_avgs[i]
            if running_sum:
                torch.testing.assert_close(case.critical_sums[i], buffer.sum(0))
        assert_same(case.critical_buffers, before.critical_buffers)
        assert_same(case.exp_avgs, before.exp_avgs)
        assert [pending.item() for pending in case.pending_slots] == [-1] * len(SHAPES)


@of_each_step
def test_empty_tensors_take_part(op: str) -> None:
    """A step of empty tensors alone counts and admits a norm of 0."""
    case = sample(shapes=((0,), (0, 3)))
    case.call(op)
    assert [step.item() for step in case.steps] == [3.0, 3.0]
    for keys in case.priorities:
        torch.testing.assert_close(keys, torch.tensor([0.7, 0.35, 0.0]))


# Checks


@dataclass(frozen=True)
class BadLists:
    """A call that must be refused.

    Attributes:
        name: Of the test.
        spoil: Makes a good sample bad.
        message: What the error says.
        ops: The operators it is bad for.
    """

    name: str
    spoil: Callable[[Sample], object]
    message: str
    ops: tuple[str, ...] = STEPS

    def __str__(self) -> str:
        return self.name


# The last parameter, so that everything before it could have been changed.
LAST = len(SHAPES) - 1
CPU_LISTS = (
    "grads",
    "exp_avgs",
    "exp_avg_sqs",
    "max_exp_avg_sqs",
    "critical_buffers",
    "critical_sums",
    "priorities",
    "steps",
)


def _ops_with(role: str) -> tuple[str, ...]:
    if role == "grads":
        return (*STEPS, "sq_norms")
    if role in ("critical_buffers", "critical_sums"):
        return (*STEPS, "commit_")
    return ("adam_cm_", "commit_") if role == "pending_slots" else STEPS


def _set(role: str, change: Callable[[Tensor], Tensor]) -> Callable[[Sample], None]:
    def spoil(case: Sample) -> None:
        tensors = case.lists()[role]
        tensors[LAST] = change(tensors[LAST])

    return spoil


def _pop(role: str) -> Callable[[Sample], object]:
    return lambda case: case.lists()[role].pop()


def _append(role: str) -> Callable[[Sample], object]:
    return lambda case: case.lists()[role].append(torch.zeros(5))


def _fill(role: str, value: float) -> Callable[[Sample], object]:
    return lambda case: case.lists()[role][LAST].fill_(value)


def _give_sq_norm(sq_norm: Tensor) -> Callable[[Sample], None]:
    def spoil(case: Sample) -> None:
        case.sq_norm = sq_norm

    return spoil


_SHAPED = ("grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "critical_sums")
_MINE = rf"\[{LAST}\] must "

BAD_LISTS = [
    *(
        BadLists(
            f"{change.__name__}_{role}", change(role), f"{role} must have one", _ops_with(role)
        )
        for role in (*CPU_LISTS, "pending_slots")
        for change in (_pop, _append)
    ),
    *(
        BadLists(
            f"dtype_{role}",
            _set(role, lambda t: t.to(torch.int16)),
            rf"{role}{_MINE}have dtype .*got Short",
            _ops_with(role),
        )
        for role in (*CPU_LISTS, "pending_slots")
    ),
    *(
        BadLists(
            f"shape_{role}",
            _set(role, lambda t: torch.cat([t, t])),
            rf"{role}{_MINE}have shape \(5\), got \(10\)",
            _ops_with(role),
        )
        for role in _SHAPED
    ),
    *(
        BadLists(
            f"dim_{role}",
            _set(role, lambda t: t.unsqueeze(0)),
            rf"{role}{_MINE}have shape \(5\), got \(1, 5\)",
            _ops_with(role),
        )
        for role in _SHAPED
    ),
    *(
        BadLists(
            f"strides_{role}",
            _set(role, lambda t: torch.stack([t, t], -1)[..., 0]),
            rf"{role}{_MINE}have the strides \(1\) of exp_avgs\[{LAST}\], got \(2\)",
            _ops_with(role),
        )
        for role in ("exp_avg_sqs", "max_exp_avg_sqs", "critical_sums")
    ),
    BadLists(
        "strides_exp_avgs",
        _set("exp_avgs", lambda t: torch.stack([t, t], -1)[..., 0]),
        rf"exp_avgs{_MINE}fill its memory without gaps",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "overlap_exp_avgs",
        _set("exp_avgs", lambda t: t[:1].expand(5)),
        rf"exp_avgs{_MINE}fill its memory without gaps",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "shape_critical_buffers",
        _set("critical_buffers", lambda t: torch.cat([t, t], 1)),
        rf"critical_buffers{_MINE}have shape \(capacity, \*\(5\)\), got \(3, 10\)",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "no_slots_critical_buffers",
        _set("critical_buffers", lambda t: t[:0]),
        rf"critical_buffers{_MINE}have shape \(capacity, .*got \(0, 5\)",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "dim_critical_buffers",
        _set("critical_buffers", lambda t: t[0]),
        rf"critical_buffers{_MINE}have shape \(capacity, .*got \(5\)",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "strides_critical_buffers",
        _set("critical_buffers", lambda t: torch.stack([t, t], -1)[..., 0]),
        rf"critical_buffers{_MINE}have the strides \(1\).*got \(2\)",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "gaps_critical_buffers",
        _set("critical_buffers", lambda t: torch.cat([t, t], 1)[:, :5]),
        rf"critical_buffers{_MINE}hold its slots one after the other, 5 .*got 10",
        (*STEPS, "commit_"),
    ),
    BadLists(
        "numel_priorities",
        _set("priorities", lambda t: torch.cat([t, t])),
        rf"priorities{_MINE}be contiguous with 3 elements, got shape \(6\)",
    ),
    BadLists(
        "strides_priorities",
        _set("priorities", lambda t: torch.stack([t, t], -1)[..., 0]),
        rf"priorities{_MINE}be contiguous with 3 elements, .* strides \(2\)",
    ),
    BadLists("numel_steps", _set("steps", lambda t: t.repeat(2)), rf"steps{_MINE}.*1 elements"),
    BadLists(
        "numel_pending_slots",
        _set("pending_slots", lambda t: t.repeat(2)),
        rf"pending_slots{_MINE}.*1 elements",
        ("adam_cm_", "commit_"),
    ),
    *(
        BadLists(
            f"pending_slot_{slot}",
            _fill("pending_slots", slot),
            rf"pending_slots{_MINE}be in \[-1, 3\), got {slot}",
            ("adam_cm_", "commit_"),
        )
        for slot in (-2, 3, 2**40, -(2**40))
    ),
    *(
        BadLists(
            f"step_{step}", _fill("steps", step), rf"steps{_MINE}be finite and >= 0, got {got}"
        )
        for step, got in ((float("nan"), "nan"), (float("inf"), "inf"), (-1.0, "-1"))
    ),
    *(
        BadLists(
            f"dtype_params_{dtype}",
            lambda case, dtype=dtype: [  # type: ignore[misc]
                _set(role, lambda t: t.to(dtype))(case) for role in ("params", "grads")
            ],
            rf"params{_MINE}be float32, float64, bfloat16 or float16, got {name}",
            (*STEPS, "sq_norms"),
        )
        for dtype, name in ((torch.int64, "Long"), (torch.complex64, "ComplexFloat"))
    ),
    BadLists(
        "expanded_params",
        _set("params", lambda t: t[:1].expand(5)),
        rf"params{_MINE}not hold two elements in one place .*\(5\) and strides \(0\)",
    ),
    BadLists(
        "overlapping_params",
        _set("params", lambda t: t.expand(5, 5).flatten().as_strided((5,), (0,))),
        rf"params{_MINE}not hold two elements in one place",
    ),
    *(
        BadLists(
            f"dtype_{name}",
            lambda case, name=name: setattr(case, name, torch.tensor(1.0)),  # type: ignore[misc]
            f"{name}.* must have dtype Double",
        )
        for name in ("lr_tensor", "grad_factor", "found_inf")
    ),
    BadLists(
        "shape_local_sq_norms",
        lambda case: setattr(case, "local_sq_norms", torch.zeros(1, dtype=torch.float64)),
        "local_sq_norms.* must be contiguous with",
        ("adam_cm_",),
    ),
    BadLists("dtype_sq_norm", _give_sq_norm(torch.tensor(1.0)), "sq_norm.* must have dtype Double"),
    BadLists(
        "shape_sq_norm",
        _give_sq_norm(torch.ones(2, dtype=torch.float64)),
        rf"sq_norm.* must be contiguous with {len(SHAPES)} elements",
    ),
]


@pytest.mark.parametrize(
    ("op", "bad"),
    [pytest.param(op, bad, id=f"{op}-{bad}") for bad in BAD_LISTS for op in bad.ops],
)
def test_bad_lists_change_nothing(op: str, bad: BadLists) -> None:
    """A list that does not fit is a RuntimeError naming it and the index; no bit has changed."""
    case = sample(amsgrad=True, running_sum=True)
    bad.spoil(case)
    before = {role: [t.clone() for t in tensors] for role, tensors in case.lists().items()}
    with pytest.raises(RuntimeError, match=bad.message):
        case.call(op)
    assert_same(case.lists(), before)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ((0, 1), "element_places must have three numbers for each of the"),
        ((-1, 1, 1), rf"params\[{LAST}\] must be an offset >= 0.*got \(-1, 1, 1\)"),
        ((0, 0, 1), r"a length >= 1.*got \(0, 0, 1\)"),
        ((0, 3, 2), r"a stride >= that, got \(0, 3, 2\)"),
    ],
)
@of_each_step
def test_bad_places_change_nothing(op: str, last: tuple[int, ...], message: str) -> None:
    """Places that no part of a parameter has are refused, and no bit has changed."""
    case = sample()
    case.element_places = (0, 1, 1) * LAST + last
    before = {role: [t.clone() for t in tensors] for role, tensors in case.lists().items()}
    with pytest.raises(RuntimeError, match=message):
        case.call(op)
    assert_same(case.lists(), before)


@of_each_op
def test_sparse_gradient_is_refused(op: str) -> None:
    """A sparse tensor in a list never reaches a kernel."""
    case = sample()
    role = {"commit_": "exp_avgs", "keep_books_": "priorities"}.get(op, "grads")
    tensors = case.lists()[role]
    tensors[LAST] = tensors[LAST].to_sparse()
    others = {name: list for name, list in case.lists().items() if name != role}
    before = {name: [t.clone() for t in tensors] for name, tensors in others.items()}
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)sparse"):
        case.call(op)
    assert_same(others, before)


# Held states


def _bucket(case: Sample) -> Bucket:
    return Bucket(**case.lists())


def hold(case: Sample, op: str = "adam_cm_") -> int:
    """Hand over the state for steps of one kind."""
    bucket = _bucket(case)
    if op == "adam_cg_":
        bucket["pending_slot"] = []
    held: int = torch.ops.cm_fused.hold_state(*bucket.state())
    return held


def step_held_(held: list[int], cases: list[Sample]) -> None:
    """Step some held states in one call."""
    scalars = zip(*(case.scalars() for case in cases), strict=True)
    torch.ops.cm_fused.step_held_(
        held,
        [param for case in cases for param in case.params],
        [grad for case in cases for grad in case.grads],
        *([scalar for scalar in of_cases if scalar is not None] for of_cases in scalars),
        cases[0].local_sq_norms,
        hyperparameters=[n for case in cases for n in cpu.held_numbers(case.hyperparameters)],
        seeds=[case.hyperparameters["seed"] for case in cases],
    )


@pytest.mark.parametrize("name", SAMPLES)
@of_each_step
def test_held_state_steps_as_the_lists_do(op: str, name: str) -> None:
    """Steps of a held state are the operators' to the bit."""
    case, twin = SAMPLES[name](), SAMPLES[name]()
    held = hold(case, op)
    for _ in range(4):
        step_held_([held], [case])
        twin.call(op)
    torch.ops.cm_fused.release_state(held)
    assert_same(case.lists(), twin.lists())


def _several() -> list[Sample]:
    """Return samples of other dtypes and hyperparameters."""
    cases = [sample(), sample(torch.bfloat16, capacity=4, running_sum=True), sample(amsgrad=True)]
    for i, case in enumerate(cases):
        case.hyperparameters.update(
            lr=0.1 * (i + 1), group_scope=i != 1, sum_of_norms=i == 2, seed=i
        )
    return cases


def test_held_states_step_in_one_call_as_each_by_itself() -> None:
    """Of critical momenta and critical gradients, with hyperparameters and norms of their own."""
    cases, twins = _several(), _several()
    ops = ("adam_cm_", "adam_cg_", "adam_cm_")
    held = [hold(case, op) for case, op in zip(cases, ops, strict=True)]
    for _ in range(3):
        step_held_(held, cases)
        for twin, op in zip(twins, ops, strict=True):
            twin.call(op)
    for case, twin in zip(cases, twins, strict=True):
        assert_same(case.lists(), twin.lists())


def test_a_skipped_state_leaves_the_others_stepping() -> None:
    """`found_inf` is of each state: the middle one's step changes nothing."""
    cases, twins = _several(), _several()
    for i, case in enumerate(cases):
        case.found_inf = _float64(float(i == 1))
    step_held_([hold(case) for case in cases], cases)
    for i in (0, 2):
        twins[i].call("adam_cm_")
    for case, twin in zip(cases, twins, strict=True):
        assert_same(case.lists(), twin.lists())


def test_what_is_wrong_with_one_state_leaves_all_as_they_were() -> None:
    """All states are checked before the first is changed."""
    cases, twins = _several(), _several()
    held = [hold(case) for case in cases]
    cases[-1].grads[LAST] = cases[-1].grads[LAST].double()
    with pytest.raises(RuntimeError, match=rf"grads\[{LAST}\] must have dtype Float, got Double"):
        step_held_(held, cases)
    cases[-1].grads[LAST] = cases[-1].grads[LAST].float()
    for case, twin in zip(cases, twins, strict=True):
        assert_same(case.lists(), twin.lists())


def test_lists_that_do_not_fit_the_states_are_refused() -> None:
    """Every list of a call of several states has its rule in the message."""
    cases = _several()
    held = [hold(case) for case in cases]
    with pytest.raises(RuntimeError, match=r"held must name each state once, got"):
        step_held_([held[0], held[1], held[0]], cases)
    with pytest.raises(RuntimeError, match=r"params must have one tensor for each of the .* got"):
        step_held_(held[:2], [cases[0], replace(cases[1], params=[], grads=[])])
    with pytest.raises(RuntimeError, match=r"hyperparameters and seeds must have 14 numbers"):
        step_held_(held, cases[:2])
    cases[0].lr_tensor = _float64(0.1)
    with pytest.raises(RuntimeError, match=r"lr_tensors must be empty or have one .* 3 .* got 1"):
        step_held_(held, cases)


@pytest.mark.parametrize("skipped", [False, True])
def test_books_of_held_state_are_kept_as_the_lists_are(skipped: bool) -> None:
    """The books of a held state are the operator's to the bit, and a skipped step keeps none."""
    cases = sample(), sample()
    before = [steps.clone() for steps in cases[0].steps]
    sq_norm = torch.arange(1.0, 1 + len(SHAPES)).double()
    found_inf = torch.tensor(float(skipped)).double()
    held = hold(cases[0])
    torch.ops.cm_fused.keep_books_held_([held], [sq_norm], [found_inf], priority_decays=[0.7])
    torch.ops.cm_fused.release_state(held)
    twin = replace(cases[1], sq_norm=sq_norm, found_inf=found_inf)
    twin.hyperparameters["priority_decay"] = 0.7
    twin.call("keep_books_")
    assert_same(cases[0].lists(), twin.lists())
    assert all(
        now == then + (not skipped) for now, then in zip(cases[0].steps, before, strict=True)
    )


def test_held_states_are_apart() -> None:
    """Each held state has its own id, and releasing one leaves the other."""
    cases = [sample() for _ in range(2)]
    first, second = (hold(case) for case in cases)
    assert first != second
    torch.ops.cm_fused.release_state(first)
    before = [param.clone() for param in cases[0].params]
    step_held_([second], [cases[1]])
    assert_same(cases[0].params, before)
    assert [step.item() for step in cases[1].steps] == [3.0] * len(SHAPES)
    torch.ops.cm_fused.release_state(second)


@pytest.mark.parametrize("held", [-1, 0, 2**60])
def test_unknown_state_is_refused(held: int) -> None:
    """A state that is not held is an error that shows its id; releasing it is nothing."""
    torch.ops.cm_fused.release_state(held)
    with pytest.raises(RuntimeError, match=f"held must name a state that is held, got {held}"):
        step_held_([held], [sample()])


def test_released_state_is_refused() -> None:
    """After its release a state is gone, and releasing it again is nothing."""
    case = sample()
    held = hold(case)
    for _ in range(2):
        torch.ops.cm_fused.release_state(held)
    with pytest.raises(RuntimeError, match="held must name a state that is held"):
        step_held_([held], [case])


def test_held_state_is_released_with_its_object() -> None:
    """A `HeldState` lets go of the tensors when it dies."""
    case = sample()
    held = cpu.HeldState(_bucket(case))
    held_id = held.id
    step_held_([held_id], [case])
    del held
    with pytest.raises(RuntimeError, match="held must name a state that is held"):
        step_held_([held_id], [case])


@pytest.mark.parametrize("bad", [bad for bad in BAD_LISTS if "adam_cm_" in bad.ops], ids=str)
def test_held_state_is_checked_at_every_step(bad: BadLists) -> None:
    """A held state of bad lists is refused as the lists are, and nothing changed."""
    case = sample(amsgrad=True, running_sum=True)
    bad.spoil(case)
    before = {role: [t.clone() for t in tensors] for role, tensors in case.lists().items()}
    held = hold(case)
    # What is held says how many parameters there are to be.
    of_states = "params must have one tensor for each of the . that the states have"
    message = of_states if bad.message == "exp_avgs must have one" else bad.message
    with pytest.raises(RuntimeError, match=message):
        step_held_([held], [case])
    torch.ops.cm_fused.release_state(held)
    assert_same(case.lists(), before)


def test_held_state_on_another_device_is_refused() -> None:
    """A state on any device can be held, but a CPU step needs one on the CPU."""
    case = sample()
    case.exp_avgs[LAST] = case.exp_avgs[LAST].to("meta")
    before = [param.clone() for param in case.params]
    held = hold(case)
    with pytest.raises(RuntimeError, match=rf"exp_avgs\[{LAST}\] must be on cpu, got device"):
        step_held_([held], [case])
    torch.ops.cm_fused.release_state(held)
    assert_same(case.params, before)


def test_capability_is_a_known_one() -> None:
    """The instruction set in use is one of those compiled."""
    assert cpu.capability() in ("default", "avx2", "avx512")
