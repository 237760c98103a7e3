"""Arguments that do not fit: each is an error that names the list and the index, with no change.

What crashed an operator, or was taken in silence, has a test of its own below the table. Arguments
damaged at random are tests/support/damage.py's.
"""

import re
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cm_fused._state.table import KEYS
from tests.support import damage
from tests.support.cases import needs_cpu_backend
from tests.support.rows import MINE, OPS, REFUSED, Refused, role_of
from tests.support.samples import LAST, Sample, float64, full_sample, sample, step_
from tests.support.training import SHAPES, assert_same

pytestmark = needs_cpu_backend

of_each_kind = pytest.mark.parametrize("kind", ["cm", "cg"])


def _refused(case: Sample, message: str, call: Callable[[], object], *spoiled: Tensor) -> None:
    """Check that a call raises and changes nothing, but what it cannot have."""
    besides = spoiled[0] if spoiled else None
    before = case.copied(besides)
    with pytest.raises(RuntimeError, match=message):
        call()
    assert_same({k: [t for t in ts if t is not besides] for k, ts in case.lists().items()}, before)


# The rows of the state


@pytest.mark.parametrize(
    ("op", "bad"),
    [pytest.param(op, bad, id=f"{op}-{bad}") for bad in REFUSED for op in bad.ops],
)
def test_bad_tensor_changes_nothing(op: str, bad: Refused) -> None:
    """A tensor that does not fit is a RuntimeError naming it and the index."""
    case = full_sample()
    tensor = bad.spoil(case)
    _refused(case, bad.message, lambda: OPS[op](case), tensor)


@pytest.mark.parametrize("op", ["step", "step_cg", "sq_norms"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.int64, "Long"), (torch.complex64, "Complex")])
def test_dtype_of_a_parameter(op: str, dtype: torch.dtype, name: str) -> None:
    """Of parameter and gradient alike."""
    case = sample()
    case.params[LAST], case.grads[LAST] = (t[LAST].to(dtype) for t in (case.params, case.grads))
    message = rf"params{MINE}be float32, float64, bfloat16 or float16, got {name}"
    _refused(case, message, lambda: OPS[op](case))


def test_errors_name_files_by_relative_paths() -> None:
    """The paths of the machine that built the library say nothing to a user.

    Older tests look only at the end of a message, after the file's name.
    """
    case = sample()
    case.params[LAST] = case.params[LAST].to(torch.int64)
    with pytest.raises(RuntimeError) as raised:
        OPS["step"](case)
    assert re.search(r", csrc/[a-z/.]+\.(h|cpp):\d+, ", str(raised.value))


@pytest.mark.parametrize("bad", [b for b in REFUSED if b.key in ("params", "grads")], ids=str)
def test_bad_tensor_after_a_step(bad: Refused) -> None:
    """So it is where all else is bound from the last step."""
    case = full_sample()
    state = case.register()
    step_([state], [case])
    tensor = bad.spoil(case)
    _refused(case, bad.message, lambda: step_([state], [case]), tensor)


@pytest.mark.parametrize(
    ("op", "key"),
    [
        *(("step", key) for key in ("exp_avg_sq", "critical_buffer", "priorities", "step")),
        *(("flush", key) for key in ("exp_avg", "critical_buffer", "pending_slot")),
        *(("update_priorities", key) for key in ("priorities", "pending_slot", "step")),
    ],
)
def test_row_that_is_missing(op: str, key: str) -> None:
    """A row that an operator needs is named where the mask does not have it."""
    case = sample().without(key)
    message = rf"{role_of(key)} must have one tensor for each of the {len(SHAPES)} params, got 0"
    _refused(case, message, lambda: OPS[op](case))


@pytest.mark.parametrize("key", ["critical_scales", "exp_avg_scales", "exp_avg_sq_scales"])
def test_scales_that_are_missing(key: str) -> None:
    """A dtype with scales needs them."""
    case = full_sample().without(key)
    _refused(case, f"{key} must be given: the state has a dtype with scales", case.step)


def test_registration_that_does_not_fit() -> None:
    """Lists must have the lengths that the mask says."""
    register = torch.ops.cm_fused.register_state
    state = [torch.zeros(1) for _ in range(6)]
    for mask in (-1, 1 << len(KEYS)):
        with pytest.raises(RuntimeError, match=f"mask must have no bits but those .* got {mask}"):
            register(state, mask, [], [])
    for mask, rows in ((0, 0), (0b1111, 4)):
        message = f"state must have one tensor for each parameter .* the {rows} rows .* got 6"
        with pytest.raises(RuntimeError, match=message):
            register(state, mask, [], [])
    with pytest.raises(RuntimeError, match=r"param_indices must have one .* 2 params, got 3"):
        register(state, 0b111, [0, 1, 2], [])
    message = "shard_layouts must have three numbers for each of the 2 params, got 2"
    with pytest.raises(RuntimeError, match=message):
        register(state, 0b111, [], [0, 1])


@pytest.mark.parametrize(
    "make", [torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)], ids=["neg", "zeros"]
)
def test_state_of_implied_values_is_not_registered(make: Callable[[Tensor], Tensor]) -> None:
    """A copy would be registered and changed by steps, or memory that is not there."""
    case = sample()
    case.state["exp_avg_sq"][LAST] = make(case.state["exp_avg_sq"][LAST])
    with pytest.raises(RuntimeError, match="a state to be registered must lie in memory"):
        case.register()


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ((-1, 1, 1), rf"params\[{LAST}\] must be an offset >= 0.*got \(-1, 1, 1\)"),
        ((0, 0, 1), r"a length >= 1.*got \(0, 0, 1\)"),
        ((0, 3, 2), r"a stride >= that, got \(0, 3, 2\)"),
    ],
)
@of_each_kind
def test_bad_shard_layout_changes_nothing(kind: str, last: tuple[int, ...], message: str) -> None:
    """A layout that no part of a parameter has is refused."""
    case = sample() if kind == "cm" else sample().without("pending_slot")
    case.shard_layouts = [*(0, 1, 1) * LAST, *last]
    _refused(case, message, case.step)


# What a call is given besides


def _bad_scalar(name: str, value: Tensor) -> Callable[[Sample], None]:
    return lambda case: case.scalars.__setitem__(name, value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *(
            (_bad_scalar(name, torch.tensor(1.0)), rf"{name}s\[0\] must have dtype Double")
            for name in ("sq_norm", "lr", "grad_factor", "found_inf")
        ),
        *(
            (_bad_scalar(name, float64([1.0, 1.0])), rf"{name}s\[0\] .*contiguous with {n} elem")
            for name, n in (("sq_norm", len(SHAPES)), ("lr", 1), ("grad_factor", 1))
        ),
        (_bad_scalar("lr", float64(1.0).to("meta")), "(?i)meta"),
        (lambda case: setattr(case, "local_sq_norms", float64([0])), "local_sq_norms.* contiguous"),
        (lambda case: setattr(case, "local_sq_norms", torch.zeros(5)), "local_sq_norms.* Double"),
        (
            lambda case: case.grads.pop(),
            "grads must have one tensor for each of the 5 params, got 4",
        ),
        (lambda case: (case.params.append(torch.ones(1)), case.grads.append(torch.ones(1))), "6"),
    ],
)
def test_bad_argument_of_a_step(spoil: Callable[[Sample], object], message: str) -> None:
    """Scalars are float64 of one element, lists as long as the states say."""
    case = sample()
    state = case.register()
    spoil(case)
    _refused(case, message, lambda: step_([state], [case]))


def test_local_sq_norms_of_critical_gradients() -> None:
    """Their norm is needed before the step."""
    case = sample().without("pending_slot")
    case.local_sq_norms = torch.zeros(len(SHAPES), dtype=torch.float64)
    _refused(case, "local_sq_norms is for critical momenta", case.step)


def test_lists_that_do_not_fit_the_states() -> None:
    """Every list of a call of several states has its rule in the message."""
    cases = [sample(), sample(torch.float64), sample()]
    states = [case.register() for case in cases]
    ids = [state.id for state in states]
    with pytest.raises(RuntimeError, match=r"ids must name each state once, got"):
        step_([ids[0], ids[1], ids[0]], cases)
    with pytest.raises(RuntimeError, match=r"params must have one tensor for each of the 10 .* 5"):
        step_(ids[:2], [cases[0], Sample([], [], {})])
    with pytest.raises(RuntimeError, match=r"hyperparameters and seeds must have 15 numbers"):
        step_(ids, cases[:2])
    cases[0].scalars["lr"] = float64(0.1)
    with pytest.raises(RuntimeError, match=r"lrs must be empty or have one .* 3 states, got 1"):
        step_(ids, cases)
    update = torch.ops.cm_fused.update_registered_priorities_
    with pytest.raises(RuntimeError, match=r"sq_norms and priority_decays .* 3 states, got 2 and"):
        update(ids, [float64(1.0)] * 2, [], priority_decays=[0.7] * 3)
    with pytest.raises(RuntimeError, match=r"found_infs must be empty or have .* 3 states, got 1"):
        update(ids, [float64(1.0)] * 3, [float64(1.0)], priority_decays=[0.7] * 3)


@pytest.mark.parametrize("op", ["step", "flush", "update_priorities"])
def test_what_is_wrong_with_one_state_leaves_all_as_they_were(op: str) -> None:
    """All states are checked before the first is changed."""
    cases = [sample(), sample()]
    states = [case.register() for case in cases]
    tensor = cases[1].state["pending_slot"][LAST]
    tensor.data = tensor.data.float()
    ids = [state.id for state in states]
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: step_(ids, cases),
        "flush": lambda: torch.ops.cm_fused.flush_registered_(ids),
        "update_priorities": lambda: torch.ops.cm_fused.update_registered_priorities_(
            ids, [float64(1.0)] * 2, [], priority_decays=[0.7] * 2
        ),
    }
    _refused(cases[0], rf"pending_slots\[{LAST}\] must have dtype Long", calls[op])


# What crashed, or was taken in silence


def test_tensor_at_an_offset_of_no_memory() -> None:
    """Without memory a view's address is its offset, which is not null."""
    case = sample()
    case.grads[LAST] = torch.zeros(10)[5:]
    case.grads[LAST].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"grads\[{LAST}\] must have its memory"):
        case.step()


def test_gradient_that_loses_its_memory() -> None:
    """What a step has checked is checked again where it moved."""
    case = sample()
    state = case.register()
    step_([state], [case])
    for left in (4, 0):
        case.grads[LAST].untyped_storage().resize_(left)
        _refused(
            case,
            rf"grads\[{LAST}\] must have its memory",
            lambda: step_([state], [case]),
            case.grads[LAST],
        )


def test_grown_state_is_seen() -> None:
    """A tensor that grows in its own memory keeps its address: the others were overrun."""
    case = sample(shapes=((2,),))
    memory = torch.zeros(3_000_000)
    case.state["exp_avg"] = [memory.resize_(2)]
    state = case.register()
    step_([state], [case])
    memory.resize_(3_000_000)
    case.params, case.grads = ([torch.zeros(3_000_000)] for _ in range(2))
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[0\] must have shape \(3000000\)"):
        step_([state], [case])


@pytest.mark.parametrize("key", ["exp_avg_sq", "critical_buffer", "critical_sum", "priorities"])
def test_shrunk_state_is_seen(key: str) -> None:
    """A tensor that shrinks in place keeps its address too."""
    case = sample(running_sum=True)
    state = case.register()
    step_([state], [case])
    case.state[key][LAST].resize_(1)
    _refused(case, rf"{role_of(key)}{MINE}", lambda: step_([state], [case]))


def test_moment_of_another_dtype_in_the_same_place_is_seen() -> None:
    """Momenta seen as codes need scales, which the state does not have: there were none to read."""
    case = sample(shapes=((8,),))
    state = case.register()
    step_([state], [case])
    case.state["exp_avg"][0].data = case.state["exp_avg"][0].data.view(torch.int8)[:8]
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[0\] must have dtype Char"):
        step_([state], [case])


def _in_threads(*targets: Callable[[], None]) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_step_one_state_take_turns() -> None:
    """Operators run without Python's lock: what is cached of a state was shared."""
    case = sample(shapes=tuple((1 + i % 7,) for i in range(1500)))
    state = case.register()

    def step() -> None:
        for _ in range(20):
            step_([state], [case])

    _in_threads(*[step] * 4)
    assert {count.item() for count in case.state["step"]} == {82.0}


def test_threads_that_step_states_in_other_orders() -> None:
    """No two calls wait for each other."""
    cases = [sample(), sample()]
    states = [case.register() for case in cases]

    def step(order: slice) -> None:
        for _ in range(200):
            step_(states[order], cases[order])

    _in_threads(lambda: step(slice(None)), lambda: step(slice(None, None, -1)))
    assert [case.state["step"][0].item() for case in cases] == [402.0, 402.0]


@pytest.mark.parametrize("first", [0, 250])
def test_arguments_damaged_at_random(first: int) -> None:
    """An error with no bit changed, or the result of the arguments before the damage."""
    outcomes = {damage.run_case(seed) for seed in range(first, first + 250)}
    assert outcomes == {"refused", "compared", "other"}
