"""The result of a campaign, and the parts that campaigns share."""

from dataclasses import dataclass
from typing import Any

import torch

from cm_fused import AdamCG, AdamCM
from cm_fused.rounding import INT4

Kind = type[AdamCM | AdamCG]
# What `buffer_dtype` and `moment_dtype` may be.
BUFFER_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
    INT4,
)
MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Finding:
    """The cases that were tried without a fault; a fault raises.

    Attributes:
        campaign: What was done.
        cases: How often.
        what: What one case is, in the plural.
        result: What held in every case.
    """

    campaign: str
    cases: int
    what: str
    result: str

    def line(self) -> str:
        """Return it as one line."""
        return f"{self.campaign}: {self.cases:,} {self.what}: {self.result}"


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with a message unless a condition holds, under -O too."""
    if not condition:
        raise AssertionError(message)


def same(left: Any, right: Any) -> bool:
    """Return whether two nests of tensors and plain values agree in every value and dtype."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)
