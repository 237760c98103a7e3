"""Which backend serves which device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._backends import cpu
from cm_fused._bucket import Bucket, BucketStep, Handle, StepOptions
from cm_fused._warnings import warn


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of the steps that `cm_fused.reference` defines.

    What takes several steps takes all of them or, where it raises, none: with the reference this is
    `cm_fused._optimizer.undo`'s doing.

    Attributes:
        name: The value of the `backend` option that asks for it.
        prepare: Prepares some buckets' steps without changing anything; returns what takes them.
        update_cm_: Some steps with critical momenta but for the priority buffers' books; returns
            for each bucket what `sq_norms` does.
        keep_books_: The books, once the norms are known.
        sq_norms: The sum of the squares of each of a bucket's gradients.
        state_keys: What it keeps in a parameter's state besides the reference's keys.
        hold: Makes a bucket's `handle`, which speeds up further steps of the same tensors.
        describe: What of it is at work on a device, for `repr`.
    """

    name: str
    prepare: Callable[[list[BucketStep]], Callable[[], None]]
    update_cm_: Callable[[list[BucketStep]], list[Tensor]]
    keep_books_: Callable[[list[BucketStep]], None]
    sq_norms: Callable[[Bucket, StepOptions], Tensor]
    state_keys: Callable[[bool, int, int], tuple[str, ...]]
    hold: Callable[[Bucket], Handle | None]
    describe: Callable[[torch.device], str]


def _no_keys(critical_gradients: bool, capacity: int, slot_bytes: int) -> tuple[str, ...]:
    return ()


def _no_handle(bucket: Bucket) -> None:
    return None


def _eager_step_(steps: list[BucketStep]) -> None:
    for bucket, options, critical_gradients, sq_norm in steps:
        step_ = reference.adam_cg_ if critical_gradients else reference.adam_cm_
        step_(bucket, options, sq_norm)


def _eager_update_cm_(steps: list[BucketStep]) -> list[Tensor]:
    return [reference.update_cm_(step.bucket, step.options) for step in steps]


def _eager_keep_books_(steps: list[BucketStep]) -> None:
    for bucket, options, _, sq_norm in steps:
        assert sq_norm is not None
        reference.keep_books_(bucket, options, sq_norm)


EAGER = Backend(
    "eager",
    prepare=lambda steps: partial(_eager_step_, steps),
    update_cm_=_eager_update_cm_,
    keep_books_=_eager_keep_books_,
    sq_norms=reference.sq_norms,
    state_keys=_no_keys,
    hold=_no_handle,
    describe=lambda device: f"eager on {device.type}",
)
CPU = Backend(
    "cpu",
    prepare=lambda steps: partial(cpu.step_, steps),
    update_cm_=cpu.update_cm_,
    keep_books_=cpu.keep_books_,
    sq_norms=cpu.sq_norms,
    state_keys=cpu.state_keys,
    hold=cpu.HeldState,
    describe=lambda device: f"cpu on {device.type}",
)
NAMES = ("eager", "cpu", "triton")


@cache
def _triton() -> "Backend | str":
    """Return the Triton backend, or why there is none; triton is imported when it is needed."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    try:
        from cm_fused._backends import traced as triton_ops
        from cm_fused._backends.triton import launch as triton
    except ImportError as error:
        return f"triton does not import: {error}"
    return Backend(
        "triton",
        prepare=triton_ops.prepare,
        update_cm_=triton_ops.update_cm_,
        keep_books_=triton_ops.keep_books_,
        sq_norms=triton_ops.sq_norms,
        state_keys=triton.state_keys,
        hold=triton.hold,
        describe=lambda device: (
            f"triton on {device.type} with the {triton.priority_kernel(device)} priority kernel"
        ),
    )


def _triton_on(device: torch.device) -> "Backend | str":
    """Return the Triton backend if it can step parameters on a device, or why it cannot."""
    backend = _triton()
    if isinstance(backend, str):
        return backend
    from cm_fused._backends.triton import launch as triton

    return triton.unavailable_reason(device) or backend


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
        backend = _triton_on(device)
        if isinstance(backend, str):
            raise RuntimeError(f"backend='triton' is not available: {backend}")
        return backend
    if requested == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"backend='cpu' steps parameters on the CPU, got one on {device}")
        if cpu.unavailable_reason is not None:
            raise RuntimeError(f"backend='cpu' is not available: {cpu.unavailable_reason}")
        return CPU
    return _best(device)


def _best(device: torch.device) -> Backend:
    """Return the fastest backend for a device; warn once where that is the reference."""
    if device.type == "cpu":
        if cpu.unavailable_reason is None:
            return CPU
        _warn_of_fallback("cpu", cpu.unavailable_reason)
        return EAGER
    backend: Backend | str = "this version has no fused backend for such devices"
    if device.type == "cuda":
        backend = _triton_on(device)
    if isinstance(backend, str):
        _warn_of_fallback(device.type, backend)
        return EAGER
    return backend


@cache
def _warn_of_fallback(device_type: str, reason: str) -> None:
    """Warn once per device type that the reference does the work of a fused backend."""
    message = f"cm_fused steps with the slow eager backend for {device_type} parameters: {reason}"
    if device_type == "cpu":
        message += (
            '. For the fast one, have a C++20 compiler, pip install "torch>=2.11" setuptools, and '
            "reinstall with CM_FUSED_BUILD=cpu pip install --no-build-isolation --force-reinstall "
            "--no-deps ."
        )
    warn(message)
