"""What torch tests its own optimizers for, asked of ours through torch's descriptions of them.

`torch.testing._internal.common_optimizers` has the inputs and errors that torch's `test_optim.py`
goes through; the test bodies are not shipped, so that the behaviours are written out here. Each
runs over every configuration of every class.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.support.training import assert_same

pytest.importorskip("expecttest", reason="pip install expecttest, which torch's test data needs")
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)


def _inputs(device: str, dtype: Any = None) -> list[OptimizerInput]:
    """Return configurations as torch has them for Adam, and those that only we have."""
    ours: list[dict[str, Any]] = [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": torch.tensor(0.01), "amsgrad": True},
        {"capacity": 2, "priority_scope": "tensor", "buffer_mean": "size"},
        {"max_grad_norm": 1.0, "skip_nonfinite": True, "eps_inside_sqrt": False},
    ]
    params: Any = None  # the test's
    return [OptimizerInput(params, kwargs, desc=str(kwargs)) for kwargs in ours]


def _compat_inputs(device: str, dtype: Any = None) -> list[OptimizerInput]:
    ours: list[dict[str, Any]] = [{}, {"weight_decay": 0.1, "amsgrad": True, "synced": False}]
    params: Any = None  # the test's
    return [OptimizerInput(params, kwargs, desc=str(kwargs)) for kwargs in ours]


def _errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    errors: Any = get_error_inputs_for_all_optims
    return list(errors(device, dtype))


_CLASSES: tuple[Any, ...] = (AdamCM, AdamWCM, AdamCG, AdamWCG, Adam_CM, Adam_C)
DB = [
    OptimizerInfo(
        cls,
        optim_inputs_func=_compat_inputs if cls in (Adam_CM, Adam_C) else _inputs,
        optim_error_inputs_func=_errors,
        supported_impls=(),
        not_og_supported_flags=(),
        has_capturable_arg=cls not in (Adam_CM, Adam_C),
        supports_complex=True,
    )
    for cls in _CLASSES
]
CONFIGS = [(info, config) for info in DB for config in info.optim_inputs_func("cpu")]
of_each_config = pytest.mark.parametrize(
    ("info", "config"), CONFIGS, ids=[f"{info.name}-{config.desc}" for info, config in CONFIGS]
)
of_each_class = pytest.mark.parametrize("info", DB, ids=[info.name for info in DB])


def _cls(info: OptimizerInfo) -> Any:
    return info.optim_cls


def _make(info: OptimizerInfo, config: OptimizerInput, params: Any) -> Any:
    return _cls(info)(params, **copy.deepcopy(config.kwargs))


def _params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2), (4,), ())
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    if dtype.is_complex:
        values = [torch.complex(value, value.flip(0) if value.ndim else -value) for value in values]
    return [nn.Parameter(value.to(dtype)) for value in values]


def _step(optimizer: Any, t: int) -> None:
    generator = torch.Generator().manual_seed(t + 1)
    for group in optimizer.param_groups:
        for param in group["params"]:
            noise = torch.randn(param.shape, generator=generator)
            param.grad = noise.to(param.dtype).as_strided(param.shape, param.stride())
    optimizer.step()


# Errors


@pytest.mark.parametrize(
    ("info", "error"),
    [
        pytest.param(info, error, id=f"{info.name}-{error.optimizer_error_input.desc}")
        for info in DB
        for error in info.optim_error_inputs_func("cpu", torch.float32)
    ],
)
def test_errors(info: OptimizerInfo, error: ErrorOptimizerInput) -> None:
    """What torch's optimizers refuse, ours do, in words that torch's tests accept."""
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [nn.Parameter(torch.randn(1))]
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            _cls(info)(params, **given.kwargs)
        return
    with pytest.raises(error.error_type, match=error.error_regex):
        _cls(info)(params, **given.kwargs)


# State dicts


@of_each_class
def test_state_dict_hooks(info: OptimizerInfo) -> None:
    """Hooks before and after saving and loading run, in order, and may replace what is passed."""
    optimizer = _cls(info)(_params())
    _step(optimizer, 0)
    calls: list[str] = []
    seen: dict[str, Any] = {}

    def on_save(optimizer: Optimizer, state_dict: Any) -> Any:
        calls.append("saved")
        assert_same(seen.setdefault("saved", copy.deepcopy(state_dict)), state_dict)
        return {**state_dict, "note": 1}

    def on_load(optimizer: Optimizer, state_dict: Any) -> Any:
        calls.append("loading")
        assert state_dict["note"] == 1
        groups = [{**group, "lr": 0.125} for group in state_dict["param_groups"]]
        return {"state": state_dict["state"], "param_groups": groups}

    optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("saving"))
    optimizer.register_state_dict_post_hook(on_save)
    optimizer.register_load_state_dict_pre_hook(on_load)
    optimizer.register_load_state_dict_post_hook(lambda optimizer: calls.append("loaded"))
    state_dict = optimizer.state_dict()
    assert_same(state_dict, {**seen["saved"], "note": 1})
    assert calls == ["saving", "saved"]
    optimizer.load_state_dict(state_dict)
    assert calls == ["saving", "saved", "loading", "loaded"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.125]
    assert [group["lr"] for group in state_dict["param_groups"]] == [0.001]


# Param groups


@of_each_class
def test_groups_and_defaults(info: OptimizerInfo) -> None:
    """A group's options come before the defaults, which fill what it lacks, also when added."""
    first, second, third = _params()
    optimizer = _cls(info)(
        [{"params": [first], "lr": 0.5}, {"params": second, "betas": (0.5, 0.6)}], lr=0.25
    )
    optimizer.add_param_group({"params": third, "weight_decay": 0.125})
    groups = optimizer.param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.25, 0.25]
    assert [group["betas"][0] for group in groups] == [0.9, 0.5, 0.9]
    assert groups[2]["weight_decay"] == 0.125
    assert len({frozenset(group) for group in groups}) == 1
    _step(optimizer, 0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [first]})
    assert len(optimizer.param_groups) == 3


@of_each_class
def test_named_parameters(info: OptimizerInfo) -> None:
    """Names are kept, saved and loaded."""
    model = nn.Linear(3, 2)
    optimizer = _cls(info)(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    _step(optimizer, 0)
    other = _cls(info)(nn.Linear(3, 2).named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


@of_each_class
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(info: OptimizerInfo, shape: tuple[int, ...]) -> None:
    """A learning rate in a tensor is the number, which a scheduler changes in place."""
    runs = []
    for lr in (0.05, torch.full(shape, 0.05, dtype=torch.float64)):
        optimizer = _cls(info)(_params(), lr=lr)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for t in range(4):
            _step(optimizer, t)
            scheduler.step()
        runs.append([param.detach() for param in optimizer.param_groups[0]["params"]])
    torch.testing.assert_close(runs[0], runs[1])


# Parameters


@of_each_config
def test_complex(info: OptimizerInfo, config: OptimizerInput) -> None:
    """A complex parameter steps as its pair of reals."""
    complex_params = _params(torch.complex64)
    real_params = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in complex_params]
    optimizers = [_make(info, config, params) for params in (complex_params, real_params)]
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        for param, pair in zip(complex_params, real_params, strict=True):
            pair.grad = torch.randn(pair.shape, generator=generator)
            param.grad = torch.view_as_complex(pair.grad)
        for optimizer in optimizers:
            optimizer.step()
    for param, pair in zip(complex_params, real_params, strict=True):
        torch.testing.assert_close(torch.view_as_real(param.detach()), pair.detach())


@of_each_config
def test_mixed_dtypes(info: OptimizerInfo, config: OptimizerInput) -> None:
    """Each of a group's dtypes keeps its own; together they step as they do in scope "tensor"."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
    params = [param for dtype in dtypes for param in _params(dtype)]
    before = [param.detach().clone() for param in params]
    optimizer = _make(info, config, params)
    # Enough for half precision to move.
    optimizer.param_groups[0]["lr"] = 0.1
    for t in range(8):
        _step(optimizer, t)
    for param, old in zip(params, before, strict=True):
        assert param.dtype == old.dtype
        assert bool(
            torch.isfinite(torch.view_as_real(param) if param.is_complex() else param).all()
        )
        assert not torch.equal(param, old)


@of_each_config
def test_gradients_that_are_missing_or_empty(info: OptimizerInfo, config: OptimizerInput) -> None:
    """None takes no part; a parameter without elements does, to no effect."""
    params = [*_params(), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))]
    optimizer = _make(info, config, params)
    for t in range(4):
        _step(optimizer, t)
        before = params[-1].detach().clone()
        for param in params[:-1]:
            param.grad = torch.ones_like(param)
        params[-1].grad = None
        optimizer.step()
        assert torch.equal(params[-1], before)
    optimizer.zero_grad()
    before_all = [param.detach().clone() for param in params]
    optimizer.step()
    assert_same([param.detach() for param in params], before_all)


# Around the step


@of_each_class
def test_step_hooks(info: OptimizerInfo) -> None:
    """Global and own hooks run once a step, in torch's order."""
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda optimizer, args, kwargs: calls.append(name)

    optimizer = _cls(info)(_params())
    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
    ]
    _step(optimizer, 0)
    for handle in handles:
        handle.remove()
    _step(optimizer, 1)
    assert calls == ["global pre", "pre", "post", "global post"]


@of_each_class
def test_profiler_ranges(info: OptimizerInfo) -> None:
    """A profile has one range for step and one for zero_grad, by torch's names."""
    optimizer = _cls(info)(_params())
    _step(optimizer, 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    # torch 2.11 warns of events that it drops without.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.key for event in profile.key_averages()]
    cls = info.name
    assert f"Optimizer.step#{cls}.step" in names
    assert f"Optimizer.zero_grad#{cls}.zero_grad" in names


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@of_each_class
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(info: OptimizerInfo, scheduler: str) -> None:
    """Schedulers drive ours as they drive AdamW, betas too, and a loss goes down."""
    groups = []
    for cls in (_cls(info), torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        inputs = torch.randn(32, 3)
        optimizer = cls(model.parameters(), lr=0.03, betas=(0.9, 0.99))
        this = SCHEDULERS[scheduler](optimizer)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            this.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        groups.append({name: optimizer.param_groups[0][name] for name in ("lr", "betas")})
        assert losses[-1] < losses[0]
    assert_same(groups[0], groups[1])


@of_each_class
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models(info: OptimizerInfo, average: str) -> None:
    """SWA and EMA wrappers follow the parameters, and go on after the optimizer is reloaded."""
    torch.manual_seed(0)
    model: Any = nn.Linear(3, 1)
    optimizer = _cls(info)(model.parameters(), lr=0.1)
    ema: Any = swa_utils.get_ema_multi_avg_fn
    how = ema(0.5) if average == "ema" else None
    averaged: Any = swa_utils.AveragedModel(model, multi_avg_fn=how)
    expected = model.weight.detach().clone()
    for t in range(4):
        _step(optimizer, t)
        averaged.update_parameters(model)
        weight = {"ema": 0.5 if t else 1.0, "swa": 1 / (t + 1)}[average]
        expected.lerp_(model.weight.detach(), weight)
        optimizer.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(averaged.module.weight.detach(), expected)


@of_each_class
def test_grad_mode_and_closure(info: OptimizerInfo) -> None:
    """The closure has gradients, its loss is returned, and the mode around stays what it was."""
    params = _params()
    optimizer = _cls(info)(params)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss)
        return loss

    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            assert optimizer.step(closure) is losses[-1]
            assert torch.is_grad_enabled() == mode
    assert len(losses) == 2


@of_each_class
def test_non_contiguous_parameters(info: OptimizerInfo) -> None:
    """Strides make no difference to the values."""
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.clone(),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], -1)[..., 0],
    ]
    runs = []
    start = torch.linspace(-1, 1, 12).reshape(3, 4)
    for param_layout, grad_layout in itertools.product(layouts, layouts):
        param = nn.Parameter(param_layout(start))
        optimizer = _cls(info)([param], lr=0.1)
        for t in range(4):
            param.grad = grad_layout((start * (t + 1)).sin())
            optimizer.step()
        runs.append(param.detach().contiguous())
    for run in runs[1:]:
        assert_same(run, runs[0])
