"""The optimizers under test, and what is held fixed about their buffers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from bench.speed import bytes as byte_model
from bench.speed.bytes import Bytes
from bench.speed.workloads import Shapes
from cm_fused import AdamCG, AdamCM
from cm_fused.rounding import INT4

_DRAWN = 2**20
_STEPS_BEFORE_CAPTURE = 3
# The Python-side cost of these is some microseconds an operator and tensor.
_EAGER_TENSORS = 1000
_RIVALS_TENSORS = 200


@dataclass(frozen=True)
class Regime:
    """The change of the buffers at every timed step.

    Attributes:
        name: Its name in the results.
        key: What all keys are set to at the start.
        priority_decay: The optimizers' option.
        every_round: Whether the keys are set again before each step.
        admits: Whether a step admits.
    """

    name: str
    key: float
    priority_decay: float
    every_round: bool
    admits: bool


FILLING = Regime("filling", -torch.inf, 0.7, every_round=True, admits=True)
# The gradients' norm never changes while the keys decay: each step replaces the oldest slot, so
# that all slots are visited in turn, as in training.
REPLACING = Regime("replacing", 0.0, 0.7, every_round=False, admits=True)
SKIPPING = Regime("skipping", 1e30, 1.0, every_round=False, admits=False)
NO_BUFFER = Regime("no buffer", 0.0, 1.0, every_round=False, admits=False)


@dataclass(frozen=True)
class Contestant:
    """An optimizer whose state is made.

    Attributes:
        step: Takes a step.
        priorities: The keys of all its buffers.
    """

    step: Callable[[], object]
    priorities: list[Tensor]

    def set_keys(self, regime: Regime) -> None:
        """Put the buffers into the regime's initial state."""
        for keys in self.priorities:
            keys.fill_(regime.key)

    def follows(self, regime: Regime) -> bool:
        """Return whether every buffer has admitted since its keys were set, or none has."""
        if not self.priorities:
            return True
        admitted = (torch.stack(self.priorities) != regime.key).any(1)
        return bool((admitted == regime.admits).all())


class Limit(NamedTuple):
    """The most tensors a provider is measured on, and why not more."""

    tensors: int
    reason: str


@dataclass(frozen=True)
class Provider:
    """One implementation of one algorithm.

    Attributes:
        name: Its name in the results.
        what: What is timed, in a line.
        make: Builds it over parameters that have gradients.
        bytes: The byte model, from whether steps admit; None where it is not known.
        regimes: Those in which it is measured.
        state_copies: Copies of the parameters it holds, for the memory it needs.
        rounds_share: Of the workload's rounds, for providers too slow for all of them.
        limit: The largest workload it is measured on.
        package: What it comes from, where that need not be installed.
    """

    name: str
    what: str
    make: Callable[[list[Parameter], Regime], Contestant]
    bytes: Callable[[bool], Bytes] | None
    regimes: tuple[Regime, ...]
    state_copies: int
    rounds_share: float = 1.0
    limit: Limit | None = None
    package: str | None = None


def parameters(shapes: Shapes, device: str) -> list[Parameter]:
    """Return parameters with gradients, both normal deviates."""
    params = [Parameter(_normal(shape, device)) for shape in shapes]
    for param in params:
        param.grad = _normal(param.shape, device)
    return params


def _normal(shape: Sequence[int], device: str) -> Tensor:
    # Repeated from some size on: drawing as many as GPT-2 has takes longer than stepping them.
    numel = math.prod(shape)
    block = torch.randn(min(numel, _DRAWN), device=device)
    return block.repeat(-(-numel // block.numel()))[:numel].reshape(shape)


def _adamw(
    make: Callable[[list[Parameter]], Optimizer], params: list[Parameter], regime: Regime
) -> Contestant:
    optimizer = make(params)
    return Contestant(_prepared(optimizer), priorities=[])


def _rival(package: str, module: str, name: str, copies: int, **options: object) -> Provider:
    """Return another library's AdamW on CPUs, imported when it is measured."""

    def make(params: list[Parameter]) -> Optimizer:
        optimizer: Optimizer = getattr(import_module(module), name)(params, **options)
        return optimizer

    words = [f"{key}={value!r}" for key, value in options.items()]
    return Provider(
        f"{package} {name}",
        f"{module}.{name}({', '.join(words)})",
        partial(_adamw, make),
        None,
        (NO_BUFFER,),
        state_copies=copies,
        rounds_share=0.1,
        limit=Limit(_RIVALS_TENSORS, "some ms or a compilation for each tensor take minutes"),
        package=package,
    )


def _critical(
    make: Callable[..., Optimizer],
    capacity: int,
    backend: str,
    params: list[Parameter],
    regime: Regime,
) -> Contestant:
    optimizer = make(
        params, capacity=capacity, priority_decay=regime.priority_decay, backend=backend
    )
    step = _prepared(optimizer)
    return Contestant(step, [state["priorities"] for state in optimizer.state.values()])


def _prepared(optimizer: Optimizer) -> Callable[[], object]:
    """Have the state made; return the step, or the replay of its graph if it is capturable."""
    if optimizer.defaults.get("capturable"):
        return _captured(optimizer)
    optimizer.step()
    return optimizer.step


def _captured(optimizer: Optimizer) -> Callable[[], object]:
    """Return the replay of a CUDA graph of one step of an optimizer."""
    # As torch asks for: the steps before are taken on a stream of their own.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_STEPS_BEFORE_CAPTURE):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay() -> None:
        graph.replay()

    # The graph reads what the optimizer holds.
    replay.optimizer = optimizer  # type: ignore[attr-defined]
    return replay


def _compiled(capacity: int, params: list[Parameter], regime: Regime) -> Contestant:
    eager = _critical(AdamCM, capacity, "eager", params, regime)
    # What was compiled for another workload would make this one's shapes dynamic.
    torch.compiler.reset()
    step = torch.compile(eager.step, fullgraph=True, dynamic=False)
    return Contestant(step, eager.priorities)


def _regimes(device: str) -> tuple[Regime, ...]:
    # To fill moves the bytes of replacing; on a GPU setting the keys before each step would be
    # most of the time.
    return (FILLING, REPLACING, SKIPPING) if device == "cpu" else (REPLACING, SKIPPING)


def _moved(capacity: int, critical_gradients: bool, device: str) -> Callable[[bool], Bytes]:
    """Return the byte model of a device's fused step."""
    if device == "cuda":
        return partial(byte_model.triton, capacity, critical_gradients=critical_gradients)
    return partial(byte_model.adam_cg if critical_gradients else byte_model.adam_cm, capacity)


def _fused(kind: type[AdamCM | AdamCG], capacity: int, device: str) -> Provider:
    backend = BACKENDS[device]
    return Provider(
        f"{kind.__name__} C={capacity}",
        f"cm_fused.{kind.__name__}(capacity={capacity}, backend={backend!r})",
        partial(_critical, kind, capacity, backend),
        _moved(capacity, kind is AdamCG, device),
        _regimes(device),
        state_copies=capacity + 3,
    )


def _rounded(
    device: str, buffer_dtype: torch.dtype, moment_dtype: torch.dtype | None = None
) -> Provider:
    moment_bytes = (moment_dtype or torch.float32).itemsize
    slot_bytes = byte_model.slot_bytes(buffer_dtype)
    precision = {"buffer_dtype": buffer_dtype, "moment_dtype": moment_dtype}
    make = partial(AdamCM, buffer_dtype=buffer_dtype, moment_dtype=moment_dtype)
    words = [f"{name}={dtype}" for name, dtype in precision.items() if dtype]
    short = [str(dtype).removeprefix("torch.") for dtype in precision.values() if dtype]
    return Provider(
        f"AdamCM {' + '.join(short)}",
        f"cm_fused.AdamCM({', '.join(words)}, backend={BACKENDS[device]!r})",
        partial(_critical, make, 5, BACKENDS[device]),
        partial(byte_model.rounded, 5, moment_bytes=moment_bytes, slot_bytes=slot_bytes),
        (REPLACING,),
        state_copies=5,
    )


def _captured_fused(capacity: int, device: str) -> Provider:
    fused = _fused(AdamCM, capacity, device)
    make = partial(AdamCM, capturable=True)
    return replace(
        fused,
        name=f"{fused.name} graph",
        what=f"replay of a CUDA graph of {fused.what[:-1]}, capturable=True)",
        make=partial(_critical, make, capacity, BACKENDS[device]),
    )


# The fused backend of each device.
BACKENDS = {"cpu": "cpu", "cuda": "triton"}
BASELINE = Provider(
    "AdamW fused",
    "torch.optim.AdamW(fused=True)",
    partial(_adamw, partial(AdamW, fused=True)),
    lambda admits: byte_model.adamw_fused(),
    (NO_BUFFER,),
    state_copies=2,
)
_ADAMW_FOREACH = Provider(
    "AdamW foreach",
    "torch.optim.AdamW(foreach=True)",
    partial(_adamw, partial(AdamW, foreach=True)),
    lambda admits: byte_model.adamw_foreach(),
    (NO_BUFFER,),
    state_copies=3,
    rounds_share=0.5,
)
_ADAMW_DEFAULT = replace(
    _ADAMW_FOREACH,
    name="AdamW default",
    what="torch.optim.AdamW()",
    make=partial(_adamw, AdamW),
)
# A gradient that a step takes away would be missing at the next one.
_RIVALS = (
    _rival("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", 1, lr=1e-3),
    _rival("torchao", "torchao.optim", "AdamW8bit", 1, lr=1e-3),
    _rival("heavyball", "heavyball", "AdamW", 2, lr=1e-3, consume_grad=False),
)
_ADAMW_GRAPH = Provider(
    "AdamW fused graph",
    "replay of a CUDA graph of torch.optim.AdamW(fused=True, capturable=True)",
    partial(_adamw, partial(AdamW, fused=True, capturable=True)),
    lambda admits: byte_model.adamw_fused(),
    (NO_BUFFER,),
    state_copies=2,
)
_EAGER = Provider(
    "AdamCM C=5 eager",
    "cm_fused.AdamCM(capacity=5, backend='eager')",
    partial(_critical, AdamCM, 5, "eager"),
    partial(byte_model.eager, 5),
    (REPLACING,),
    state_copies=12,
    rounds_share=0.1,
)
_COMPILED = Provider(
    "AdamCM C=5 compiled",
    "torch.compile of the step of cm_fused.AdamCM(capacity=5, backend='eager')",
    partial(_compiled, 5),
    partial(byte_model.compiled, 5),
    (REPLACING,),
    state_copies=12,
    rounds_share=0.5,
    limit=Limit(1, "unrolled over several tensors it compiles for minutes"),
)


def providers(device: str) -> tuple[Provider, ...]:
    """Return what is measured on a device beside the baseline, the slowest last."""
    low_precision = (
        _rounded(device, torch.bfloat16),
        _rounded(device, torch.int8),
        _rounded(device, torch.int8, torch.bfloat16),
        _rounded(device, INT4, torch.bfloat16),
    )
    if device == "cpu":
        critical = (
            _fused(AdamCM, 5, device),
            _fused(AdamCM, 20, device),
            _fused(AdamCG, 5, device),
            *low_precision,
        )
        return (_ADAMW_DEFAULT, _ADAMW_FOREACH, *critical, _EAGER, _COMPILED, *_RIVALS)
    eager_limit = Limit(_EAGER_TENSORS, "dozens of launches a tensor take seconds a step")
    return (
        _fused(AdamCM, 5, device),
        _captured_fused(5, device),
        _fused(AdamCM, 20, device),
        _fused(AdamCG, 5, device),
        _fused(AdamCG, 20, device),
        *low_precision,
        _ADAMW_GRAPH,
        _ADAMW_FOREACH,
        replace(_EAGER, limit=eager_limit),
        _COMPILED,
    )
