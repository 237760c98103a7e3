"""Which backend serves which device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cm_fused import _install, reference
from cm_fused._backends import cpu, eager, library
from cm_fused._bucket import Batch, Bucket, StepOptions
from cm_fused._distributed import is_wrapper, local
from cm_fused._warnings import warn


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of the steps that `cm_fused.reference` defines.

    A batch's step is taken whole or, where it raises, not at all. For the reference
    `cm_fused._backends.eager.Undo` sees to that.
    """

    name: str  # the value of the `backend` option that asks for it
    register: Callable[[Batch], None]  # prepares all steps of a batch
    # Prepares one step of a batch without changing anything; returns what takes it.
    prepare: Callable[[Batch], Callable[[], None]]
    # Steps critical momenta without their priorities; returns each bucket's `sq_norms`.
    update_: Callable[[Batch], list[Tensor]]
    update_priorities_: Callable[[Batch], None]  # once the norms are known
    # What the sums of squares of the last step's gradients add up from, on any devices, float64.
    last_sq_norms: Callable[[Batch], list[Tensor]]
    # The sum of the squares of each of a bucket's gradients, float64 (params,).
    sq_norms: Callable[[Bucket, StepOptions], Tensor]
    describe: Callable[[torch.device], str]  # names what steps on a device, for `repr`
    is_fused: bool  # whether it keeps the state of `cm_fused._state.table.fused_keys`
    checks_lists: bool  # whether a registered step checks the lists before it changes anything


def _backend(name: str, module: ModuleType, *, is_fused: bool) -> Backend:
    """Return the backend that a module implements."""
    return Backend(
        name,
        # The others register nothing: the Triton backend makes tables at a bucket's first launch.
        getattr(module, "register", lambda batch: None),
        module.prepare,
        module.update_,
        module.update_priorities_,
        module.last_sq_norms,
        getattr(module, "sq_norms", reference.sq_norms),
        getattr(module, "describe", lambda device: f"{name} on {device.type}"),
        is_fused=is_fused,
        checks_lists=is_fused and library.unavailable_reason is None,
    )


EAGER = _backend("eager", eager, is_fused=False)
CPU = _backend("cpu", cpu, is_fused=True)
NAMES = ("eager", "cpu", "triton")


# "triton": the Triton backend, or why there is none.
_found: "dict[str, Backend | str]" = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _find_triton() -> None:
    """Look for the Triton backend once; torch.compile calls this and does not trace the imports."""
    if not _found:
        _found["triton"] = _import_triton()


def _import_triton() -> "Backend | str":
    """Return the Triton backend, or why there is none; triton is imported when it is needed."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    try:
        from cm_fused._backends.triton import launch
    except ImportError as error:
        return f"triton does not import: {error}"
    return _backend("triton", launch, is_fused=True)


def _triton_on(device: torch.device) -> "Backend | str":
    """Return the Triton backend if it can step parameters on a device, or why it cannot."""
    _find_triton()
    backend = _found["triton"]
    if isinstance(backend, str):
        return backend
    from cm_fused._backends.triton import launch

    return launch.unavailable_reason(device) or backend


def select(requested: str | None, device: torch.device) -> Backend:
    """Return the requested backend for a device, or the best; RuntimeError says why not."""
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
            reason = _with_remedy("cpu", cpu.unavailable_reason)
            raise RuntimeError(f"backend='cpu' is not available: {reason}")
        return CPU
    backend = _fused_on(device)
    if isinstance(backend, str):
        _warn_of_fallback(device.type, backend)
        return EAGER
    return backend


def select_for(group: Mapping[str, Any], param: Tensor) -> Backend:
    """Return the backend that a group's options ask for; RuntimeError says why there is none.

    Wrapper subclasses get the reference: `tensor_checks.check_wrappers` refuses groups that ask for
    another backend.
    """
    if is_wrapper(param):
        if group["backend"] is None:
            reason = "the fused backends step plain tensors; backend='eager' takes the same steps"
            _warn_of_fallback(type(local(param)).__name__, reason)
        return EAGER
    device = param.device
    requested: str | None = group["backend"]
    if requested is not None or not group["fused"]:
        return select(requested, device)
    backend = _fused_on(device)
    if isinstance(backend, str):
        reason = _with_remedy(device.type, backend)
        raise RuntimeError(f"fused=True is not available for parameters on {device}: {reason}")
    return backend


def _fused_on(device: torch.device) -> "Backend | str":
    """Return the fastest backend for a device, or why that is the reference."""
    if device.type == "cpu":
        return cpu.unavailable_reason or CPU
    if device.type == "cuda":
        return _triton_on(device)
    return "this version has no fused backend for such devices"


@cache
def _warn_of_fallback(kind: str, reason: str) -> None:
    """Warn once per kind of parameters that the reference does the work of a fused backend.

    The kind is a device type, or the name of a wrapper subclass.
    """
    reason = _with_remedy(kind, reason)
    warn(f"cm_fused steps with the slow eager backend for {kind} parameters: {reason}")


def _with_remedy(device_type: str, reason: str) -> str:
    """Return why a device has no fused backend, on CPUs with the command that builds it."""
    return f"{reason}. {_install.remedy()}" if device_type == "cpu" else reason
