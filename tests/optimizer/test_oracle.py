"""The oracle is right: golden cases, arithmetic done by hand, and torch.optim where they meet."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.golden import CASES, GOLDEN_DIR, load_case
from tests.support.oracle import Array, Options, ParamState, oracle_step


def _scalar_run(
    grads: list[float], options: Options, start: float = 0.0
) -> tuple[Array, ParamState]:
    """One parameter of one element, one step per gradient."""
    param = np.array([start])
    state = ParamState.fresh(param)
    for grad in grads:
        oracle_step([param], [np.array([grad])], [state], options)
    return param, state


def _slot_values(state: ParamState) -> list[float]:
    return [float(slot[0]) for slot in state.slots]


def _key_values(state: ParamState) -> list[float]:
    return [float(key) for key in state.keys]


# Without momentum the candidate is the gradient itself and its priority the absolute value.
# Keys do not decay, so that every number in a test can be read off its gradients.
PLAIN = Options(betas=(0.0, 0.5), priority_decay=1.0, capacity=2)


# Golden cases


def test_every_stored_case_is_listed() -> None:
    """No golden file is left out of the list that tests are made from."""
    assert sorted(path.stem for path in GOLDEN_DIR.glob("*.npz")) == CASES


@pytest.mark.parametrize("name", CASES)
def test_oracle_reproduces_golden_case(name: str) -> None:
    """Parameters after each step and the final state agree to 1e-12; keys and counts exactly."""
    case = load_case(name)
    options = Options(kind=case.kind, **case.options)
    params = [param.astype(np.float64) for param in case.params0]
    states = [ParamState.fresh(param) for param in params]

    for t in range(case.steps):
        oracle_step(params, case.grads[t], states, replace(options, lr=case.lrs[t]))
        for i, trajectory in enumerate(case.params):
            np.testing.assert_allclose(
                params[i], trajectory[t], rtol=1e-12, err_msg=f"params[{i}] after step {t + 1}"
            )

    for i, state in enumerate(states):
        np.testing.assert_allclose(params[i], case.final_params[i], rtol=1e-12)
        np.testing.assert_allclose(state.exp_avg, case.final_exp_avgs[i], rtol=1e-12)
        np.testing.assert_allclose(state.exp_avg_sq, case.final_exp_avg_sqs[i], rtol=1e-12)
        np.testing.assert_allclose(np.stack(state.slots), case.final_slots[i], rtol=1e-12)
        assert [key.dtype for key in state.keys] == [np.float32] * len(state.slots)
        np.testing.assert_array_equal(np.array(state.keys), case.final_keys[i])
        assert state.step == case.final_steps[i]


# By hand: moments, buffer mean, update


def test_two_steps_with_one_slot() -> None:
    """Critical momenta, capacity 1: both steps of Eq. (4) to (7) as written out here."""
    options = Options(lr=0.1, betas=(0.5, 0.5), eps=0.25, capacity=1, priority_decay=0.5)

    param, state = _scalar_run([2.0], options, start=1.0)
    # m = 0.5*0 + 0.5*2 = 1; a = 1 + 0; v = 0.5*0 + 0.5*1 = 0.5; v_hat = 0.5/(1 - 0.5) = 1
    theta = 1.0 - 0.1 * (1.0 / 0.5) / math.sqrt(1.0 + 0.25)
    assert param[0] == pytest.approx(theta, rel=1e-15)
    assert (state.exp_avg[0], state.exp_avg_sq[0]) == (1.0, 0.5)
    assert (_slot_values(state), _key_values(state)) == ([1.0], [2.0 * 0.5])

    oracle_step([param], [np.array([4.0])], [state], options)
    # m = 0.5*1 + 0.5*4 = 2.5; a = 2.5 + 1 = 3.5; v = 0.5*0.5 + 0.5*3.5**2 = 6.375
    # v_hat = 6.375/(1 - 0.25) = 8.5; the key 4 beats the stored 1
    theta = theta - 0.1 * (3.5 / 0.75) / math.sqrt(8.5 + 0.25)
    assert param[0] == pytest.approx(theta, rel=1e-15)
    assert (state.exp_avg[0], state.exp_avg_sq[0]) == (2.5, 6.375)
    assert (_slot_values(state), _key_values(state)) == ([2.5], [4.0 * 0.5])
    assert state.step == 2


def test_adjusted_update() -> None:
    """The update is multiplied by sqrt((1 - 0.6) / (1 + 0.6)) = 0.5, decoupled decay is not."""
    options = Options(
        lr=0.1,
        betas=(0.6, 0.5),
        eps=0.25,
        weight_decay=0.5,
        decoupled_weight_decay=True,
        adjust_lr_fn="match_rms_adamw",
    )
    param, _ = _scalar_run([2.0], options, start=1.0)
    # a = 0.4*2 = 0.8; v_hat = 0.64; a/(1 - 0.6) = 2
    theta = 1.0 * (1 - 0.1 * 0.5) - 0.5 * 0.1 * 2.0 / math.sqrt(0.64 + 0.25)
    assert param[0] == pytest.approx(theta, rel=1e-15)


def test_critical_gradients_use_the_buffer_before_admission() -> None:
    """Critical gradients, Eq. (3): the aggregate holds the previous gradient, not this one."""
    options = Options(
        kind="cg", lr=0.1, betas=(0.5, 0.5), eps=0.25, capacity=1, eps_inside_sqrt=False
    )
    param, state = _scalar_run([2.0], options)
    # a = 2 + 0; m = 0.5*2 = 1; v = 0.5*2**2 = 2; v_hat = 2/0.5 = 4; the item is g
    theta = 0.0 - 0.1 * (1.0 / 0.5) / (math.sqrt(4.0) + 0.25)
    assert param[0] == pytest.approx(theta, rel=1e-15)
    assert _slot_values(state) == [2.0]

    oracle_step([param], [np.array([3.0])], [state], options)
    # a = 3 + 2 = 5; m = 0.5*1 + 0.5*5 = 3; v = 0.5*2 + 0.5*25 = 13.5; v_hat = 13.5/0.75 = 18
    theta = theta - 0.1 * (3.0 / 0.75) / (math.sqrt(18.0) + 0.25)
    assert param[0] == pytest.approx(theta, rel=1e-15)
    assert (state.exp_avg[0], state.exp_avg_sq[0]) == (3.0, 13.5)
    assert _slot_values(state) == [3.0]


@pytest.mark.parametrize(
    ("buffer_mean", "capacity", "divisor"),
    [("capacity", 4, 4), ("size", 4, 2), ("capacity", 2, 2), ("size", 2, 2)],
)
def test_buffer_mean(buffer_mean: Any, capacity: int, divisor: int) -> None:
    """Two filled slots: "capacity" divides their sum by all (Eq. 6), "size" by those filled."""
    options = replace(PLAIN, capacity=capacity, buffer_mean=buffer_mean)
    _, state = _scalar_run([3.0, 5.0], options)
    v_before = state.exp_avg_sq[0]
    oracle_step([np.zeros(1)], [np.array([1.0])], [state], options)
    aggregate = 1.0 + (3.0 + 5.0) / divisor
    assert state.exp_avg_sq[0] == 0.5 * v_before + 0.5 * aggregate**2


def test_amsgrad_divides_by_the_largest_second_moment() -> None:
    """With amsgrad the second step uses v of the first where that is larger."""
    options = Options(lr=0.1, betas=(0.0, 0.5), eps=0.0, capacity=1, amsgrad=True)
    # The item 4 leaves the aggregate -4 + 4 = 0 on the second step, so v falls from 8 to 4.
    _, state = _scalar_run([4.0, -4.0], options)
    assert (state.exp_avg_sq[0], state.max_exp_avg_sq[0]) == (4.0, 8.0)
    param = np.zeros(1)
    oracle_step([param], [np.array([-2.0])], [state], options)
    # The key 4*0.7 lost to 4, so the slot is -4: a = -2 - 4 = -6, v = 0.5*4 + 0.5*36 = 20.
    assert (state.exp_avg_sq[0], state.max_exp_avg_sq[0]) == (20.0, 20.0)
    assert param[0] == pytest.approx(0.1 * 6.0 / math.sqrt(20.0 / 0.875), rel=1e-15)
    param[0] = 0.0
    oracle_step([param], [np.array([5.0])], [state], options)
    # The key 4*0.7*0.7 beats 2: still -4, a = 5 - 4 = 1, v = 0.5*20 + 0.5 = 10.5 below 20.
    assert (state.exp_avg_sq[0], state.max_exp_avg_sq[0]) == (10.5, 20.0)
    assert param[0] == pytest.approx(-0.1 * 1.0 / math.sqrt(20.0 / 0.9375), rel=1e-15)


# By hand: admission and keys


@pytest.mark.parametrize(
    ("grads", "options", "slots", "keys"),
    [
        pytest.param([5, 3, 4], {}, [5, 4], [5, 4], id="the smallest key is replaced in its place"),
        pytest.param([3, -3, 4], {}, [4, -3], [4, 3], id="a tie gives up the lowest index"),
        *(
            pytest.param([3, 5, grad], {}, [3, 5], [3, 5], id=f"{grad} is not above the smallest")
            for grad in (3, -3, 2, 0)
        ),
        pytest.param([3, 0], {}, [3, 0], [3, 0], id="free slots take even a zero gradient"),
        pytest.param(
            [8, 6, 1], {"priority_decay": 0.5}, [8, 6], [1, 1.5], id="keys decay on a skipped step"
        ),
    ],
)
def test_admission(
    grads: list[float], options: dict[str, Any], slots: list[float], keys: list[float]
) -> None:
    """Which slots a run of gradients leaves, and with which keys."""
    _, state = _scalar_run(grads, replace(PLAIN, **options))
    assert (_slot_values(state), _key_values(state)) == (slots, keys)


def test_priority_is_compared_in_float32() -> None:
    """Two norms that are one float32 number tie, so the later one is skipped."""
    later = 1.0 + 1e-12
    assert later > 1.0
    _, state = _scalar_run([1.0, later], replace(PLAIN, capacity=1))
    assert _slot_values(state) == [1.0]


def test_keys_decay_in_float32_and_with_the_new_one() -> None:
    """Each step multiplies every key by priority_decay, the admitted one included."""
    _, state = _scalar_run([3.0, 5.0], replace(PLAIN, priority_decay=0.7))
    decay = np.float32(0.7)
    assert state.keys == [np.float32(3.0) * decay * decay, np.float32(5.0) * decay]
    # The factor is rounded first: 9 * 0.7 is then not the float32 nearest to 6.3.
    _, state = _scalar_run([9.0], replace(PLAIN, priority_decay=0.7))
    assert state.keys == [np.float32(9.0) * decay] != [np.float32(9.0 * 0.7)]
    assert {key.dtype for key in state.keys} == {np.dtype(np.float32)}


def test_zero_decay_keeps_unfilled_keys_at_minus_infinity() -> None:
    """With priority_decay=0 filled keys become 0 and unfilled ones stay -inf, not NaN."""
    _, state = _scalar_run([3.0], replace(PLAIN, capacity=3, priority_decay=0.0))
    priorities = state.priorities(3)
    assert priorities.dtype == np.float32
    assert priorities.tolist() == [0.0, -math.inf, -math.inf]
    assert state.critical_buffer(3).tolist() == [[3.0], [0.0], [0.0]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e39, 1e200])
@pytest.mark.parametrize("before", [[], [3.0], [3.0, 5.0]])
def test_overflow_admits_nothing(bad: float, before: list[float]) -> None:
    """A priority that is infinite or NaN as a float32 leaves the slots; the keys still decay."""
    options = replace(PLAIN, priority_decay=0.5)
    _, state = _scalar_run(before, options)
    slots, keys = _slot_values(state), _key_values(state)
    oracle_step([np.zeros(1)], [np.array([bad])], [state], options)
    assert _slot_values(state) == slots
    assert _key_values(state) == [0.5 * key for key in keys]
    assert state.step == len(before) + 1


# By hand: scope, missing gradients, weight decay


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_scope_of_the_priority(scope: Any) -> None:
    """The group's norm is 5 for both, the tensors' 3 and 4; infinity stops what it is part of."""
    options = replace(PLAIN, priority_scope=scope)
    for first, keys in (([3.0, 0.0], ([5.0], [5.0])), ([math.inf, 0.0], ([], []))):
        params = [np.zeros(2), np.zeros(1)]
        states = [ParamState.fresh(param) for param in params]
        oracle_step(params, [np.array(first), np.array([4.0])], states, options)
        expected = keys if scope == "group" else ([first[0]] * len(keys[0]), [4.0])
        assert tuple(_key_values(state) for state in states) == expected


def test_missing_gradient_takes_no_part() -> None:
    """A parameter without gradient keeps everything and adds nothing to the group's norm."""
    options = replace(PLAIN, priority_decay=0.5, weight_decay=0.1, decoupled_weight_decay=True)
    params = [np.array([1.0]), np.array([2.0])]
    states = [ParamState.fresh(param) for param in params]
    oracle_step(params, [np.array([3.0]), np.array([4.0])], states, options)
    kept = params[0].copy(), states[0].exp_avg.copy(), states[0].exp_avg_sq.copy()
    oracle_step(params, [None, np.array([6.0])], states, options)
    assert (params[0], states[0].exp_avg, states[0].exp_avg_sq) == kept
    assert (states[0].step, _slot_values(states[0]), _key_values(states[0])) == (1, [3.0], [2.5])
    assert (states[1].step, _slot_values(states[1])) == (2, [4.0, 6.0])
    assert _key_values(states[1]) == [5.0 * 0.5 * 0.5, 6.0 * 0.5]


@pytest.mark.parametrize(("maximize", "g"), [(False, 5.0), (True, -1.0)])
def test_coupled_weight_decay_enters_priority_and_moments(maximize: bool, g: float) -> None:
    """L2: g = 3 + 0.5*4, or -3 + 0.5*4 with maximize, is what key, moment and slot see."""
    options = replace(PLAIN, weight_decay=0.5, maximize=maximize)
    _, state = _scalar_run([3.0], options, start=4.0)
    assert (_key_values(state), state.exp_avg[0], _slot_values(state)) == ([abs(g)], g, [g])


def test_decoupled_weight_decay_stays_out_of_the_priority() -> None:
    """Decoupled: the key is |3|, and the parameter shrinks by lr*weight_decay before its step."""
    options = replace(PLAIN, lr=0.1, eps=0.0, weight_decay=0.5, decoupled_weight_decay=True)
    param, state = _scalar_run([3.0], options, start=4.0)
    assert (_key_values(state), state.exp_avg[0], _slot_values(state)) == ([3.0], 3.0, [3.0])
    # v_hat = 0.5*9/0.5 = 9, so the step is lr * 3/sqrt(9) = lr
    assert param[0] == pytest.approx(4.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-15)


def test_gradients_are_read_and_left_alone() -> None:
    """A float16 gradient is read as float64 and not written; a float32 parameter is refused."""
    grad = np.array([3.0], dtype=np.float16)
    param = np.array([4.0])
    state = ParamState.fresh(param)
    oracle_step([param], [grad], [state], replace(PLAIN, weight_decay=0.5, maximize=True))
    assert grad.tolist() == [3.0]
    assert state.exp_avg.dtype == np.float64
    with pytest.raises(TypeError, match=r"params\[0\] must be float64, got float32"):
        oracle_step([np.zeros(1, dtype=np.float32)], [grad], [state], PLAIN)


# torch.optim: with the buffer out of play, both kinds are Adam

ADAM_VARIANTS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"maximize": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "amsgrad": True, "maximize": True},
]


def _compare_with_torch(options: Options, steps: int, torch_kwargs: dict[str, Any]) -> None:
    """Run the oracle and torch.optim.Adam or AdamW side by side on the same gradients."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal((3, 4)), rng.standard_normal(())]
    states = [ParamState.fresh(param) for param in params]
    torch_params = [torch.tensor(param, dtype=torch.float64) for param in params]
    cls = torch.optim.AdamW if options.decoupled_weight_decay else torch.optim.Adam
    optimizer = cls(
        torch_params, amsgrad=options.amsgrad, maximize=options.maximize, **torch_kwargs
    )
    for step in range(1, steps + 1):
        grads = [rng.standard_normal(param.shape) for param in params]
        for torch_param, grad in zip(torch_params, grads, strict=True):
            torch_param.grad = torch.tensor(grad, dtype=torch.float64)
        oracle_step(params, [*grads], states, options)
        optimizer.step()
        for i, torch_param in enumerate(torch_params):
            np.testing.assert_allclose(
                params[i], torch_param.numpy(), rtol=1e-12, err_msg=f"params[{i}], step {step}"
            )


@pytest.mark.parametrize("variant", ADAM_VARIANTS, ids=str)
def test_first_critical_gradients_step_is_adam(variant: dict[str, Any]) -> None:
    """On an empty buffer a = g, so the first step of critical gradients is torch's Adam(W)."""
    options = Options(kind="cg", lr=0.1, eps=1e-2, eps_inside_sqrt=False, **variant)
    kwargs = {"weight_decay": options.weight_decay}
    _compare_with_torch(options, 1, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-2, **kwargs})


@pytest.mark.parametrize("variant", ADAM_VARIANTS, ids=str)
def test_first_critical_momenta_step_is_rescaled_adam(variant: dict[str, Any]) -> None:
    """On an empty buffer a = m = (1 - beta1)*g: Adam(W) with lr and eps over (1 - beta1).

    The second moment is of a, not of g, so the first step is lr*g / ((1 - beta1)*|g| + eps).
    """
    options = Options(lr=0.1, eps=1e-2, eps_inside_sqrt=False, **variant)
    scale = 1 - 0.9
    weight_decay = options.weight_decay
    if options.decoupled_weight_decay:
        weight_decay *= scale  # torch multiplies it by the rescaled lr
    kwargs = {"lr": 0.1 / scale, "eps": 1e-2 / scale, "weight_decay": weight_decay}
    _compare_with_torch(options, 1, {"betas": (0.9, 0.99), **kwargs})


@pytest.mark.parametrize("variant", ADAM_VARIANTS, ids=str)
@pytest.mark.parametrize(("kind", "beta1"), [("cg", 0.9), ("cm", 0.0)])
def test_an_endless_buffer_is_adam(kind: Any, beta1: float, variant: dict[str, Any]) -> None:
    """With 10**30 slots the buffer's mean vanishes, and what is left is torch's Adam(W).

    For critical momenta without first-moment decay only, where m = g.
    """
    options = Options(
        kind=kind,
        lr=0.1,
        betas=(beta1, 0.99),
        eps=1e-2,
        eps_inside_sqrt=False,
        capacity=10**30,
        **variant,
    )
    kwargs = {"weight_decay": options.weight_decay}
    _compare_with_torch(options, 12, {"lr": 0.1, "betas": (beta1, 0.99), "eps": 1e-2, **kwargs})
