"""The reference as a backend, whose steps can be undone.

The fused backends need no undoing: all that can fail, allocations included, comes before their
first change. The reference allocates between its changes.
"""

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from cm_fused import reference
from cm_fused._backends.capture import is_capturing
from cm_fused._bucket import Batch, Bucket
from cm_fused._state.access import as_bytes


def prepare(batch: Batch) -> Callable[[], None]:
    """Return what takes the step of a batch."""
    batch.split_gradients()
    return partial(_step_, batch)


def _step_(batch: Batch) -> None:
    for bucket in batch.buckets:
        step_ = reference.adam_cg_ if bucket.critical_gradients else reference.adam_cm_
        bucket.last_sq_norms = step_(bucket, bucket.options, bucket.sq_norm)


def update_(batch: Batch) -> list[Tensor]:
    """Step critical momenta without their priorities; return each gradient's sum of squares."""
    batch.split_gradients()
    return [reference.update_cm_(bucket, bucket.options) for bucket in batch.buckets]


def last_sq_norms(batch: Batch) -> list[Tensor]:
    """Return what the sums of squares of the last step's gradients add up from; none if unknown."""
    return [b.last_sq_norms for b in batch.buckets if b.last_sq_norms is not None]


def update_priorities_(batch: Batch) -> None:
    """Update the priorities that `update_` left, by `Bucket.sq_norm`."""
    for bucket in batch.buckets:
        assert bucket.sq_norm is not None
        reference.update_priorities_(bucket, bucket.options, bucket.sq_norm)


class Undo:
    """Restores what a step has changed when an error leaves the context.

    It keeps copies: of a buffer, of the one slot that may change.
    """

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        """Copy what a step of the reference changes of these buckets."""
        self._wholes: list[tuple[Tensor, Tensor]] = []
        self._slots: list[tuple[Tensor, Tensor, Tensor]] = []
        for bucket in buckets:
            # A capture that fails leaves no graph, and has changed nothing.
            if bucket.params and not is_capturing(bucket.device):
                for i in range(len(bucket.params)):
                    self._keep_param(bucket, i)

    def _keep_param(self, bucket: Bucket, i: int) -> None:
        buffer = bucket["critical_buffer"][i] if bucket.capacity else None
        for tensor in bucket.changed(i):
            if tensor is buffer:
                slot, raw = bucket["priorities"][i].argmin(keepdim=True), as_bytes(tensor)
                self._slots.append((raw, slot, raw.index_select(0, slot)))
            else:
                self.keep(tensor)

    def keep(self, tensor: Tensor) -> None:
        """Copy one tensor more, which is about to be changed."""
        self._wholes.append((tensor, tensor.clone()))

    def __enter__(self) -> "Undo":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            return
        # Nothing is allocated here.
        for tensor, before in self._wholes:
            tensor.copy_(before)
        for buffer, slot, before in self._slots:
            buffer.index_copy_(0, slot, before)
