"""Parameters of tensor subclasses that wrap other tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from cm_fused import AdamCM
from cm_fused._backends import select as _backend
from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import BACKENDS, KINDS, ROUNDING

FUSED = [name for name in BACKENDS if name != "eager"]
ASKED: list[dict[str, Any]] = [*({"backend": name} for name in FUSED), {"fused": True}]


def _wrapped(value: Tensor) -> Tensor:
    """Return a wrapper of two tensors that differ, and have one norm."""
    return TwoTensor(value.clone(), -value)  # type: ignore[no-untyped-call]


def _trained(
    cls: type[CriticalAdam], sign: float | None, **options: Any
) -> tuple[CriticalAdam, list[Tensor]]:
    """Return an optimizer and its two parameters after some steps.

    The first one is a wrapper where `sign` is None, else one of the tensors inside.
    """
    generator = torch.Generator().manual_seed(0)

    def first(value: Tensor) -> Tensor:
        return _wrapped(value) if sign is None else sign * value

    params = [
        torch.nn.Parameter(first(torch.randn(3, 4, generator=generator))),
        torch.nn.Parameter(torch.randn(5, generator=generator)),
    ]
    optimizer = cls(params, lr=1e-2, capacity=3, **options)
    for scale in (1.0, 4.0, 0.25, 2.0, 8.0, 0.01):
        params[0].grad = first(scale * torch.randn(3, 4, generator=generator))
        params[1].grad = scale * torch.randn(5, generator=generator)
        optimizer.step()
    return optimizer, list(params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "eager"},
        {"max_grad_norm": 1.0, "skip_nonfinite": True},
        {"priority_scope": "tensor", "amsgrad": True},
        {"moment_dtype": torch.bfloat16, "buffer_dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.filterwarnings("ignore:cm_fused steps with the slow eager backend")
def test_a_wrapper_is_stepped_as_the_tensors_inside(
    cls: type[CriticalAdam], options: dict[str, Any]
) -> None:
    """Each tensor inside, and a plain parameter beside, is stepped as without the wrapper.

    The older tests had no subclass with tensors inside: the backend was chosen by device, and an
    operator ran once for each of them, with one step count, and slots were of plain tensors.
    """
    optimizer, (param, beside) = _trained(cls, None, **options)
    reference = {**options, "backend": "eager"}
    _, (first, expected) = _trained(cls, 1.0, **reference)
    _, (second, _) = _trained(cls, -1.0, **reference)
    assert isinstance(param, TwoTensor)
    torch.testing.assert_close(param.a, first.detach(), **ROUNDING)
    torch.testing.assert_close(param.b, second.detach(), **ROUNDING)
    torch.testing.assert_close(beside, expected, **ROUNDING)
    for state in optimizer.state.values():
        assert state["step"] == 6
    assert "critical_sum" not in optimizer.state[param]
    assert isinstance(optimizer.state[param]["critical_buffer"], TwoTensor)


def test_the_reference_for_a_wrapper_is_said() -> None:
    """The first step warns once, and the repr names the backend. No test had such parameters."""
    _backend._warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match="slow eager backend for TwoTensor parameters") as warned:
        optimizer, _ = _trained(AdamCM, None)
    assert len(warned) == 1
    assert repr(optimizer).endswith("Active backends: eager on cpu, cpu on cpu\n)")


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_fused_backend_refuses_a_wrapper(asked: dict[str, Any]) -> None:
    """The constructor, an added group and a step refuse it, and name it; nothing changes.

    The older tests refused backends by device alone.
    """
    param = torch.nn.Parameter(_wrapped(torch.ones(4)))
    plain = torch.nn.Parameter(torch.ones(4))
    message = r"of group 0 must be a plain tensor for (backend|fused)=.*, got a TwoTensor"
    with pytest.raises(RuntimeError, match=f"^parameter 1 {message}"):
        AdamCM([plain, param], **asked)
    with pytest.raises(RuntimeError, match=f"^weight {message}"):
        AdamCM([("bias", plain), ("weight", param)], **asked)
    optimizer = AdamCM([plain])
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 must be a plain tensor"):
        optimizer.add_param_group({"params": [param], **asked})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [param]})
    optimizer.param_groups[1].update(asked)
    param.grad = _wrapped(torch.ones(4))
    with pytest.raises(RuntimeError, match="parameter 0 of group 1 must be a plain tensor"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(
    "options",
    [{"moment_dtype": "int8"}, {"buffer_dtype": "float8_e4m3fn"}, {"buffer_dtype": "int4"}],
    ids=str,
)
def test_a_wrapper_has_no_scales(options: dict[str, Any]) -> None:
    """State with scales is refused: its scales were those of one of the tensors inside.

    The older tests had no subclass with tensors inside. Then names of dtypes, which the constructor
    turns to dtypes, were let through where they were set by hand.
    """
    (name,) = options
    param = torch.nn.Parameter(_wrapped(torch.ones(4)))
    with pytest.raises(ValueError, match=f"{name} must be a dtype without scales"):
        AdamCM([param], **options)
    optimizer = AdamCM([param])
    optimizer.param_groups[0].update(options)
    param.grad = _wrapped(torch.ones(4))
    with pytest.raises(RuntimeError, match=f"{name} must be a dtype without scales"):
        optimizer.step()
    assert isinstance(param, TwoTensor)
    assert torch.equal(param.a, torch.ones(4))


@pytest.mark.filterwarnings("ignore:cm_fused steps with the slow eager backend")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_a_compiled_step_of_a_wrapper() -> None:
    """A traced step chooses as an eager one does.

    The older tests compiled steps of plain tensors, complex ones and DTensors.
    """
    steps = []
    for compiled in (False, True):
        torch._dynamo.reset()
        param = torch.nn.Parameter(_wrapped(torch.ones(4)))
        optimizer = AdamCM([param])
        param.grad = _wrapped(torch.ones(4))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            step()
        assert optimizer.state[param]["step"] == 3
        assert isinstance(param, TwoTensor)
        steps.append((param.a.detach(), param.b.detach()))
    torch.testing.assert_close(*steps)
