"""The step of the fused backends as one operator, for `torch.compile`.

It cannot trace what prepares launches or registers state. Called eagerly the step goes past this:
the operator registers a bucket anew at every call.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._backends.select import Backend, select
from cm_fused._bucket import Batch, Bucket, StepOptions
from cm_fused._state.table import KEYS, keys_of, mask_of

# These options come to the operator by themselves, as tensors.
_TENSORS = ("lr", "grad_factor", "found_inf")
_TYPES = {float: "float", bool: "bool", str: "str", int: "SymInt"}
PLAIN_OPTIONS = tuple(name for name in StepOptions._fields if name not in _TENSORS)
_SCHEMA = (
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, SymInt mask, "
    "SymInt[] param_indices, SymInt[] shard_layouts, Tensor? sq_norm, Tensor lr, "
    "Tensor? grad_factor, Tensor? found_inf, *, str backend, bool critical_gradients, "
    + ", ".join(f"{_TYPES[StepOptions.__annotations__[name]]} {name}" for name in PLAIN_OPTIONS)
    + ") -> ()"
)


def prepare(backend: Backend, batch: Batch) -> Callable[[], None]:
    """Return what takes the step of a batch, one operator for each bucket of a fused backend."""
    batch.split_gradients()
    return partial(_step_, backend.name, batch) if backend.is_fused else backend.prepare(batch)


def _step_(backend: str, batch: Batch) -> None:
    for bucket in batch.buckets:
        options = bucket.options
        lr = options.lr
        if not isinstance(lr, Tensor):
            lr = as_tensor(lr, bucket.device)
        step_op(
            bucket.params,
            bucket.grads,
            list(chain.from_iterable(bucket[key] for key in KEYS)),
            mask_of(bucket.state),
            bucket.param_indices,
            bucket.shard_layouts,
            bucket.sq_norm,
            lr,
            options.grad_factor,
            options.found_inf,
            backend=backend,
            critical_gradients=bucket.critical_gradients,
            **{name: getattr(options, name) for name in PLAIN_OPTIONS},
        )


def as_tensor(number: float, device: torch.device) -> Tensor:
    """Return a number in a tensor that torch.compile keeps a number: it traces products of such."""
    return torch.ones((), dtype=torch.float64, device=device) * number


def sq_norms(backend: str, bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of each of the bucket's gradients, float64 (params,)."""
    if backend == "cpu":
        return select(backend, bucket.device).sq_norms(bucket, options)
    return reference.sq_norms(bucket, options)


@torch.library.custom_op("cm_fused::step_", mutates_args=("params", "state"), schema=_SCHEMA)
def step_op(
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    mask: int,
    param_indices: list[int],
    shard_layouts: list[int],
    sq_norm: Tensor | None,
    lr: Tensor,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    *,
    backend: str,
    critical_gradients: bool,
    **options: Any,
) -> None:
    """Take a step of either kind, its arguments those of `Bucket` and `StepOptions`.

    `state` has the tensors of each row of the STATE table in the mask, row by row.
    """
    count = len(params)
    lists = {key: list(state[i * count : (i + 1) * count]) for i, key in enumerate(keys_of(mask))}
    bucket = Bucket(list(params), list(grads), lists, list(param_indices), list(shard_layouts))
    bucket.critical_gradients, bucket.sq_norm = critical_gradients, sq_norm
    bucket.options = StepOptions(lr=lr, grad_factor=grad_factor, found_inf=found_inf, **options)
    batch = Batch([bucket], bucket.params, bucket.grads)
    chosen = select(backend, bucket.device)
    chosen.register(batch)
    chosen.prepare(batch)()
