"""The operators of the C++ library, called as they are: what they compute, schemas and fakes."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cm_fused._backends import library
from tests.support.cases import needs_cpu_backend
from tests.support.samples import SAMPLES, Sample, float64, rounded_sample, sample, step_
from tests.support.training import SHAPES, assert_same

pytestmark = needs_cpu_backend

Make = Callable[[Sample], Sample]
of_each_kind = pytest.mark.parametrize(
    "kind", [lambda case: case, lambda case: case.without("pending_slot")], ids=["cm", "cg"]
)


def _several() -> list[Sample]:
    """Return samples of other dtypes and hyperparameters, the middle one of critical gradients."""
    cases = [sample(), sample(torch.bfloat16, capacity=4, running_sum=True), sample(amsgrad=True)]
    cases[1].without("pending_slot")
    for i, case in enumerate(cases):
        case.hyperparameters.update(
            lr=0.1 * (i + 1), group_scope=i != 1, sum_of_norms=i == 2, seed=i
        )
    return cases


def _same_steps(case: Sample, twin: Sample) -> None:
    """Step both, and check that they agree in every bit of what a step changes."""
    for each in (case, twin):
        each.step()
    assert_same({**case.lists(), "grads": []}, {**twin.lists(), "grads": []})


# Schemas and fakes


@of_each_kind
def test_schema_of_a_step(kind: Make) -> None:
    """A step changes nothing but what its schema marks, besides the state."""
    case = kind(sample())
    state = case.register()
    torch.library.opcheck(
        torch.ops.cm_fused.step_registered_.default,
        ([state.id], case.params, case.grads, [float64(4.0)], [], [], [], None),
        {
            "hyperparameters": case.numbers(),
            "seeds": [0],
        },
        test_utils=("test_schema", "test_autograd_registration"),
    )


@pytest.mark.parametrize("name", ["plain", "float64", "strided_bfloat16", "empty"])
def test_opcheck_of_sq_norms(name: str) -> None:
    """Schema, autograd registration, fake kernel and functionalization agree with the kernel."""
    case = SAMPLES[name]()
    torch.library.opcheck(
        torch.ops.cm_fused.sq_norms.default,
        (case.params, case.grads, None),
        {"weight_decay": 0.1, "maximize": True, "decoupled_weight_decay": False},
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_sq_norms(name: str) -> None:
    """Under FakeTensorMode nothing is computed and the result has the right form."""
    with FakeTensorMode():
        case = SAMPLES[name]()
        result = case.sq_norms()
    form = (result.shape, result.dtype, result.device.type)
    assert form == ((len(case.params),), torch.float64, "cpu")


@pytest.mark.parametrize("name", SAMPLES)
@of_each_kind
def test_steps_write_what_they_declare(kind: Make, name: str) -> None:
    """A step changes the parameters and their state; gradients and the given norm never."""
    case, before = kind(SAMPLES[name]()), SAMPLES[name]()
    case.step()
    assert_same(case.grads, before.grads)
    assert_same(case.scalars, before.scalars)
    for key in ("params", "exp_avg", "exp_avg_sq", "priorities", "step"):
        for mine, theirs in zip(case.lists()[key], before.lists()[key], strict=True):
            # A single rounded value may well stay what it is.
            few = mine.numel() < 3 and mine.itemsize < 4 and key.startswith("exp_avg")
            assert mine.numel() == 0 or few or not torch.equal(mine, theirs), key


# Scalars that come in tensors


@of_each_kind
def test_learning_rate_in_a_tensor(kind: Make) -> None:
    """A number in lrs is lr, to the bit."""
    case, twin = kind(sample(capacity=5)), kind(sample(capacity=5))
    case.scalars["lr"] = float64(twin.hyperparameters["lr"])
    case.hyperparameters["lr"] = -1.0
    _same_steps(case, twin)


@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@of_each_kind
def test_gradients_are_multiplied_first(
    kind: Make, dtype: torch.dtype, options: Mapping[str, Any]
) -> None:
    """grad_factors give the bits of gradients that were multiplied before, in the norm too."""
    case, twin = kind(sample(dtype)), kind(sample(dtype))
    for each in (case, twin):
        each.hyperparameters.update(options)
    case.scalars["grad_factor"] = float64(0.3)
    twin.grads = [grad * torch.tensor(0.3, dtype=dtype) for grad in twin.grads]
    before = [grad.clone() for grad in case.grads]
    assert torch.equal(case.sq_norms(), twin.sq_norms())
    _same_steps(case, twin)
    assert_same(case.grads, before)


@pytest.mark.parametrize("name", SAMPLES)
@of_each_kind
def test_found_inf_changes_nothing(kind: Make, name: str) -> None:
    """Where found_infs is not 0 no bit changes; 0 is as if it were not given."""
    case, before = kind(SAMPLES[name]()), kind(SAMPLES[name]())
    case.scalars["found_inf"] = float64(1.0)
    case.step()
    assert_same(case.lists(), before.lists())
    case.scalars["found_inf"] = float64(0.0)
    _same_steps(case, before)


def test_found_inf_leaves_the_priorities() -> None:
    """So it is where the priorities are updated apart."""
    case, before = sample(), sample()
    case.scalars["found_inf"] = float64(1.0)
    case.update_priorities()
    assert_same(case.lists(), before.lists())


@pytest.mark.parametrize("group_scope", [False, True])
def test_priorities_that_are_updated_later(group_scope: bool) -> None:
    """The pass with local_sq_norms and then the update are the whole step, to the bit."""
    case, twin = sample(), sample()
    for each in (case, twin):
        each.hyperparameters["group_scope"] = group_scope
    for _ in range(6):
        keys = ("priorities", "step", "pending_slot")
        before = [t.clone() for key in keys for t in case.state[key]]
        case.local_sq_norms = torch.zeros(len(SHAPES), dtype=torch.float64)
        case.scalars.clear()
        case.step()
        assert_same(before, [t for key in keys for t in case.state[key]])
        assert torch.equal(case.local_sq_norms, twin.sq_norms())
        case.scalars["sq_norm"] = case.local_sq_norms.sum() if group_scope else case.local_sq_norms
        case.update_priorities()
        twin.step()
        assert_same(case.lists(), twin.lists())


@of_each_kind
def test_norm_of_each_tensor_is_taken(kind: Make) -> None:
    """sq_norms may have one sum for each tensor, whatever the scope."""
    case, twin = kind(sample()), kind(sample())
    twin.hyperparameters["group_scope"] = False
    case.scalars["sq_norm"] = case.sq_norms()
    _same_steps(case, twin)


@pytest.mark.parametrize("given", [(), (4.0,), tuple(range(len(SHAPES)))], ids=len)
@pytest.mark.parametrize("group_scope", [False, True])
@of_each_kind
def test_last_sq_norms(kind: Make, group_scope: bool, given: tuple[float, ...]) -> None:
    """They are the states' sums of g^2, but of critical gradients only where nobody gave them."""
    case, skipped = kind(sample()), kind(sample())
    case.hyperparameters["group_scope"] = group_scope
    skipped.scalars["found_inf"] = float64(1.0)
    expected = case.sq_norms().sum()
    states = [each.register() for each in (case, skipped)]
    ids = [state.id for state in states]
    assert torch.ops.cm_fused.last_sq_norms(ids).isnan().all()
    if given:
        case.scalars["sq_norm"] = float64(given if len(given) > 1 else given[0])
    step_(states[:1], [case])
    step_(states[1:], [skipped])
    first, second = torch.ops.cm_fused.last_sq_norms(ids)
    is_known = not given or "pending_slot" in case.state
    assert torch.equal(first, expected) if is_known else first.isnan()
    assert second.isnan()
    skipped.scalars.clear()
    step_(states[1:], [skipped])
    assert not torch.ops.cm_fused.last_sq_norms(ids)[1].isnan()


@pytest.mark.parametrize("group_scope", [False, True])
@of_each_kind
def test_sum_of_norms(kind: Make, group_scope: bool) -> None:
    """A group's key is the sum of its tensors' norms; a key over a tensor stays what it was."""
    case, twin = kind(sample()), kind(sample())
    for each in (case, twin):
        each.hyperparameters["group_scope"] = group_scope
    case.hyperparameters["sum_of_norms"] = True
    if group_scope:
        twin.scalars["sq_norm"] = twin.sq_norms().sqrt().sum().square()
    _same_steps(case, twin)


# What the other operators compute


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
def test_flush(running_sum: bool) -> None:
    """Each momentum goes to its pending slot, once, and the running sum follows."""
    # Rows that have no part in it need not be there.
    case, before = (
        sample(running_sum=running_sum).without("exp_avg_sq", "priorities", "step")
        for _ in range(2)
    )
    for i, pending in enumerate(case.state["pending_slot"]):
        pending.fill_(i % 4 - 1)
    for _ in range(2):
        case.flush()
        for i, buffer in enumerate(before.state["critical_buffer"]):
            if (slot := i % 4 - 1) >= 0:
                buffer[slot] = case.state["exp_avg"][i]
            if running_sum:
                torch.testing.assert_close(case.state["critical_sum"][i], buffer.sum(0))
        assert_same(case.state["critical_buffer"], before.state["critical_buffer"])
        assert_same(case.state["exp_avg"], before.state["exp_avg"])
        assert [pending.item() for pending in case.state["pending_slot"]] == [-1] * len(SHAPES)


@pytest.mark.parametrize("name", SAMPLES)
def test_flush_is_the_next_step_s(name: str) -> None:
    """A step of what was flushed is the step that flushes, to the bit."""
    case, twin = SAMPLES[name](), SAMPLES[name]()
    case.flush()
    _same_steps(case, twin)


@of_each_kind
def test_empty_tensors_take_part(kind: Make) -> None:
    """A step of empty tensors alone counts and admits a norm of 0."""
    case = kind(sample(shapes=((0,), (0, 3))))
    case.step()
    assert [step.item() for step in case.state["step"]] == [3.0, 3.0]
    for keys in case.state["priorities"]:
        torch.testing.assert_close(keys, torch.tensor([0.7, 0.35, 0.0]))


# Registered states


@pytest.mark.parametrize("name", SAMPLES)
@of_each_kind
def test_what_is_cached_changes_nothing(kind: Make, name: str) -> None:
    """Steps of one registration are those of a new one each, to the bit."""
    case, twin = kind(SAMPLES[name]()), kind(SAMPLES[name]())
    state = case.register()
    for _ in range(4):
        step_([state], [case])
        twin.step()
    assert_same(case.lists(), twin.lists())


def test_states_step_in_one_call_as_each_by_itself() -> None:
    """Critical momenta and critical gradients, with hyperparameters and norms of their own."""
    cases, twins = _several(), _several()
    states = [case.register() for case in cases]
    for _ in range(3):
        step_(states, cases)
        for twin in twins:
            twin.step()
    for case, twin in zip(cases, twins, strict=True):
        assert_same(case.lists(), twin.lists())


def test_states_flush_in_one_call() -> None:
    """Whatever their dtypes."""
    cases, twins = (
        [sample(), rounded_sample(torch.bfloat16, torch.int8, torch.int8)] for _ in "ab"
    )
    states = [case.register() for case in cases]
    torch.ops.cm_fused.flush_registered_([state.id for state in states])
    for case, twin in zip(cases, twins, strict=True):
        twin.flush()
        assert_same(case.lists(), twin.lists())


def test_a_skipped_state_leaves_the_others_stepping() -> None:
    """Each state has its own found_inf: the middle one's step changes nothing."""
    cases, twins = _several(), _several()
    for i, case in enumerate(cases):
        case.scalars["found_inf"] = float64(float(i == 1))
    step_([case.register() for case in cases], cases)
    for i in (0, 2):
        twins[i].step()
    for case, twin in zip(cases, twins, strict=True):
        assert_same(case.lists(), twin.lists())


def test_registered_states_are_apart() -> None:
    """Each has its own id, and releasing one, more than once, leaves the other."""
    cases = [sample() for _ in range(2)]
    first, second = (case.register() for case in cases)
    assert first.id != second.id
    for _ in range(2):
        torch.ops.cm_fused.release_state(first.id)
    before = cases[0].copied()
    with pytest.raises(RuntimeError, match="ids must be of registered states"):
        step_([first], cases[:1])
    step_([second], [cases[1]])
    assert_same(cases[0].lists(), before)
    assert [step.item() for step in cases[1].state["step"]] == [3.0] * len(SHAPES)


@pytest.mark.parametrize("state", [-1, 0, 2**60])
def test_unknown_state_is_refused(state: int) -> None:
    """A state that is not registered is an error that shows its id; releasing it is nothing."""
    torch.ops.cm_fused.release_state(state)
    with pytest.raises(RuntimeError, match=f"ids must be of registered states, got {state}"):
        step_([state], [sample()])


def test_state_is_released_with_its_object() -> None:
    """A `RegisteredState` lets go of the tensors when it dies."""
    case = sample()
    state = case.register()
    number = state.id
    step_([state], [case])
    del state
    with pytest.raises(RuntimeError, match="ids must be of registered states"):
        step_([number], [case])


@pytest.mark.parametrize("table", ["KEYS", "HYPERPARAMETERS"])
def test_tables_of_another_version(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package and its library must have the same rows and hyperparameters."""
    assert library._check_names() is None
    monkeypatch.setattr(library, table, getattr(library, table)[::-1])
    assert "another version's, reinstall" in str(library._check_names())


def test_a_library_without_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built before an operator was added is another version's."""
    monkeypatch.setattr(library, "_LATEST_OPERATOR", "none_of_this_name")
    assert "another version's, reinstall cm_fused: it has no" in str(library._check_names())


def test_parameters_that_overlap_after_a_step_of_one_state() -> None:
    """States whose parameters have memory in common are stepped in turn, whoever moved when."""
    shapes = ((100_000,),)
    results = []
    threads = torch.get_num_threads()
    for together in (True, False):
        cases = [sample(shapes=shapes), sample(shapes=shapes)]
        states = [case.register() for case in cases]
        torch.set_num_threads(2)
        step_(states, cases)
        cases[1].params = cases[0].params
        step_(states[1:], cases[1:])
        for _ in range(8):
            if together:
                step_(states, cases)
            else:
                step_(states[:1], cases[:1])
                step_(states[1:], cases[1:])
        torch.set_num_threads(threads)
        results.append(cases[0].params)
    assert_same(results[0], results[1])
