"""Rows of the table that the priority kernels work on, with what they name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm_fused._backends.triton.columns import COLUMNS, WIDTH
from tests.support.cases import device_of

# Takes what cm_fused::update_priorities_ takes.
Kernel = Callable[..., None]


class Rows:
    """The tensors that a table names, in new state."""

    def __init__(
        self,
        num_chunks: list[int],
        capacity: int,
        kernel: "str | Kernel" = "operator",
        *,
        filled: bool = True,
    ) -> None:
        rows = len(num_chunks)
        self.num_chunks = num_chunks
        self.kernel = kernel
        self.device = torch.device("cuda" if kernel == "cuda" else "cpu")
        if kernel == "triton":
            self.device = device_of("triton")
        self.priorities = torch.full((rows, capacity), -torch.inf, device=self.device)
        self.slots = torch.full((rows,), 99, device=self.device)
        self.steps = torch.zeros(rows, device=self.device)
        self.filled = torch.full((rows,), 99, device=self.device)
        table = torch.zeros(rows, WIDTH, dtype=torch.int64)
        for name, tensor in self.named().items():
            stride = tensor.stride(0) * tensor.element_size()
            table[:, COLUMNS[name]] = tensor.data_ptr() + stride * torch.arange(rows)
        if not filled:
            table[:, COLUMNS["filled"]] = 0
        chunks = torch.tensor(num_chunks, dtype=torch.int64)
        table[:, COLUMNS["num_chunks"]] = chunks
        table[:, COLUMNS["first_chunk"]] = chunks.cumsum(0) - chunks
        self.table = table.to(self.device)

    def update(
        self,
        chunk_sq_norms: list[float],
        sq_norm: float | list[float] | None = None,
        found_inf: float | None = None,
        **options: Any,
    ) -> None:
        """Call the kernel."""
        norms, *scalars = (
            None if value is None else torch.tensor(value, dtype=torch.float64, device=self.device)
            for value in (chunk_sq_norms, sq_norm, found_inf)
        )
        assert norms is not None
        if self.kernel == "triton":
            from cm_fused._backends.triton import priorities

            priorities.update_priorities_of_table_(self.table, norms, *scalars, **options)
            return
        update: Kernel = torch.ops.cm_fused.update_priorities_
        if not isinstance(self.kernel, str):
            update = self.kernel
        update(self.table, norms, *scalars, **options)

    def named(self) -> dict[str, Tensor]:
        """Return what a kernel changes, by the table's columns."""
        return {
            "priorities": self.priorities,
            "pending_slot": self.slots,
            "step": self.steps,
            "filled": self.filled,
        }

    def split(self, chunk_sq_norms: list[float]) -> list[list[float]]:
        """Return each row's part of the chunks."""
        ends = np.cumsum(self.num_chunks)
        return [chunk_sq_norms[end - n : end] for end, n in zip(ends, self.num_chunks, strict=True)]
