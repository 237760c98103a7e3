"""The step of the fused backends as one operator, for `torch.compile`.

It cannot trace what prepares launches or registers state. The operator finds what earlier calls
have registered by a number of its optimizer's: a graph holds numbers and tensors alone. Called
eagerly the step goes past this.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain, count
from operator import is_
from typing import Any
from weakref import WeakValueDictionary

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
    "Tensor? grad_factor, Tensor? found_inf, *, SymInt batches, str backend, "
    "bool critical_gradients, "
    + ", ".join(f"{_TYPES[StepOptions.__annotations__[name]]} {name}" for name in PLAIN_OPTIONS)
    + ") -> ()"
)


_numbers = count()
_all_batches: WeakValueDictionary[int, "Batches"] = WeakValueDictionary()


class Batches:
    """The registered batches of an optimizer's compiled steps, a bucket each, by their `number`."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._batches: dict[int, tuple[Backend, Batch]] = {}
        _all_batches[self.number] = self

    def registered(self, backend: Backend, bucket: Bucket) -> Batch:
        """Return a registered batch of a bucket's tensors: that of an earlier call, if there is."""
        tensors = [bucket.params, *bucket.state.values()]
        known, batch = self._batches.get(id(bucket.params[0]), (None, None))
        if known is backend and batch is not None:
            earlier = [batch.params, *batch.buckets[0].state.values()]
            if all(map(_are_same, tensors, earlier)) and len(tensors) == len(earlier):
                return batch
        batch = Batch([bucket], bucket.params)
        backend.register(batch)
        self._batches[id(bucket.params[0])] = backend, batch
        return batch


def _are_same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return len(tensors) == len(others) and all(map(is_, tensors, others))


def prepare(backend: Backend, batch: Batch, batches: int) -> Callable[[], None]:
    """Return what takes the step of a batch, one operator for each bucket of a fused backend."""
    batch.split_gradients()
    if not backend.is_fused:
        return backend.prepare(batch)
    return partial(_step_, backend.name, batch, batches)


def _step_(backend: str, batch: Batch, batches: int) -> None:
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
            batches=batches,
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
    batches: int,
    backend: str,
    critical_gradients: bool,
    **options: Any,
) -> None:
    """Take a step of either kind, its arguments those of `Bucket` and `StepOptions`.

    `state` has the tensors of each row of the STATE table in the mask, row by row. `batches` is the
    number of the optimizer's `Batches`, or of none.
    """
    size = len(params)
    lists = {key: list(state[i * size : (i + 1) * size]) for i, key in enumerate(keys_of(mask))}
    bucket = Bucket(list(params), [], lists, list(param_indices), list(shard_layouts))
    bucket.critical_gradients = critical_gradients
    chosen = select(backend, bucket.device)
    batch = (_all_batches.get(batches) or Batches()).registered(chosen, bucket)
    (bucket,) = batch.buckets
    bucket.sq_norm, batch.grads = sq_norm, list(grads)
    bucket.options = StepOptions(lr=lr, grad_factor=grad_factor, found_inf=found_inf, **options)
    try:
        chosen.prepare(batch)()
    finally:
        # The optimizer keeps its gradients no longer than a step takes.
        batch.grads, bucket.sq_norm = [], None
        batch.split_gradients()
