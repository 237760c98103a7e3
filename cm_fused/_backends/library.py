"""The C++ libraries: loading them, fake kernels of their operators, the state registered there."""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cm_fused._bucket import HYPERPARAMETERS
from cm_fused._state.table import KEYS, mask_of

_PACKAGE = Path(__file__).parents[1]
_LIBRARY = _PACKAGE / "_C.abi3.so"
_CUDA_LIBRARY = _PACKAGE / "_C_cuda.abi3.so"
# The one that was added last, to tell an older library where its tables are the same.
_LATEST_OPERATOR = "last_sq_norms"


def _load(library: Path, what: str) -> str | None:
    """Load a library; return None, or why it cannot be used."""
    if not library.exists():
        return f"{what} was not built when cm_fused was installed"
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{what} does not load: {error}"
    return None


def _load_extension() -> str | None:
    """Load the library of schemas and CPU kernels; return None, or why it cannot be used."""
    reason = _load(_LIBRARY, "the C++ extension")
    if reason is not None:
        return reason
    try:
        torch.library.register_fake("cm_fused::update_priorities_", _check_devices)
        torch.library.register_fake("cm_fused::sq_norms", _fake_sq_norms)
    except RuntimeError as error:
        return _another_version(error)
    return _check_names()


def _check_names() -> str | None:
    """Return why the library's tables are not this package's, or None."""
    own = {"state_keys": KEYS, "hyperparameter_names": HYPERPARAMETERS}
    for operator, names in own.items():
        try:
            of_library = getattr(torch.ops.cm_fused, operator)()
        except AttributeError as error:
            return _another_version(error)
        if of_library != ",".join(names):
            return _another_version(f"it has {operator} {of_library}")
    if not hasattr(torch.ops.cm_fused, _LATEST_OPERATOR):
        return _another_version(f"it has no operator {_LATEST_OPERATOR}")
    return None


def _another_version(what: object) -> str:
    return f"the C++ extension is another version's, reinstall cm_fused: {what}"


def _load_cuda() -> str | None:
    """Load the library of CUDA kernels; return None, or why it cannot be used."""
    if unavailable_reason is not None:
        return unavailable_reason
    # A ROCm build of torch names its devices "cuda" too.
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return _load(_CUDA_LIBRARY, "the CUDA library")


def _check_devices(*args: object, **_: object) -> None:
    """Refuse tensors on the meta device among others, which would be a step that does nothing.

    As a fake kernel it has no more to do: every output is an argument changed in place.
    """
    lists = (arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    devices = {t.device for tensors in lists for t in tensors if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {sorted(map(str, devices))}")


def _fake_sq_norms(params: list[Tensor], *others: object, **_: object) -> Tensor:
    _check_devices(params, *others)
    return torch.empty(len(params), dtype=torch.float64, device="cpu")


unavailable_reason = _load_extension()
cuda_unavailable_reason = _load_cuda()


class RegisteredState:
    """A bucket's state, handed to the library once instead of at every step.

    The library keeps the tensors, not their addresses, until this object dies. Its operators know
    it by its `id`. The arguments are the lists of a `Bucket`.
    """

    def __init__(
        self,
        state: Mapping[str, list[Tensor]],
        param_indices: Sequence[int] = (),
        shard_layouts: Sequence[int] = (),
    ) -> None:
        tensors = [tensor for key in KEYS for tensor in state.get(key, ())]
        mask = mask_of(key for key, listed in state.items() if listed)
        register = torch.ops.cm_fused.register_state
        self.id: int = register(tensors, mask, param_indices, shard_layouts)
        weakref.finalize(self, torch.ops.cm_fused.release_state, self.id)
