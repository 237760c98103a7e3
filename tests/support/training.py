"""Small trainings for the behavioural tests: optimizers, gradients and comparisons as functions."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM
from cm_fused._optimizer.base import CriticalAdam
from tests.support import cases

CLASSES: tuple[type[CriticalAdam], ...] = (AdamCM, AdamWCM, AdamCG, AdamWCG)
KINDS: tuple[type[CriticalAdam], ...] = (AdamCM, AdamCG)
# Those that step CPU tensors in this process: triton where its kernels are interpreted.
BACKENDS = tuple(
    name
    for name in cases.BACKENDS
    if name != "triton"
    or (cases.skip_reason(backend=name) is None and cases.device_of(name).type == "cpu")
)

# One tensor of each kind that backends tell apart; the last two make the second group.
SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (), (0, 2), (2, 3, 2, 2), (5,))
NUM_FIRST_GROUP = 3

# Scales of the gradients, so that a buffer of three fills, replaces, and skips steps 6 and 7.
SCALES = (1.0, 4.0, 0.25, 2.0, 8.0, 0.5, 0.01, 0.01, 3.0)

# Two implementations that round differently, after a few dozen steps from parameters of order 1.
ROUNDING: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-5}


def new_params(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[torch.nn.Parameter]:
    """Return parameters, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(_randn(shape, dtype, generator)) for shape in shapes]


def new_optimizer(
    cls: type[CriticalAdam],
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **options: Any,
) -> CriticalAdam:
    """Return an optimizer of new parameters in two groups that differ in their learning rate."""
    params = new_params(dtype, shapes)
    lr = options.pop("lr", 1e-2)
    first, second = params[:NUM_FIRST_GROUP], params[NUM_FIRST_GROUP:]
    groups: list[dict[str, Any]] = [{"params": first}]
    if second:
        groups.append({"params": second, "lr": 2 * lr})
    return cls(groups, lr=lr, **options)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def gradient(t: int, i: int, param: Tensor) -> Tensor:
    """Return the gradient of parameter i at step t: noise that these two numbers determine."""
    generator = torch.Generator().manual_seed(1000 * t + i)
    noise = _randn(tuple(param.shape), param.dtype, generator)
    return noise * SCALES[t % len(SCALES)]


def set_gradient(param: Tensor, grad: Tensor) -> None:
    """Set a gradient of another dtype, which needs no `Tensor.grad_dtype` of newer torches."""
    data = param.data
    param.grad = None
    param.data = torch.empty_like(data, dtype=grad.dtype)
    param.grad = grad
    param.data = data


def give_gradients(optimizer: Optimizer, t: int, without: Iterable[int] = ()) -> None:
    """Set the gradients of step t; parameters in `without` get none."""
    skipped = set(without)
    for i, param in enumerate(params_of(optimizer)):
        param.grad = None if i in skipped else gradient(t, i, param)


def train(optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Take these steps."""
    for t in steps:
        give_gradients(optimizer, t)
        optimizer.step()


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of the parameters, the state as it is inside, and the groups' options."""
    params = params_of(optimizer)
    return {
        "params": [param.detach().clone() for param in params],
        "state": [copy.deepcopy(optimizer.state.get(param, {})) for param in params],
        "groups": [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "members": [[id(param) for param in group["params"]] for group in optimizer.param_groups],
    }


def trained(optimizer: Optimizer) -> dict[str, Any]:
    """Return a copy of what a run leaves: the parameters and the state dict."""
    return {
        "params": [param.detach().clone() for param in params_of(optimizer)],
        "state": copy.deepcopy(optimizer.state_dict()["state"]),
    }


def assert_same(got: object, expected: object, where: str = "") -> None:
    """Check that two nests of tensors and plain values agree in every bit, dtype and key."""
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor), where
        torch.testing.assert_close(
            got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, Mapping):
        assert isinstance(got, Mapping), where
        assert set(got) == set(expected), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert isinstance(got, type(expected)), where
        assert len(got) == len(expected), where
        for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
            assert_same(mine, theirs, f"{where}[{i}]")
    else:
        assert got == expected, where


def assert_close(
    got: Mapping[str, Any],
    expected: Mapping[str, Any],
    derived: Iterable[str] = ("critical_sum", "pending_slot"),
) -> None:
    """Check that two `trained` agree to rounding, and exactly in the steps.

    Args:
        got: One run.
        expected: The other.
        derived: Keys of the state that only some backends keep; not compared.
    """
    torch.testing.assert_close(got["params"], expected["params"], **ROUNDING)
    assert set(got["state"]) == set(expected["state"])
    for index, state in expected["state"].items():
        keys = set(state).difference(derived)
        assert set(got["state"][index]).difference(derived) == keys
        for key in keys:
            torch.testing.assert_close(
                got["state"][index][key],
                state[key],
                msg=partial("state[{}][{!r}]: {}".format, index, key),
                **(ROUNDING if key != "step" else {"rtol": 0, "atol": 0}),
            )


def _randn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    exact = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=exact, generator=generator).to(dtype)
