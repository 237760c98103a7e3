"""What a step is about to change, kept so that a step that fails can be taken back.

The fused backends need none: all that can fail, allocations included, comes before their first
change. The reference allocates between its changes, and the count of skipped steps is an operator
of its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cm_fused._backends.capture import is_capturing
from cm_fused._backends.select import EAGER, Backend
from cm_fused._bucket import Bucket


class Undo:
    """Puts back what a step of the reference has changed when an error leaves the context.

    What it keeps is copies: of a buffer, of the one slot that may change.
    """

    def __init__(
        self, groups: list[dict[str, Any]], buckets: Iterable[tuple[Backend, Bucket]]
    ) -> None:
        """Copy it.

        Args:
            groups: The param groups, for their counts of skipped steps.
            buckets: All of the step. Nothing is copied of those that a fused backend steps.
        """
        self._counts = [
            (group, count, _copy(count))
            for group in groups
            if group["skip_nonfinite"]
            for count in [group.get("skipped_steps")]
        ]
        self._wholes: list[tuple[Tensor, Tensor]] = []
        self._slots: list[tuple[Tensor, Tensor, Tensor]] = []
        for backend, bucket in buckets:
            # A capture that fails leaves no graph, and has changed nothing.
            if backend is EAGER and not (bucket.params and is_capturing(bucket.params[0].device)):
                for i in range(len(bucket.params)):
                    self._keep(bucket, i)

    def _keep(self, bucket: Bucket, i: int) -> None:
        slot = bucket.priorities[i].argmin(keepdim=True)
        for tensor in bucket.changed(i):
            if tensor is bucket.critical_buffers[i]:
                raw = tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor
                self._slots.append((raw, slot, raw.index_select(0, slot)))
            else:
                self.keep(tensor)

    def keep(self, tensor: Tensor) -> None:
        """Copy one tensor more, which is about to be changed."""
        self._wholes.append((tensor, tensor.clone()))

    def __enter__(self) -> "Undo":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self._put_back_()

    def _put_back_(self) -> None:
        """Give everything its value of before; allocates nothing."""
        for group, count, before in self._counts:
            if count is None:
                group.pop("skipped_steps", None)
            else:
                group["skipped_steps"] = count.copy_(before) if isinstance(count, Tensor) else count
        for tensor, before in self._wholes:
            tensor.copy_(before)
        for buffer, slot, before in self._slots:
            buffer.index_copy_(0, slot, before)


def _copy(count: Any) -> Any:
    return count.clone() if isinstance(count, Tensor) else count
