"""The contract of a torch optimizer: what torch's own tests hold its optimizers to, and users."""

import copy
import gc
import inspect
import itertools
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused import AdamCM, AdamWCG, AdamWCM
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.table import RUNNING_SUM_MIN_CAPACITY
from tests.support.training import (
    BACKENDS,
    CLASSES,
    KINDS,
    assert_close,
    assert_same,
    give_gradients,
    gradient,
    new_optimizer,
    new_params,
    params_of,
    train,
    trained,
)

pytestmark = pytest.mark.sampled

# Without and with a running sum on the C++ backend.
CAPACITIES = (RUNNING_SUM_MIN_CAPACITY[4] - 1, 5)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_class = pytest.mark.parametrize("cls", CLASSES)
of_each_kind = pytest.mark.parametrize("cls", KINDS)
of_each_capacity = pytest.mark.parametrize("capacity", CAPACITIES)


# 1. The constructor


def test_constructor_signature_is_the_specified_one() -> None:
    """Names, order, kinds and defaults of AdamCM are the specification's."""
    positional: dict[str, Any] = {
        "lr": 1e-3,
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
    }
    keyword_only: dict[str, Any] = {
        "capacity": 5,
        "priority_decay": 0.7,
        "priority_scope": "group",
        "buffer_mean": "capacity",
        "eps_inside_sqrt": True,
        "buffer_dtype": None,
        "moment_dtype": None,
        "low_precision_update": "nearest",
        "seed": 0,
        "max_grad_norm": None,
        "skip_nonfinite": False,
        "amp_scaling": False,
        "maximize": False,
        "capturable": False,
        "decoupled_weight_decay": False,
        "adjust_lr_fn": None,
        "backend": None,
        "fused": None,
        "foreach": None,
    }
    params, *parameters = inspect.signature(AdamCM).parameters.values()
    assert (params.name, params.default) == ("params", inspect.Parameter.empty)
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    for options, kind in zip((positional, keyword_only), kinds, strict=True):
        assert {p.name: p.default for p in parameters if p.kind is kind} == options
    assert [p.name for p in parameters] == [*positional, *keyword_only]


@of_each_class
def test_signatures_agree(cls: type[CriticalAdam]) -> None:
    """The four constructors differ in the two defaults of decoupled weight decay alone."""
    expected = dict(inspect.signature(AdamCM).parameters)
    if cls in (AdamWCM, AdamWCG):
        expected["weight_decay"] = expected["weight_decay"].replace(default=1e-2)
        expected["decoupled_weight_decay"] = expected["decoupled_weight_decay"].replace(
            default=True
        )
    assert dict(inspect.signature(cls).parameters) == expected


@of_each_class
def test_group_holds_every_option(cls: type[CriticalAdam]) -> None:
    """A group has every argument of the constructor as an option, at its default."""
    (group,) = cls(new_params()).param_groups
    expected = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    del expected["params"]
    assert {name: group[name] for name in expected} == expected


@of_each_class
def test_no_public_attributes_beyond_torchs(cls: type[CriticalAdam]) -> None:
    """A training optimizer has no public instance attributes that torch.optim.Adam's lacks."""
    optimizer = new_optimizer(cls)
    train(optimizer, range(3))
    adam = torch.optim.Adam(new_params())
    assert {name for name in vars(optimizer) if not name.startswith("_")} <= set(vars(adam))


# 2. Hyperparameters


OPTION_CHANGES: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.5, 0.8),
    "eps": 1e-2,
    "weight_decay": 0.1,
    "amsgrad": True,
    "priority_decay": 0.1,
    "priority_scope": "tensor",
    "buffer_mean": "size",
    "eps_inside_sqrt": False,
    "maximize": True,
    "decoupled_weight_decay": True,
    "adjust_lr_fn": "match_rms_adamw",
}
# Options that show only beside another than the default of a second one.
COMPANIONS: dict[str, dict[str, Any]] = {
    "decoupled_weight_decay": {"weight_decay": 0.1},
    "eps_inside_sqrt": {"eps": 1e-2},
}


@pytest.mark.parametrize("option", OPTION_CHANGES)
@on_each_backend
@of_each_kind
def test_option_changed_in_group_counts_from_the_next_step(
    cls: type[CriticalAdam], backend: str, option: str
) -> None:
    """Options are read at every step: a change shows at once, and alike on all backends."""
    # The buffer fills until step 6: before, its mean shows; after, its priorities.
    optimizer, changed, reference = (
        new_optimizer(cls, backend=name, capacity=6, **COMPANIONS.get(option, {}))
        for name in (backend, backend, "eager")
    )
    for each in (optimizer, changed, reference):
        train(each, range(4))
        if each is not optimizer:
            for group in each.param_groups:
                group[option] = OPTION_CHANGES[option]
        train(each, range(4, 16))
    got, unchanged = trained(changed), trained(optimizer)
    assert_close(got, trained(reference))
    for i in (0, 3, 4):
        same_keys = torch.equal(*(run["state"][i]["priorities"] for run in (got, unchanged)))
        # All gradients grow and shrink together: their own norms admit what the group's does.
        if option != "priority_scope" or same_keys:
            assert not torch.equal(got["params"][i], unchanged["params"][i]), f"params[{i}]"


@on_each_backend
@of_each_kind
def test_groups_differ(cls: type[CriticalAdam], backend: str) -> None:
    """Every option of a group is its own: two groups train as two optimizers would."""
    first_options: dict[str, Any] = {"lr": 0.01, "capacity": 3, "amsgrad": True}
    second_options = {**OPTION_CHANGES, "capacity": 6, "amsgrad": False}
    together, apart = new_params(), new_params()
    optimizer = cls(
        [{"params": together[:2], **first_options}, {"params": together[2:], **second_options}],
        backend=backend,
    )
    first = cls(apart[:2], backend=backend, **first_options)
    second = cls(apart[2:], backend=backend, **second_options)
    for t in range(12):
        for i, (mine, theirs) in enumerate(zip(together, apart, strict=True)):
            mine.grad, theirs.grad = gradient(t, i, mine), gradient(t, i, theirs)
        for each in (optimizer, first, second):
            each.step()
    assert_same(together, apart)


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@on_each_backend
@of_each_class
def test_tensor_lr_is_a_float_lr(
    cls: type[CriticalAdam],
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    adjust_lr_fn: str | None,
) -> None:
    """A one-element tensor works as a learning rate, and may be written in place."""
    # Powers of two: the same numbers in either dtype.
    lr = torch.full(shape, 2.0**-7, dtype=dtype)
    options: dict[str, Any] = {"backend": backend, "adjust_lr_fn": adjust_lr_fn}
    optimizer = cls(new_params(), lr=lr, **options)
    twin = cls(new_params(), lr=2.0**-7, **options)
    train(optimizer, range(4))
    train(twin, range(4))
    unchanged = copy.deepcopy(optimizer)
    lr.fill_(2.0**-4)
    twin.param_groups[0]["lr"] = 2.0**-4
    train(optimizer, range(4, 8))
    train(twin, range(4, 8))
    assert_close(trained(optimizer), trained(twin), derived=())
    train(unchanged, range(4, 8))
    assert not torch.equal(params_of(optimizer)[0], params_of(unchanged)[0])
    assert lr.shape == shape
    assert bool((lr == 2.0**-4).all())


@on_each_backend
@of_each_class
def test_adjusted_lr_is_a_smaller_lr(cls: type[CriticalAdam], backend: str) -> None:
    """With betas of 0.6 the update is half as long, and weight decay is what it was.

    It follows a beta1 that changes.
    """
    options: dict[str, Any] = {"backend": backend, "decoupled_weight_decay": True}
    optimizer = cls(
        new_params(torch.float64),
        betas=(0.6, 0.99),
        weight_decay=0.5,
        adjust_lr_fn="match_rms_adamw",
        lr=0.02,
        **options,
    )
    twin = cls(new_params(torch.float64), betas=(0.6, 0.99), weight_decay=1.0, lr=0.01, **options)
    train(optimizer, range(4))
    train(twin, range(4))
    optimizer.param_groups[0]["betas"] = twin.param_groups[0]["betas"] = (0.0, 0.99)
    twin.param_groups[0].update(lr=0.02, weight_decay=0.5)
    train(optimizer, range(4, 8))
    train(twin, range(4, 8))
    torch.testing.assert_close(params_of(optimizer), params_of(twin), rtol=1e-14, atol=1e-14)


@on_each_backend
@of_each_class
def test_a_groups_lr_beside_anothers_tensor_lr(cls: type[CriticalAdam], backend: str) -> None:
    """A number stays the float64 that it is where another group's lr is a tensor.

    It went through a tensor of the default dtype; older tests gave tensors to all groups or to one.
    """
    optimizer, twin = (new_optimizer(cls, torch.float64, backend=backend) for _ in range(2))
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
    for each in (optimizer, twin):
        each.param_groups[1]["lr"] = 1e-3
        train(each, range(4))
    # Products with a 0-dim tensor may be rounded otherwise than those with a number.
    torch.testing.assert_close(params_of(optimizer), params_of(twin), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("precision", [{}, {"buffer_dtype": torch.int8}], ids=str)
@on_each_backend
@of_each_class
def test_torchs_defaults_change_nothing(
    cls: type[CriticalAdam], backend: str, precision: dict[str, Any], options: dict[str, Any]
) -> None:
    """A step and a resumption are the same whatever torch makes tensors of, and where.

    With a default device "cuda" CPU parameters had bookkeeping there; older tests set none.
    """
    optimizer, other = (
        new_optimizer(cls, backend=backend, priority_scope="group", **precision, **options)
        for _ in range(2)
    )
    train(optimizer, range(4))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, range(4, 6))
    gradients = [[gradient(t, i, p) for i, p in enumerate(params_of(other))] for t in range(6)]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            for t, grads in enumerate(gradients):
                if t == 4:
                    other.load_state_dict(other.state_dict())
                for param, grad in zip(params_of(other), grads, strict=True):
                    param.grad = grad
                other.step()
    finally:
        torch.set_default_dtype(dtype)
    assert_same(trained(optimizer), trained(other))


# 3. step()


@on_each_backend
@of_each_class
def test_step_under_no_grad(cls: type[CriticalAdam], backend: str) -> None:
    """It does not matter whether gradients are enabled around step(), which leaves none."""
    optimizer, twin = (new_optimizer(cls, backend=backend) for _ in range(2))
    train(optimizer, range(3))
    with torch.no_grad():
        train(twin, range(3))
    assert_same(trained(optimizer), trained(twin))
    assert torch.is_grad_enabled()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    assert not any(t.requires_grad or t.grad_fn for t in tensors)
    assert all(param.requires_grad and param.is_leaf for param in params_of(optimizer))


# 4. Gradients


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str
)
@on_each_backend
@of_each_class
def test_gradients_are_never_written(
    cls: type[CriticalAdam], backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """After a step every `.grad` is the same tensor, with the same bits, and was not touched."""
    optimizer = new_optimizer(cls, dtype, backend=backend, **options)
    for t in range(5):
        give_gradients(optimizer, t)
        grads = [param.grad for param in params_of(optimizer)]
        copies = [grad.clone() for grad in grads if grad is not None]
        versions = [grad._version for grad in grads if grad is not None]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params_of(optimizer), grads, strict=True))
        assert_same([p.grad for p in params_of(optimizer)], copies)
        assert [g._version for g in grads if g is not None] == versions


@pytest.mark.parametrize("eps_inside_sqrt", [True, False])
@on_each_backend
@of_each_kind
def test_zero_gradients_move_nothing(
    cls: type[CriticalAdam], backend: str, eps_inside_sqrt: bool
) -> None:
    """Zero gradients on an empty buffer, without weight decay, leave every bit where it was."""
    optimizer = new_optimizer(cls, backend=backend, eps_inside_sqrt=eps_inside_sqrt)
    before = [param.detach().clone() for param in params_of(optimizer)]
    for _ in range(7):
        for param in params_of(optimizer):
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same([param.detach() for param in params_of(optimizer)], before)


@on_each_backend
@of_each_kind
def test_zero_grad_frees_the_gradients(cls: type[CriticalAdam], backend: str) -> None:
    """The optimizer keeps no gradient alive: zero_grad() gives their memory back."""
    optimizer = new_optimizer(cls, backend=backend)
    for t in range(3):
        train(optimizer, [t])
        grads = [weakref.ref(param.grad) for param in params_of(optimizer)]
        optimizer.zero_grad()
        gc.collect()
        assert [grad() for grad in grads] == [None] * len(grads), f"after step {t + 1}"


@on_each_backend
@of_each_kind
@of_each_capacity
def test_parameter_without_gradient_takes_no_part(
    cls: type[CriticalAdam], backend: str, capacity: int
) -> None:
    """Nothing of a parameter without a gradient changes, its keys and its step count included."""
    optimizer = new_optimizer(cls, backend=backend, capacity=capacity)
    train(optimizer, range(7))
    idle = [0, 4]
    before = trained(optimizer)
    for t in range(7, 10):
        give_gradients(optimizer, t, without=idle)
        optimizer.step()
    after = trained(optimizer)
    for i in range(len(before["params"])):
        if i in idle:
            assert_same(after["params"][i], before["params"][i])
            assert_same(after["state"][i], before["state"][i])
        else:
            assert after["state"][i]["step"] == 10


# 5. Tensors replaced, added, moved


def _channels_last(data: Tensor) -> Tensor:
    return data.contiguous(memory_format=torch.channels_last) if data.ndim == 4 else data.clone()


def _reversed_dims(data: Tensor) -> Tensor:
    order = list(range(data.ndim))[::-1]
    return data.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def _within_larger_storage(data: Tensor) -> Tensor:
    storage = torch.full((*data.shape, 3), 9.0, dtype=data.dtype)
    storage[..., 1] = data
    return storage[..., 1]


REPLACEMENTS: list[Callable[[Tensor], Tensor]] = [
    torch.clone,
    _channels_last,
    _reversed_dims,
    _within_larger_storage,
]
replaced_by = pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda f: f.__name__.lstrip("_"))


@replaced_by
@pytest.mark.parametrize("when", [0, 1, 5])
@on_each_backend
@of_each_kind
@of_each_capacity
def test_replaced_data_is_followed(
    cls: type[CriticalAdam],
    backend: str,
    capacity: int,
    when: int,
    replace: Callable[[Tensor], Tensor],
) -> None:
    """A replaced `p.data`, in any layout, is stepped, and the old memory is left alone."""
    optimizer, twin = (new_optimizer(cls, backend=backend, capacity=capacity) for _ in range(2))
    train(optimizer, range(when))
    train(twin, range(when))
    old = []
    for param in params_of(optimizer):
        data = param.data
        param.data = replace(data)
        old.append((data, data.clone()))
    train(optimizer, range(when, 10))
    train(twin, range(when, 10))
    for data, value in old:
        assert_same(data, value)
    if when == 0:
        # State made after the replacement lies as the parameter does: norms are summed otherwise.
        assert_close(trained(optimizer), trained(twin), derived=())
    else:
        assert_same(trained(optimizer), trained(twin))


@on_each_backend
@of_each_kind
def test_data_written_between_steps_is_seen(cls: type[CriticalAdam], backend: str) -> None:
    """Values written into parameters between steps are what the next step starts from."""
    optimizer, twin = (new_optimizer(cls, backend=backend, weight_decay=0.1) for _ in range(2))
    for t in range(8):
        train(optimizer, [t])
        train(twin, [t])
        for mine, theirs in zip(params_of(optimizer), params_of(twin), strict=True):
            mine.data.mul_(0.5)
            theirs.data = theirs.data * 0.5
    assert_same(trained(optimizer), trained(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@of_each_kind
@of_each_capacity
def test_parameter_turned_to_half_precision(
    cls: type[CriticalAdam], capacity: int, dtype: torch.dtype
) -> None:
    """A model turned to half precision in training keeps its float32 state, on every backend."""
    runs = []
    for backend in BACKENDS:
        optimizer = new_optimizer(cls, backend=backend, capacity=capacity)
        train(optimizer, range(4))
        for param in params_of(optimizer):
            param.grad = None
            param.data = param.data.to(dtype)
        train(optimizer, range(4, 8))
        runs.append(trained(optimizer))
    for run in runs[1:]:
        for state in run["state"].values():
            assert state["exp_avg"].dtype == state["critical_buffer"].dtype == torch.float32
        # One rounding of the parameter may fall to the other side.
        torch.testing.assert_close(
            run["params"], runs[0]["params"], rtol=torch.finfo(dtype).eps, atol=1e-6
        )


def _swap_data(state: dict[str, Any], key: str) -> None:
    state[key].data = state[key].data.clone()


def _replace_entry(state: dict[str, Any], key: str) -> None:
    state[key] = state[key].clone()


@pytest.mark.parametrize("move", [_swap_data, _replace_entry])
@on_each_backend
@of_each_kind
@of_each_capacity
def test_moved_state_is_followed(
    cls: type[CriticalAdam],
    backend: str,
    capacity: int,
    move: Callable[[dict[str, Any], str], None],
) -> None:
    """A state tensor given other memory, or replaced, is followed: no stale pointer is kept."""
    optimizer, twin = (
        new_optimizer(cls, backend=backend, capacity=capacity, amsgrad=True) for _ in range(2)
    )
    train(optimizer, range(3))
    train(twin, range(3))
    old = []
    t = 3
    for key in list(optimizer.state[params_of(optimizer)[0]]):
        for state in optimizer.state.values():
            memory = state[key].detach()
            move(state, key)
            old.append((memory, memory.clone()))
        train(optimizer, [t])
        train(twin, [t])
        t += 1
    for memory, value in old:
        assert_same(memory, value)
    assert_same(trained(optimizer), trained(twin))


@on_each_backend
@of_each_kind
def test_state_written_in_place_is_seen(cls: type[CriticalAdam], backend: str) -> None:
    """Values written into the state between steps count: nothing is cached beside it."""
    optimizer, twin = (new_optimizer(cls, backend=backend, capacity=3) for _ in range(2))
    train(optimizer, range(5))
    train(twin, range(5))
    for each, in_place in ((optimizer, True), (twin, False)):
        for state in each.state.values():
            for key, value in (("step", 100.0), ("exp_avg_sq", 0.5), ("priorities", 0.25)):
                if in_place:
                    state[key].fill_(value)
                else:
                    state[key] = torch.full_like(state[key], value)
    train(optimizer, range(5, 9))
    train(twin, range(5, 9))
    assert_same(trained(optimizer), trained(twin))
    assert all(state["step"] == 104 for state in optimizer.state.values())


@on_each_backend
@of_each_kind
def test_cleared_state_starts_anew(cls: type[CriticalAdam], backend: str) -> None:
    """After `optimizer.state.clear()` training goes on as with a new optimizer."""
    optimizer = new_optimizer(cls, backend=backend)
    train(optimizer, range(6))
    optimizer.state.clear()
    twin = new_optimizer(cls, backend=backend)
    for mine, theirs in zip(params_of(optimizer), params_of(twin), strict=True):
        theirs.data = mine.detach().clone()
    train(optimizer, range(6, 12))
    train(twin, range(6, 12))
    assert_same(trained(optimizer), trained(twin))


@on_each_backend
@of_each_kind
def test_group_added_later(cls: type[CriticalAdam], backend: str) -> None:
    """A group added in training starts at step 0 and leaves the others as they are."""
    optimizer = new_optimizer(cls, backend=backend)
    twin = new_optimizer(cls, backend=backend)
    train(optimizer, range(4))
    train(twin, range(4))
    added, alone = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    optimizer.add_param_group({"params": [added], "lr": 0.5, "capacity": 2})
    assert optimizer.param_groups[-1]["priority_decay"] == 0.7
    lone = cls([alone], lr=0.5, capacity=2, backend=backend)
    for t in range(4, 10):
        give_gradients(optimizer, t)
        give_gradients(twin, t)
        alone.grad = gradient(t, len(params_of(twin)), alone)
        for each in (optimizer, twin, lone):
            each.step()
    got = trained(optimizer)
    assert_same(got["params"][:-1], trained(twin)["params"])
    assert_same(got["params"][-1], alone.detach())
    assert_same(got["state"][5], lone.state_dict()["state"][0])


@of_each_kind
@of_each_capacity
@pytest.mark.parametrize(("start", "other"), list(itertools.permutations(BACKENDS, 2)))
def test_switched_backend(cls: type[CriticalAdam], capacity: int, start: str, other: str) -> None:
    """Switching a group's backend in training, back and forth, changes roundings alone."""
    optimizer, twin = (new_optimizer(cls, capacity=capacity, backend=start) for _ in range(2))
    for t in range(20):
        for group in optimizer.param_groups:
            group["backend"] = start if (t // 4) % 2 == 0 else other
        train(optimizer, [t])
        train(twin, [t])
    assert_close(trained(optimizer), trained(twin))


# 6. Copies


def _pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("when", [0, 1, 2, 5, 7])
@on_each_backend
@of_each_kind
@of_each_capacity
def test_copy_trains_on_identically(
    cls: type[CriticalAdam],
    backend: str,
    capacity: int,
    when: int,
    make_copy: Callable[[CriticalAdam], CriticalAdam],
) -> None:
    """A copy made while a commit is pending trains on to the bit, and so does the original."""
    optimizer, twin = (new_optimizer(cls, backend=backend, capacity=capacity) for _ in range(2))
    train(optimizer, range(when))
    train(twin, range(when))
    copied = make_copy(optimizer)
    assert type(copied) is cls
    for each in (optimizer, twin, copied):
        train(each, range(when, 12))
    assert_same(trained(optimizer), trained(twin))
    assert_same(trained(copied), trained(twin))


@pytest.mark.parametrize("make_copy", [copy.deepcopy, _pickled])
@on_each_backend
@of_each_class
def test_copy_has_the_options_of_the_original(
    cls: type[CriticalAdam], backend: str, make_copy: Callable[[CriticalAdam], CriticalAdam]
) -> None:
    """The backend too, and none that `cls(params, **defaults)` does not know."""
    optimizer = new_optimizer(cls, backend=backend)
    train(optimizer, range(2))
    copied = make_copy(optimizer)
    assert copied.defaults == optimizer.defaults
    cls(new_params(), **copied.defaults)
    assert [list(group) for group in copied.param_groups] == [
        list(group) for group in optimizer.param_groups
    ]
    assert [group["backend"] for group in copied.param_groups] == [backend, backend]
    assert repr(copied).splitlines()[-2:] == repr(optimizer).splitlines()[-2:]


@on_each_backend
@of_each_kind
def test_deleted_optimizer_releases_its_tensors(cls: type[CriticalAdam], backend: str) -> None:
    """Neither the optimizer nor the library keeps parameters or state alive after its end."""
    optimizer = new_optimizer(cls, backend=backend)
    train(optimizer, range(4))
    tensors = [weakref.ref(param) for param in params_of(optimizer)]
    tensors += [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
    alive = [tensor() is not None for tensor in tensors]
    assert all(alive)
    del optimizer
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


@on_each_backend
@of_each_kind
def test_replaced_state_is_released(cls: type[CriticalAdam], backend: str) -> None:
    """State that was cleared is given back at the next step at the latest."""
    optimizer = new_optimizer(cls, backend=backend)
    train(optimizer, range(4))
    tensors = [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
    optimizer.state.clear()
    train(optimizer, [4])
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


# Beside the contract's list


@on_each_backend
@of_each_kind
def test_step_moves_version_counters(cls: type[CriticalAdam], backend: str) -> None:
    """The version counter of every stepped parameter moves, and of no other."""
    optimizer = new_optimizer(cls, backend=backend)
    for t in range(3):
        give_gradients(optimizer, t, without=[1])
        before = [param._version for param in params_of(optimizer)]
        optimizer.step()
        moved = [p._version > v for p, v in zip(params_of(optimizer), before, strict=True)]
        assert moved == [True, False, True, True, True]


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, _pickled])
@on_each_backend
def test_state_copies_as_a_plain_dict(make_copy: Callable[[Any], Any], backend: str) -> None:
    """`optimizer.state` and its entries are copied and pickled as torch's defaultdict of dicts."""
    optimizer = new_optimizer(AdamCM, backend=backend)
    train(optimizer, range(3))
    copied = make_copy(optimizer.state)
    assert isinstance(copied, defaultdict)
    assert_same(list(copied.values()), list(optimizer.state.values()))
    entry = optimizer.state[params_of(optimizer)[0]]
    assert_same(make_copy(entry), entry)
    assert_same(entry.copy(), entry)
