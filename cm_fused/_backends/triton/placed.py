"""A bucket's tables, and the tensors of a step that are in them."""

import torch
from torch import Tensor

from cm_fused._backends.capture import is_capturing
from cm_fused._backends.triton.tables import OutdatedTablesError, Tables, lies_as
from cm_fused._bucket import Bucket


class Placed:
    """A bucket's tensors of one step where its table has them.

    A parameter or gradient that does not lie in memory as the state does is replaced by a copy
    that does; a parameter's copy is written back at the end.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.tables = tables_of(bucket)
        try:
            self._refresh(bucket)
        except OutdatedTablesError:
            self.tables = _remake_tables(bucket)
            self._refresh(bucket)

    def _refresh(self, bucket: Bucket) -> None:
        params, grads = bucket.params, bucket.grads
        table = self.tables.refresh(params, grads)
        if table is None:
            params, grads = laid_out(params, bucket), laid_out(grads, bucket)
            table = self.tables.refresh(params, grads)
            assert table is not None
        self.table = table
        self.param_copies = [] if params is bucket.params else params
        # The table has their addresses alone: they live until the step is over.
        self._grads = grads


def placed_tensors(bucket: Bucket) -> Placed:
    """Return the bucket's tensors as this step's norms found them, or place them."""
    if bucket.placed is None:
        bucket.placed = Placed(bucket)
    placed: Placed = bucket.placed
    return placed


def tables_of(bucket: Bucket) -> Tables:
    """Return the bucket's tables from its handle, or make them."""
    tables = bucket.registered
    if isinstance(tables, Tables) and (not tables.made_in_capture or is_capturing(bucket.device)):
        return tables
    return _remake_tables(bucket)


def _remake_tables(bucket: Bucket) -> Tables:
    bucket.registered = tables = Tables(bucket)
    return tables


def laid_out(tensors: list[Tensor], bucket: Bucket) -> list[Tensor]:
    """Return tensors that lie in memory as the state does: themselves, or copies."""
    return [
        tensor
        if lies_as(tensor, exp_avg)
        else torch.empty_like(exp_avg, dtype=tensor.dtype).copy_(tensor)
        for tensor, exp_avg in zip(tensors, bucket["exp_avg"], strict=True)
    ]
