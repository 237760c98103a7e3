"""Which backend serves which device."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._bucket import Bucket, StepOptions
from cm_fused.ops import cpu

Step = Callable[[Bucket, StepOptions, Tensor | None], None]


@dataclass(frozen=True)
class Backend:
    """One implementation of the step; the functions are those of `cm_fused.reference`.

    Attributes:
        name: The value of the `backend` option that asks for it.
        adam_cm_: The step with critical momenta.
        adam_cg_: The step with critical gradients.
        sq_norm: The sum of the squares of a bucket's gradients.
        state_keys: What it keeps in a parameter's state besides the reference's keys.
        hold: Makes a bucket's `handle`, which speeds up further steps of the same tensors.
    """

    name: str
    adam_cm_: Step
    adam_cg_: Step
    sq_norm: Callable[[Bucket, StepOptions], Tensor]
    state_keys: Callable[[bool, int], tuple[str, ...]]
    hold: Callable[[Bucket], object]


def _no_keys(critical_gradients: bool, capacity: int) -> tuple[str, ...]:
    return ()


def _no_handle(bucket: Bucket) -> None:
    return None


EAGER = Backend(
    "eager",
    adam_cm_=reference.adam_cm_,
    adam_cg_=reference.adam_cg_,
    sq_norm=reference.sq_norm,
    state_keys=_no_keys,
    hold=_no_handle,
)
CPU = Backend(
    "cpu",
    adam_cm_=cpu.adam_cm_,
    adam_cg_=cpu.adam_cg_,
    sq_norm=cpu.sq_norm,
    state_keys=cpu.state_keys,
    hold=cpu.HeldState,
)
NAMES = ("eager", "cpu", "triton")


def select(requested: str | None, device: torch.device) -> Backend:
    """Return the backend for parameters on `device`.

    Args:
        requested: The param group's `backend` option. None chooses the best there is.
        device: Where the parameters are.

    Raises:
        RuntimeError: An explicit request cannot be met; the message says why.
    """
    if requested == "eager":
        return EAGER
    if requested == "triton":
        raise RuntimeError(
            "backend='triton' is not part of this version of cm_fused; use backend=None"
        )
    if requested == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"backend='cpu' steps parameters on the CPU, got one on {device}")
        if cpu.unavailable_reason is not None:
            raise RuntimeError(f"backend='cpu' is not available: {cpu.unavailable_reason}")
        return CPU
    if device.type == "cpu" and cpu.unavailable_reason is None:
        return CPU
    _warn_of_fallback(device.type)
    return EAGER


@cache
def _warn_of_fallback(device_type: str) -> None:
    """Warn once per device type that the reference does the work of a fused backend."""
    if device_type == "cpu":
        message = (
            f"cm_fused steps with the slow eager backend: {cpu.unavailable_reason}. For the fast "
            'one, have a C++20 compiler, pip install "torch>=2.11" setuptools, and reinstall with '
            "CM_FUSED_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    else:
        message = (
            f"cm_fused steps with the slow eager backend: this version has no fused backend for "
            f"{device_type} parameters"
        )
    warnings.warn(message, UserWarning, stacklevel=4)
