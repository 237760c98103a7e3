"""DTensors with given gradients: what is summed over processes, and how often."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from cm_fused import AdamCG, AdamCM
from tests.support.sharded.common import (
    SHAPES,
    STEPS,
    Twins,
    assert_close,
    case,
    counted_sums,
    gathered,
    make_mesh,
    readings,
    square,
    summand,
    whole_tensors,
)
from tests.support.training import set_gradient


def _in_both_scopes(mesh: DeviceMesh, placements: list[Any], **options: Any) -> None:
    for cls in (AdamCM, AdamCG):
        for scope in ("group", "tensor"):
            Twins(cls, mesh, placements, priority_scope=scope, **options).train().check()


@case(2, 4)
def one_dimension(_: Path) -> None:
    """Sharded along the first dimension, some processes with nothing."""
    _in_both_scopes(make_mesh(), [Shard(0)])


@case(2)
def eager_backend(_: Path) -> None:
    """The reference too, with options that take other paths."""
    _in_both_scopes(
        make_mesh(), [Shard(0)], backend="eager", amsgrad=True, weight_decay=0.1, maximize=True
    )


@case(2)
def bfloat16_slots(_: Path) -> None:
    """State without scales may have low precision."""
    Twins(AdamCM, make_mesh(), [Shard(0)], buffer_dtype=torch.bfloat16, capacity=7).train().check()


@case(4)
def two_dimensions(_: Path) -> None:
    """Sharded twice along one dimension, and hybrid: what two processes hold counts once."""
    _in_both_scopes(square("dp", "tp"), [Shard(0), Shard(0)])
    _in_both_scopes(square("replicate", "shard"), [Replicate(), Shard(0)])


@case(2)
def gradients_in_summands(_: Path) -> None:
    """A gradient of which the processes hold summands is that of their sum."""
    twins = Twins(AdamCM, make_mesh(), [Shard(0)])
    for t in range(3):
        for param, twin, grad in zip(twins.sharded, twins.whole, whole_tensors(t + 1), strict=True):
            param.grad = summand(grad, twins.mesh)
            twin.grad = grad
        twins.optimizer.step()
        twins.expected.step()
    twins.check()


@case(2)
def missing_gradients_and_plain_parameters(_: Path) -> None:
    """Parameters without a gradient, and beside them plain ones, which are the same everywhere."""
    twins = Twins(AdamCM, make_mesh(), [Shard(0)])
    plain = [nn.Parameter(torch.ones(6)) for _ in range(2)]
    twins.optimizer.add_param_group({"params": plain[:1], "lr": 0.1})
    twins.expected.add_param_group({"params": plain[1:], "lr": 0.1})
    for t in range(STEPS):
        for param in plain:
            param.grad = torch.linspace(-1, t, 6)

        def without_one(grads: list[Tensor], t: int = t) -> None:
            grads[t % 2] *= 1.5

        twins.step(t, without_one)
        for optimizer in (twins.optimizer, twins.expected):
            optimizer.param_groups[0]["params"][t % len(SHAPES)].grad = None
    twins.check()
    assert_close(plain[0].detach(), plain[1].detach())


@case(2)
def no_gradients_at_all(_: Path) -> None:
    """A step without gradients takes its part in the sum."""
    twins = Twins(AdamCM, make_mesh(), [Shard(0)])
    twins.optimizer.step()
    twins.step(0)
    twins.check()


@case(2, 4)
def one_small_sum_a_step(_: Path) -> None:
    """A float64 for each parameter once a step, in both scopes, not waited for by the step."""
    for scope in ("group", "tensor"):
        for cls in (AdamCM, AdamCG):
            twins = Twins(cls, make_mesh(), [Shard(0)], priority_scope=scope)
            for t in range(3):
                with counted_sums() as calls:
                    twins.step(t)
                assert calls == [(len(SHAPES), True)], calls
            pending = twins.optimizer._pending is not None
            assert pending == (cls is AdamCM)
            twins.check()
            assert twins.optimizer._pending is None


@case(2)
def half_precision_gradients(_: Path) -> None:
    """DTensors take bfloat16 gradients as what they are in float32."""

    def rounded(grads: list[Tensor]) -> None:
        for grad in grads:
            grad.copy_(grad.bfloat16())

    for cls in (AdamCM, AdamCG):
        twins = Twins(cls, make_mesh(), [Shard(0)])
        for t in range(STEPS):
            twins.step(t, rounded)
        twins.check()
        lower = Twins(cls, make_mesh(), [Shard(0)])
        for t in range(STEPS):
            for param, grad in zip(lower.sharded, lower.gradients(t), strict=True):
                set_gradient(param, lower.shard(grad.bfloat16()))
            lower.optimizer.step()
        for param, twin in zip(lower.sharded, twins.sharded, strict=True):
            assert torch.equal(gathered(param.detach()), gathered(twin.detach()))


@case(2)
def no_buffer(_: Path) -> None:
    """Without keys nothing is summed over processes, unless clipping asks for it."""
    for cls in (AdamCM, AdamCG):
        twins = Twins(cls, make_mesh(), [Shard(0)], capacity=0)
        with counted_sums() as calls:
            twins.train()
        assert not calls
        assert math.isnan(twins.optimizer.grad_norm())
        twins.check()
        Twins(cls, make_mesh(), [Shard(0)], capacity=0, max_grad_norm=0.7).train().check()


@case(2)
def clipping(_: Path) -> None:
    """The global norm is that of all processes; the sum for it is one more."""
    for cls in (AdamCM, AdamCG):
        Twins(cls, make_mesh(), [Shard(0)], max_grad_norm=0.7).train().check()


@case(2)
def norms_of_gradients(_: Path) -> None:
    """`grad_norm` is that of the whole gradients on every process, clipped or not."""
    for cls in (AdamCM, AdamCG):
        for options in ({}, {"priority_scope": "tensor"}, {"max_grad_norm": 0.7}):
            twins = Twins(cls, make_mesh(), [Shard(0)], **options)
            for t in range(3):
                twins.step(t)
                grads = [param.grad for param in twins.whole if param.grad is not None]
                for optimizer in (twins.optimizer, twins.expected):
                    norm = optimizer.grad_norm().float()
                    assert_close(norm, nn.utils.get_total_norm(grads))
            twins.check()


@case(2)
def one_process_is_not_finite(_: Path) -> None:
    """What one process holds keeps all of them from stepping."""
    twins = Twins(AdamCM, make_mesh(), [Shard(0)], skip_nonfinite=True)
    twins.step(0)
    before = [param.full_tensor().clone() for param in twins.sharded]  # type: ignore[attr-defined]

    def overflow(grads: list[Tensor]) -> None:
        grads[0][0, 0] = torch.inf

    twins.step(1, overflow)
    for param, kept in zip(twins.sharded, before, strict=True):
        assert torch.equal(param.full_tensor(), kept)  # type: ignore[attr-defined]
    assert twins.optimizer.param_groups[0]["skipped_steps"].item() == 1
    twins.step(2)
    twins.check()


@case(2)
def diagnostics_of_shards(_: Path) -> None:
    """What the buffers hold is read of whole tensors, after the step that is under way."""
    for value, expected in readings(Twins(AdamCM, make_mesh(), [Shard(0)])):
        assert_close(torch.tensor(value), torch.tensor(expected))
