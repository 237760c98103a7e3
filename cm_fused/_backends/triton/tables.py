"""The tables of a bucket: built once, checked at every step, uploaded when an address changed.

NOTE: [Tables and graph capture]
What was uploaded is never written again: a change makes a new table. So a captured graph can share
the table of the steps before it, which is kept when they go on to another. Where its gradients are
new it has a table of its own: an upload during capture takes place when the graph is replayed, from
host memory that must then still be there, and no eager step may use it before. Both are kept for as
long as these tables live. The optimizer keeps the plan of a captured step for as long as it lives
itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cm_fused._backends import library
from cm_fused._backends.capture import is_capturing
from cm_fused._backends.triton.calls import Calls
from cm_fused._backends.triton.columns import CHUNK_SIZE, COLUMNS, PARAM_DTYPES, WIDTH
from cm_fused._bucket import Bucket
from cm_fused.philox import WORDS, ShardLayout

# What cm_fused::refresh_table_ returns.
_UNCHANGED, _GRADS_MOVED, _CHANGED, _NEEDS_COPIES = range(4)
_INT64_BYTES = 8


@dataclass(frozen=True)
class Chunks:
    """The consecutive chunks of the parameters of one dtype, whose gradients are of one dtype."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    chunks: Tensor  # int32 (chunks, 2) on the device: each chunk's tensor and number within it
    sq_norms: Tensor  # float64 (chunks,) on the device, for the kernels to write
    calls: Calls = field(default_factory=Calls)  # of the kernels that are launched for them


class OutdatedTablesError(Exception):
    """The tables were made for parameters or gradients of other dtypes."""


class Tables:
    """Where the kernels find a bucket's tensors."""

    def __init__(self, bucket: Bucket) -> None:
        self._device = bucket.device
        # Whether what these tables need was uploaded by a graph's capture.
        self.made_in_capture = is_capturing(self._device)
        self._registered: library.RegisteredState | None = None
        if library.unavailable_reason is None:
            lists = bucket.state, bucket.param_indices, bucket.shard_layouts
            self._registered = library.RegisteredState(*lists)
        self._bucket = bucket
        # The tables that these replace live as long as these: a graph may go on using them.
        self._replaced = bucket.registered
        # Whether each four elements of every parameter are four of the whole parameter's with one
        # counter of random bits.
        self.by_fours = all(
            layout.length == layout.stride and layout.offset % WORDS == 0
            for layout in map(bucket.shard_layout, range(len(bucket.params)))
        )
        self._host = torch.zeros((len(bucket.params), WIDTH), dtype=torch.int64, device="cpu")
        # What captures recorded: tables, and the host's memory of those uploaded in a capture.
        self._of_captures: list[tuple[Tensor, ...]] = []
        self._table: Tensor | None = None
        self.last: Tensor | None = None  # the table of the last refresh
        self.calls = Calls()  # of the kernels that are launched for the whole table
        self._stream = _stream(self._device)
        # Whether a parameter may have moved, until parameters that overlap were looked for.
        self.changed = True
        # Whether parameters of the step overlap, to be launched one after the other.
        self.one_by_one = False
        self._lay_out_chunks(bucket.params, bucket.grads)
        self._scratch = self._lay_out_scratch(bucket)

    def _lay_out_chunks(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Number the chunks, dtype by dtype and parameter by parameter."""
        self._dtypes_of = [(p.dtype, g.dtype) for p, g in zip(params, grads, strict=True)]
        dtypes = list(dict.fromkeys(self._dtypes_of))
        order = sorted(range(len(params)), key=lambda i: dtypes.index(self._dtypes_of[i]))
        num_chunks = _on_host([-(-params[i].numel() // CHUNK_SIZE) for i in order])
        first_chunks = num_chunks.cumsum(0) - num_chunks
        self._dtypes = _dtype_codes(params, grads)
        self._host[:, COLUMNS["dtypes"]] = self._dtypes
        self._host[order, COLUMNS["num_chunks"]] = num_chunks
        self._host[order, COLUMNS["first_chunk"]] = first_chunks
        tensors = _on_host(order).repeat_interleave(num_chunks)
        within = torch.arange(len(tensors), device="cpu") - first_chunks.repeat_interleave(
            num_chunks
        )
        table = torch.stack([tensors, within], dim=1).to(torch.int32)
        chunks, self._host_chunks = _upload(table, self._device)
        self._order, self._chunks = order, chunks
        self.chunk_sq_norms = torch.empty(len(chunks), dtype=torch.float64, device=self._device)
        counts = [
            sum(-(-params[i].numel() // CHUNK_SIZE) for i in order if self._dtypes_of[i] == both)
            for both in dtypes
        ]
        self.launches = self._split(dtypes, counts)

    def launches_one_by_one(self) -> list[tuple[int, Chunks]]:
        """Return the number and the chunks of each parameter, in the order of `launches`."""
        counts = [int(self._host[i, COLUMNS["num_chunks"]]) for i in self._order]
        dtypes = [self._dtypes_of[i] for i in self._order]
        return list(zip(self._order, self._split(dtypes, counts), strict=True))

    def _split(
        self, dtypes: list[tuple[torch.dtype, torch.dtype]], counts: list[int]
    ) -> list[Chunks]:
        chunks, sq_norms = (torch.split(t, counts) for t in (self._chunks, self.chunk_sq_norms))
        parts = zip(dtypes, chunks, sq_norms, strict=True)
        return [Chunks(param, grad, part, norms) for (param, grad), part, norms in parts]

    def _lay_out_scratch(self, bucket: Bucket) -> Tensor | None:
        """Give critical gradients a place for this step's slots and counts of filled ones."""
        if bucket["pending_slot"] or not bucket.capacity:
            return None
        scratch = torch.zeros((2, len(bucket.params)), dtype=torch.int64, device=self._device)
        for row, column in zip(scratch, (COLUMNS["pending_slot"], COLUMNS["filled"]), strict=True):
            offsets = _INT64_BYTES * torch.arange(len(bucket.params), device="cpu")
            self._host[:, column] = row.data_ptr() + offsets
        return scratch

    def refresh(self, params: list[Tensor], grads: list[Tensor]) -> Tensor | None:
        """Return the table of these tensors, int64 (params, `WIDTH`) on the device.

        None where a tensor does not lie in memory as its exp_avg does, so that a copy is to be
        passed in its place. RuntimeError where the lists do not fit each other; OutdatedTablesError
        where a parameter or gradient has another dtype than when these tables were made.
        """
        capturing = is_capturing(self._device)
        host = self._host.clone() if capturing else self._host
        refreshed = self._refresh(params, grads, host)
        if refreshed == _NEEDS_COPIES:
            return None
        self.changed |= refreshed == _CHANGED
        if refreshed == _CHANGED or self._table is None:
            self._check_dtypes(host)
        if refreshed == _UNCHANGED and self._table is not None:
            self.last = self._table
            if capturing:
                self._of_captures.append((self._table,))
        else:
            self.last = self._upload_table(host, capturing)
        if not capturing:
            self._follow_stream()
        return self.last

    def _check_dtypes(self, host: Tensor) -> None:
        if not torch.equal(host[:, COLUMNS["dtypes"]], self._dtypes):
            # Where no others can be made, the next step is not to take this table for up to date.
            self._table = None
            raise OutdatedTablesError

    def _upload_table(self, host: Tensor, capturing: bool) -> Tensor:
        table, uploaded_from = _upload(host, self._device)
        if capturing:
            self._of_captures.append((table, uploaded_from))
        else:
            self._table = table
        return table

    def _follow_stream(self) -> None:
        """Have memory that another stream uses freed when that stream is done with it."""
        stream = _stream(self._device)
        if stream is None or stream == self._stream:
            return
        for tensor in (self._table, self._chunks, self.chunk_sq_norms, self._scratch):
            if tensor is not None:
                tensor.record_stream(stream)

    def _refresh(self, params: list[Tensor], grads: list[Tensor], host: Tensor) -> int:
        if self._registered is None:
            refreshed = _refresh_in_python(params, grads, self._bucket, host)
        else:
            refreshed = torch.ops.cm_fused.refresh_table_(self._registered.id, params, grads, host)
        if refreshed == _NEEDS_COPIES and any(map(Tensor.is_neg, params)):
            raise RuntimeError("a parameter must not be a lazy negative")  # which the step names
        return refreshed


def _on_host(numbers: Sequence[int]) -> Tensor:
    """Return int64 (numbers,), on the CPU whatever torch's default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _dtype_codes(params: list[Tensor], grads: list[Tensor]) -> Tensor:
    of_params, of_grads = (
        _on_host([PARAM_DTYPES.index(tensor.dtype) for tensor in tensors])
        for tensors in (params, grads)
    )
    return of_params + len(PARAM_DTYPES) * of_grads


def lies_as(tensor: Tensor, order: Tensor) -> bool:
    """Return whether a tensor's memory holds its elements in the places of another's."""
    strides = zip(tensor.shape, tensor.stride(), order.stride(), strict=True)
    return not tensor.is_neg() and all(size <= 1 or a == b for size, a, b in strides)


def _stream(device: torch.device) -> torch.Stream | None:
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def _upload(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy to a device without waiting; return the copy, and the memory it comes from."""
    if device.type == "cpu":
        return host.clone(), host
    pinned = host.pin_memory()
    # Without a capture the allocator knows when the copy has finished, and keeps the memory until
    # then.
    return pinned.to(device, non_blocking=True), pinned


def _refresh_in_python(
    params: list[Tensor], grads: list[Tensor], bucket: Bucket, host: Tensor
) -> int:
    """Do what cm_fused::refresh_table_ does, without its checks and the C++ extension."""
    for tensors in (params, grads):
        if not all(map(lies_as, tensors, bucket["exp_avg"])):
            return _NEEDS_COPIES
    before = host.clone()
    for name, tensors in {"param": params, "grad": grads, **bucket.state}.items():
        if tensors:
            host[:, COLUMNS[name]] = _on_host([tensor.data_ptr() for tensor in tensors])
    host[:, COLUMNS["dtypes"]] = _dtype_codes(params, grads)
    host[:, COLUMNS["param_index"]] = _on_host(bucket.param_indices or range(len(params)))
    first, last = COLUMNS["shard_offset"], COLUMNS["shard_stride"]
    layouts = bucket.shard_layouts or ShardLayout()
    host[:, first : last + 1] = _on_host(layouts).reshape(-1, len(ShardLayout._fields))
    host[:, COLUMNS["numel"]] = _on_host([param.numel() for param in params])
    if torch.equal(before, host):
        return _UNCHANGED
    grad = COLUMNS["grad"]
    before[:, grad] = host[:, grad]
    return _GRADS_MOVED if torch.equal(before, host) else _CHANGED
