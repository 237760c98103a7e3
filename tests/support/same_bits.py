"""Runs of the C++ and the Triton step side by side, whose bits are compared after each step."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cm_fused._optimizer import planned
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import copy_of, device_of, make_params, normal_like, real
from tests.support.training import set_gradient

Class = type[CriticalAdam]
# What AMP multiplies a loss by.
_SCALE = 1024.0


@dataclass(frozen=True)
class Case:
    """One run with both backends.

    Attributes:
        cls: The optimizer's class.
        options: Its keywords away from their defaults.
        dtype: Of the parameters.
        lengths: Of the parameters.
        layout: How they lie in memory: "" (whole and aligned), "shifted" by one element
            (gradients by two), "transposed" or "gaps".
        amp: Whether gradients are scaled, and steps with one that is not finite left out.
        shard: The numbers of `cm_fused.philox.ShardLayout` of every parameter, or none.
        changed: What of the options is changed once sums are rebuilt.
        grad_dtype: Of the gradients, if not the parameters'.
    """

    cls: Class
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (5, 257)
    layout: str = ""
    amp: bool = False
    shard: tuple[int, ...] = ()
    changed: dict[str, Any] = field(default_factory=dict)
    grad_dtype: torch.dtype | None = None

    @property
    def capacity(self) -> int:
        """The slots of each buffer; of 3 float32 a running sum is kept."""
        return int(self.options.get("capacity", 3))

    @property
    def name(self) -> str:
        """What the test's id says of it."""
        options = [f"{key}={_short(value)}" for key, value in self.options.items()]
        lengths = "+".join(map(str, self.lengths))
        special = [_short(self.grad_dtype)] if self.grad_dtype else []
        special += [*filter(None, [self.layout]), *["amp"] * self.amp, *map(str, self.shard)]
        return "-".join([self.cls.__name__, _short(self.dtype), *options, *special, lengths])

    def make(self, params: list[Tensor], backend: str) -> CriticalAdam:
        """Return the optimizer."""
        options = {"lr": 0.05, "capacity": self.capacity, "seed": 2**40 + 3, **self.options}
        return self.cls(params, **options, amp_scaling=self.amp, backend=backend)

    def make_params(self) -> list[Tensor]:
        """Return the parameters."""
        made = make_params([(length,) for length in self.lengths], self.dtype, seed=2)
        return [self._laid_out(param) for param in made]

    def _laid_out(self, tensor: Tensor, shift: int = 1) -> Tensor:
        length = tensor.numel()
        if self.layout == "shifted":
            return torch.empty(length + 4, dtype=tensor.dtype)[shift:][:length].copy_(tensor)
        if self.layout == "transposed":
            return tensor.view(-1, 1 if length % 2 else 2).t()
        if self.layout == "gaps":
            return torch.empty(2 * length, dtype=tensor.dtype)[::2].copy_(tensor)
        return tensor

    def gradients(self) -> Iterator[list[Tensor]]:
        """Yield the gradients of 2 C + 3 steps; the last but one is not finite."""
        source = torch.Generator().manual_seed(1)
        params = make_params([(length,) for length in self.lengths], self.dtype)
        steps = 2 * self.capacity + 3
        for step, scale in zip(range(steps), itertools.cycle((1.0, 0.5, 2.0, 0.0, 0.25, 4.0))):
            grads = [normal_like(param, scale, source) for param in params]
            for grad in filter(len, map(real, grads)):
                grad.view(-1)[0] = -0.0
                if step == steps - 2:
                    grad.view(-1)[-1] = torch.inf if len(grad) % 2 else torch.nan
            yield grads

    def take_step(
        self, optimizer: CriticalAdam, params: list[Tensor], grads: list[Tensor], step: int
    ) -> None:
        """Take a step of either backend."""
        for param, grad in zip(params, grads, strict=True):
            at = grad.to(param.device)
            grad = at * _SCALE if self.amp else at.clone()
            grad = self._laid_out(grad.to(self.grad_dtype or grad.dtype), shift=2)
            set_gradient(param, grad.view_as(param))
            if step == 1:
                # Sums are rebuilt once in 4 C steps: the run comes to the next.
                optimizer.state[param]["step"] += 2 * self.capacity
        if step == self.capacity + 3:
            optimizer.param_groups[0].update(self.changed)
        if self.amp:
            finite = all(grad.isfinite().all() for grad in grads)
            scalars = {"grad_scale": _SCALE, "found_inf": float(not finite)}
            for name, value in scalars.items():
                setattr(optimizer, name, torch.tensor(value, device=params[0].device))
        optimizer.step()


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def _state(optimizer: CriticalAdam, params: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and their state as it lies in memory, a commit that is due included."""
    for i, param in enumerate(params):
        yield f"params[{i}]", param
        for key, value in sorted(optimizer.state[param].items()):
            yield f"state[{i}][{key!r}]", value


def _saved(optimizer: CriticalAdam) -> Iterator[tuple[str, Tensor]]:
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in sorted(state.items()):
            yield f"state_dict: state[{i}][{key!r}]", value


def bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes on the CPU, with one NaN for all."""
    values = real(tensor).cpu().contiguous().reshape(-1)
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):
        values = (
            torch.where(values.isnan(), torch.nan, values) if values.is_floating_point() else values
        )
    return values.view(torch.uint8)


def check_bits(
    actual: Iterator[tuple[str, Tensor]], expected: Iterator[tuple[str, Tensor]], where: str = ""
) -> None:
    """Raise where named tensors do not have the same bits."""
    for (name, value), (expected_name, expected_value) in zip(actual, expected, strict=True):
        assert name == expected_name
        assert value.dtype == expected_value.dtype, name
        bits, expected_bits = bits_of(value), bits_of(expected_value)
        assert torch.equal(bits, expected_bits), (
            f"{where}{name}: {int((bits != expected_bits).sum())} of {len(bits)} bytes differ"
        )


def _sharded(case: Case) -> Any:
    """Let parameters be taken for shards, which random bits tell from whole ones."""
    if not case.shard:
        return contextlib.nullcontext()
    layouts = list(case.shard) * len(case.lengths)
    return mock.patch.object(planned, "_shard_layouts", return_value=layouts)


def run(case: Case) -> None:
    """Take the steps with both backends, and compare everything after each."""
    made = case.make_params()
    runs = []
    for backend in ("cpu", "triton"):
        params = [copy_of(param, device_of(backend)) for param in made]
        if case.layout == "shifted":
            params = [case._laid_out(param) for param in params]
        runs.append((params, case.make(params, backend)))
    for step, grads in enumerate(case.gradients()):
        for params, optimizer in runs:
            with _sharded(case):
                case.take_step(optimizer, params, grads, step)
        (expected_params, expected), (actual_params, actual) = runs
        where = f"step {step}: "
        check_bits(_state(actual, actual_params), _state(expected, expected_params), where)
    check_bits(_saved(runs[1][1]), _saved(runs[0][1]))
