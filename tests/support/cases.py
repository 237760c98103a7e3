"""The cases of the numeric tests, as data, and the one place that builds tensors from them."""

import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM, _bucket
from cm_fused._backends import cpu
from cm_fused._bucket import Bucket, StepOptions
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.making import missing_state, state_dtype
from cm_fused._state.table import fused_keys, required_keys
from tests.support.oracle import Array, Options

Kind = Literal["cm", "cg"]
Grads = list[Tensor | None]

KINDS: tuple[Kind, ...] = ("cm", "cg")
BACKENDS = ("eager", "cpu", "triton")
FUSED_BACKENDS = BACKENDS[1:]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# From the least to the best; a machine that has one has those before it.
CAPABILITIES = ("default", "avx2", "avx512")

ROOT = Path(__file__).parents[2]


def kernel_constant(name: str) -> int:
    """Return an integer constant of the CPU kernels."""
    source = (ROOT / "csrc" / "cpu" / "step.h").read_text()
    match = re.search(rf"constexpr int64_t {name} = (\d+);", source)
    if match is None:
        raise ValueError(f"csrc/cpu/step.h must define {name}")
    return int(match[1])


BLOCK = kernel_constant("kBlockSize")
CHUNK = kernel_constant("kChunkSize")


def device_of(backend: str) -> torch.device:
    """Return where a backend's tests have their tensors: interpreted kernels step the CPU's."""
    compiled = os.environ.get("TRITON_INTERPRET") != "1" and torch.cuda.is_available()
    return torch.device("cuda" if backend == "triton" and compiled else "cpu")


# Skip rules


def skip_reason(
    *,
    backend: str | None = None,
    capability: str | None = None,
    proc: bool = False,
    nvcc: bool = False,
    gpu: bool = False,
) -> str | None:
    """Return why this machine cannot run a case, or None: the rules of backends and devices.

    Args:
        backend: The backend that the case needs.
        capability: The instruction set that the case needs.
        proc: The case reads /proc.
        nvcc: The case compiles CUDA sources.
        gpu: The case runs on a CUDA device.
    """
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if gpu and device_of("triton").type != "cuda":
        return "this process has no CUDA device, or interprets Triton kernels"
    if (backend == "cpu" or capability is not None) and cpu.unavailable_reason is not None:
        return cpu.unavailable_reason
    if capability is not None:
        best = torch.backends.cpu.get_cpu_capability().lower()
        has = CAPABILITIES.index(best) if best in CAPABILITIES else 0
        if CAPABILITIES.index(capability) > has:
            return f"this machine lacks {capability}"
    if proc and not Path("/proc/self/status").exists():
        return "this machine has no /proc"
    if nvcc and shutil.which("nvcc") is None:
        return "nvcc is not installed"
    return None


def skip_if(reason: str | None) -> pytest.MarkDecorator:
    """Return the mark of a case that cannot run where there is a reason."""
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def backend_params(backends: Sequence[str] = BACKENDS) -> list[Any]:
    """Return backends as pytest parameters."""
    return [pytest.param(backend, marks=_marks(backend)) for backend in backends]


def _marks(backend: str) -> list[pytest.MarkDecorator]:
    on_gpu = [pytest.mark.gpu] if device_of(backend).type == "cuda" else []
    return [skip_if(skip_reason(backend=backend)), *on_gpu]


def capability_params() -> list[Any]:
    """Return every instruction set as a pytest parameter."""
    return [
        pytest.param(capability, marks=skip_if(skip_reason(capability=capability)))
        for capability in CAPABILITIES
    ]


needs_cpu_backend = skip_if(skip_reason(backend="cpu"))
needs_proc = skip_if(skip_reason(proc=True))
needs_nvcc = skip_if(skip_reason(nvcc=True))
needs_triton = skip_if(skip_reason(backend="triton"))


# Options

DECAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}


def option_matrix(capacities: tuple[int, ...]) -> list[Options]:
    """Return every combination of the discrete options.

    The keys' decay turns through 0.7, 1 (ties stay ties) and 0 from one to the next. lr is large,
    so that an error of the update shows in the parameters.
    """
    matrix = itertools.product(
        KINDS,
        ("group", "tensor"),
        ("capacity", "size"),
        (True, False),
        (False, True),
        (False, True),
        DECAYS.values(),
        capacities,
    )
    return [
        Options(
            kind=kind,
            lr=0.05,
            amsgrad=amsgrad,
            capacity=capacity,
            priority_decay=(0.7, 1.0, 0.0)[index % 3],
            priority_scope=scope,
            buffer_mean=mean,
            eps_inside_sqrt=inside,
            maximize=maximize,
            **decay,
        )
        for index, (kind, scope, mean, inside, amsgrad, maximize, decay, capacity) in enumerate(
            matrix
        )
    ]


def adjusted_options() -> list[Options]:
    """Return options whose update is scaled, with every form of weight decay."""
    return [
        Options(
            kind=kind,
            lr=0.05,
            betas=betas,
            capacity=3,
            adjust_lr_fn="match_rms_adamw",
            **decay,
        )
        for kind in KINDS
        for betas in ((0.9, 0.99), (0.0, 0.9), (0.5, 0.8))
        for decay in DECAYS.values()
    ]


def name_of(options: Options) -> str:
    """Return a test id: the kind, and every option that is not the default."""
    default = Options()
    changed = [
        f"{field.name}={getattr(options, field.name)}"
        for field in fields(options)
        if field.name not in ("kind", "lr")
        and getattr(options, field.name) != getattr(default, field.name)
    ]
    return "-".join([options.kind, *changed])


def keywords(options: Options) -> dict[str, Any]:
    """Return the optimizers' keywords."""
    return {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name != "kind"
    }


def make_optimizer(
    params: Any, options: Options, backend: str | None, **precision: Any
) -> CriticalAdam:
    """Return the public class of the kind and the form of weight decay, with these options.

    Args:
        params: As of the class.
        options: Those that the oracle knows.
        backend: As of the class.
        precision: Options of low precision, of which the float64 oracle knows nothing.
    """
    classes: dict[tuple[str, bool], type[CriticalAdam]] = {
        ("cm", False): AdamCM,
        ("cm", True): AdamWCM,
        ("cg", False): AdamCG,
        ("cg", True): AdamWCG,
    }
    optimizer_class = classes[options.kind, options.decoupled_weight_decay]
    return optimizer_class(params, **keywords(options), **precision, backend=backend)


def step_options(options: Options) -> StepOptions:
    """Return the options of one step of a bucket."""
    return _bucket.step_options({**keywords(options), "low_precision_update": "nearest", "seed": 0})


# What happens in a run


@dataclass(frozen=True)
class Event:
    """The gradients of one step.

    Attributes:
        scale: Their standard deviation.
        repeats: The last step's gradients again, so that keys tie where they do not decay.
        missing: The parameter whose `.grad` is None.
    """

    scale: float = 1.0
    repeats: bool = False
    missing: int | None = None


@dataclass(frozen=True)
class Regime:
    """What the buffer goes through once it is full.

    Attributes:
        name: For the test id.
        tail: The steps after the capacity's, which fill the buffer.
        priority_decay: Under which the tail does what the name says.
    """

    name: str
    tail: tuple[Event, ...]
    priority_decay: float = 0.7

    def events(self, capacity: int) -> list[Event]:
        """Return all steps."""
        scales = itertools.cycle((1.0, 0.5, 2.0, 0.25, 4.0))
        return [*(Event(scale) for scale in itertools.islice(scales, capacity)), *self.tail]


FILLING = Regime("filling", ())
REPLACING = Regime("replacing", tuple(Event(8.0 * 1.5**t) for t in range(8)))
SKIPPING = Regime("skipping", tuple(Event(0.1 * 0.5**t) for t in range(6)), priority_decay=1.0)
# Each repetition ties with the key stored last; a larger gradient then finds several smallest.
TIES = Regime(
    "ties",
    (
        *(Event(8.0, repeats=t > 0) for t in range(4)),
        *(Event(16.0, repeats=t > 0) for t in range(3)),
        Event(0.0),
        Event(0.0),
    ),
    priority_decay=1.0,
)
NEW_KEYS = Regime("new_keys", tuple(Event() for _ in range(8)), priority_decay=0.0)
# Replaced, skipped, replaced, a tie, a missing gradient, a spike, zeros, and on.
MIXED = Regime(
    "mixed",
    (
        Event(8.0),
        Event(0.01),
        Event(8.0),
        Event(repeats=True),
        Event(2.0, missing=1),
        Event(1e3),
        Event(0.0),
        Event(),
    ),
)
# As much of that as fits in a few steps.
SHORT = Regime("short", (Event(8.0), Event(0.01), Event(missing=1), Event(1e3), Event()))
REGIMES = (FILLING, REPLACING, SKIPPING, TIES, NEW_KEYS, MIXED)


# Tensors


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own, so that no test depends on another's draws."""
    return torch.Generator().manual_seed(seed)


def normal_like(tensor: Tensor, scale: float, source: torch.Generator) -> Tensor:
    """Return normal values of a tensor's shape, dtype and memory layout.

    Real values are float32 numbers, so that every dtype from float32 up sees the same ones.
    """
    dtype = torch.complex64 if tensor.is_complex() else torch.float32
    values = scale * torch.randn(tensor.shape, generator=source, dtype=dtype)
    return torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(values)


def make_params(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Return parameters of these shapes."""
    source = generator(seed)
    return [normal_like(torch.empty(shape, dtype=dtype), 1.0, source) for shape in shapes]


def make_gradients(params: list[Tensor], events: list[Event]) -> Iterator[Grads]:
    """Yield the gradients of every step, laid out as their parameters."""
    source = generator(1)
    last: list[Tensor] = []
    for event in events:
        if not (event.repeats and last):
            last = [normal_like(param.detach(), event.scale, source) for param in params]
        yield [grad if i != event.missing else None for i, grad in enumerate(last)]


def copy_of(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a copy with the same strides, gaps and overlaps included.

    Args:
        tensor: What to copy.
        device: Where to, else where it is.
    """
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return tensor.to(device, copy=True)
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    memory = tensor.as_strided((extent,), (1,))
    return memory.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), 0)


def real(tensor: Tensor) -> Tensor:
    """Return a tensor, or the view of pairs of a complex one."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def to_array(tensor: Tensor) -> Array:
    """Return the values as a new float64 array, exactly; a complex tensor's as pairs."""
    return np.array(real(tensor).to("cpu", torch.float64).numpy())


def grads_to_arrays(grads: Grads) -> list[Array | None]:
    """Return the gradients as the oracle takes them."""
    return [None if grad is None else to_array(grad) for grad in grads]


def make_bucket(
    params: list[Tensor],
    options: Options,
    *,
    fused: bool,
    buffer_dtype: torch.dtype | None = None,
) -> Bucket:
    """Return a bucket with new state; its gradients are zeros to write to.

    Args:
        params: Real tensors.
        options: For what state there is to be.
        fused: Also what the "cpu" backend keeps.
        buffer_dtype: Of the slots.
    """
    group = {
        "amsgrad": options.amsgrad,
        "capacity": options.capacity,
        "buffer_dtype": buffer_dtype,
        "moment_dtype": None,
        "low_precision_update": "nearest",
    }
    critical_gradients = options.kind == "cg"
    extra = fused_keys(group, critical_gradients=critical_gradients) if fused else ()
    keys = (*required_keys(group), *extra)
    states = [missing_state(param, {}, keys, group) for param in params]
    return Bucket(
        params,
        [torch.zeros_like(param) for param in params],
        {key: [state[key] for state in states] for key in keys},
        list(range(len(params))),
        critical_gradients=critical_gradients,
        options=step_options(options),
    )


def eps_of(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next number of the dtype a state is kept in."""
    return float(torch.finfo(state_dtype(dtype)).eps)


def ulp(values: Array, dtype: torch.dtype) -> Array:
    """Return the distance between the neighbours of each value in a stored dtype."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(values)
    smallest = info.smallest_normal * info.eps
    distance: Array = np.maximum(np.ldexp(info.eps, exponent - 1), smallest)
    return distance
