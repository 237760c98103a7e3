"""Gradient release beside DDP, and torch's own way under it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm_fused import AdamCM, enable_gradient_release
from tests.support.sharded.common import assert_same_on_both, case


def _release_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def _released_in_ddp(
    when: str, wrap: Callable[[nn.Module], nn.Module]
) -> tuple[Callable[[], nn.Module], nn.Module, AdamCM]:
    """Return what enables gradient release and returns what is called, the model, the optimizer."""
    model = _release_model()
    optimizer = AdamCM(model.parameters(), lr=0.03, priority_scope="tensor")

    def called() -> nn.Module:
        wrapped: nn.Module = model
        if when in ("the wrapper", "before"):
            wrapped = wrap(model)
        elif when == "a submodule":
            model[2] = wrap(model[2])
        enable_gradient_release(wrapped if when == "the wrapper" else model, optimizer)
        if when == "after":
            wrapped = wrap(model)
        elif when == "a submodule after":
            model[2] = wrap(model[2])
        elif when == "a larger one after":
            wrapped = wrap(nn.Sequential(model, nn.Linear(1, 1)))
        return wrapped

    return called, model, optimizer


@case(2, 1)
def gradient_release_refuses_ddp(_: Path) -> None:
    """Each rank stepped with its own gradients: the older tests ran it on one process alone.

    The user enables it for the wrapper, for what it wraps, or wraps later, compiled or not.
    """
    times = ("the wrapper", "before", "a submodule", "after", "a submodule after")
    wraps: dict[str, Callable[[Any], Any]] = {
        "ddp": DistributedDataParallel,
        "of compiled": lambda m: DistributedDataParallel(torch.compile(m, backend="aot_eager")),
        "compiled": lambda m: torch.compile(DistributedDataParallel(m), backend="aot_eager"),
    }
    cases = [(when, "ddp") for when in (*times, "a larger one after")]
    cases += [("before", name) for name in wraps] + [("after", name) for name in wraps]
    for when, name in cases:
        torch._dynamo.reset()
        enable, model, optimizer = _released_in_ddp(when, wraps[name])
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(RuntimeError, match="_apply_optimizer_in_backward"):
            enable()(torch.ones(3, 4)).sum().backward()
        assert not optimizer.state, (when, name)
        assert all(map(torch.equal, model.parameters(), before)), (when, name)
    torch._dynamo.reset()


@case(2)
def gradient_release_beside_ddp(_: Path) -> None:
    """A model that DDP only calls, whose parameters it does not reduce, is served."""
    own, reduced = _release_model(), nn.Linear(4, 4)
    optimizer = AdamCM(own.parameters(), priority_scope="tensor")
    enable_gradient_release(own, optimizer)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduced = reduced

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = own(self.reduced(x))
            return out

    DistributedDataParallel(Calls())(torch.ones(3, 4)).sum().backward()
    assert len(optimizer.state) == 4
    assert reduced.weight.grad is not None


@case(2)
def torchs_optimizer_in_backward_under_ddp(_: Path) -> None:
    """The way of torch itself steps with the averaged gradients: the bits of steps after backward.

    It steps in a stream of the accelerator, which has nothing to do where the model is on the CPU.
    """
    from torch.distributed.optim.apply_optimizer_in_backward import (
        _apply_optimizer_in_backward,
    )

    options = {"lr": 0.03, "priority_scope": "tensor"}
    trained = []
    for in_backward in (True, False):
        model = _release_model()
        optimizer: AdamCM | None = None
        if in_backward:
            _apply_optimizer_in_backward(AdamCM, model.parameters(), options)
        else:
            optimizer = AdamCM(model.parameters(), **options)  # type: ignore[arg-type]
        ddp = DistributedDataParallel(model)
        streams = mock.patch("torch.accelerator.current_stream"), mock.patch("torch.Stream")
        with streams[0], streams[1] as stream:
            stream.return_value = contextlib.nullcontext()
            for t in range(6):
                torch.manual_seed(10 * t + dist.get_rank())
                ddp(torch.randn(8, 4)).square().mean().backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
        trained.append([param.detach().clone() for param in model.parameters()])
    for mine, expected in zip(*trained, strict=True):
        assert torch.equal(mine, expected)
        assert_same_on_both(mine)
