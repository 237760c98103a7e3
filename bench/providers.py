"""The optimizers under test, and what is held fixed about their buffers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from bench import bytes as byte_model
from bench.bytes import Bytes
from bench.workloads import Shapes
from cm_fused import AdamCG, AdamCM, _critical_adam, _state, reference
from cm_fused._bucket import Bucket

_DRAWN = 2**20


@dataclass(frozen=True)
class Regime:
    """What the buffers do at every timed step.

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
        kept: What has to live as long as it is stepped.
    """

    step: Callable[[], object]
    priorities: list[Tensor]
    kept: object = None

    def set_keys(self, regime: Regime) -> None:
        """Put the buffers into the regime's initial state."""
        for keys in self.priorities:
            keys.fill_(regime.key)

    def follows(self, regime: Regime) -> bool:
        """Return whether every buffer has admitted since its keys were set, or none has."""
        return all(bool((keys != regime.key).any()) == regime.admits for keys in self.priorities)


@dataclass(frozen=True)
class Provider:
    """One implementation of one algorithm.

    Attributes:
        name: Its name in the results.
        what: What is timed, in a line.
        make: Builds it over parameters that have gradients.
        bytes: The byte model, from whether steps admit.
        regimes: Those in which it is measured.
        state_copies: Copies of the parameters it holds, for the memory it needs.
        rounds_share: Of the workload's rounds, for providers too slow for all of them.
        max_tensors: The largest workload that it is measured on.
        too_many: Why it is not measured on larger ones.
    """

    name: str
    what: str
    make: Callable[[list[Parameter], Regime], Contestant]
    bytes: Callable[[bool], Bytes]
    regimes: tuple[Regime, ...]
    state_copies: int
    rounds_share: float = 1.0
    max_tensors: int | None = None
    too_many: str = ""


def parameters(shapes: Shapes, device_type: str) -> list[Parameter]:
    """Return parameters with gradients, both normal deviates."""
    params = [Parameter(_normal(shape, device_type)) for shape in shapes]
    for param in params:
        param.grad = _normal(param.shape, device_type)
    return params


def _normal(shape: Sequence[int], device_type: str) -> Tensor:
    # Repeated from some size on: drawing as many as GPT-2 has takes longer than stepping them.
    numel = math.prod(shape)
    block = torch.randn(min(numel, _DRAWN), device=device_type)
    return block.repeat(-(-numel // block.numel()))[:numel].reshape(shape)


def _adamw(
    make: Callable[[list[Parameter]], AdamW], params: list[Parameter], regime: Regime
) -> Contestant:
    optimizer = make(params)
    optimizer.step()
    return Contestant(optimizer.step, priorities=[])


def _critical(
    optimizer_class: type[AdamCM | AdamCG],
    capacity: int,
    backend: str,
    params: list[Parameter],
    regime: Regime,
) -> Contestant:
    optimizer = optimizer_class(
        params, capacity=capacity, priority_decay=regime.priority_decay, backend=backend
    )
    optimizer.step()
    return Contestant(optimizer.step, _priorities(optimizer))


def _priorities(optimizer: Optimizer) -> list[Tensor]:
    return [state["priorities"] for state in optimizer.state.values()]


def _compiled(capacity: int, params: list[Parameter], regime: Regime) -> Contestant:
    optimizer = AdamCM(
        params, capacity=capacity, priority_decay=regime.priority_decay, backend="eager"
    )
    optimizer.step()
    (group,) = optimizer.param_groups
    options = _critical_adam._step_options(group)
    bucket = Bucket(
        [param.detach() for param in params],
        [param.grad for param in params if param.grad is not None],
        **_state.lists([optimizer.state[p] for p in params], _state.required_keys(group)),
    )
    # What was compiled for another workload would make this one's shapes dynamic.
    torch.compiler.reset()
    step_ = torch.compile(reference.adam_cm_, fullgraph=True, dynamic=False)
    return Contestant(lambda: step_(bucket, options), bucket.priorities)


def _captured(
    make: Callable[[list[Parameter]], Optimizer], params: list[Parameter], regime: Regime
) -> Contestant:
    """Return the replays of a captured step."""
    optimizer = make(params)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    critical = isinstance(optimizer, AdamCM)
    return Contestant(graph.replay, _priorities(optimizer) if critical else [], optimizer)


_ALL = (FILLING, REPLACING, SKIPPING)
_BACKENDS = {"cpu": "cpu", "cuda": "triton"}


def _fused(kind: type[AdamCM | AdamCG], capacity: int, device_type: str) -> Provider:
    gradients = kind is AdamCG
    if device_type == "cuda":
        model = partial(byte_model.triton, capacity, critical_gradients=gradients)
    else:
        model = partial(byte_model.adam_cg if gradients else byte_model.adam_cm, capacity)
    backend = _BACKENDS[device_type]
    return Provider(
        f"{kind.__name__} C={capacity}",
        f"cm_fused.{kind.__name__}(capacity={capacity}, backend='{backend}')",
        partial(_critical, kind, capacity, backend),
        model,
        _ALL,
        state_copies=capacity + 3,
    )


BASELINE = Provider(
    "AdamW fused",
    "torch.optim.AdamW(fused=True)",
    partial(_adamw, partial(AdamW, fused=True)),
    lambda admits: byte_model.adamw_fused(),
    (NO_BUFFER,),
    state_copies=2,
)
_FOREACH = Provider(
    "AdamW foreach",
    "torch.optim.AdamW(foreach=True)",
    partial(_adamw, partial(AdamW, foreach=True)),
    lambda admits: byte_model.adamw_foreach(),
    (NO_BUFFER,),
    state_copies=3,
    rounds_share=0.5,
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
    "torch.compile(cm_fused.reference.adam_cm_, fullgraph=True), capacity 5",
    partial(_compiled, 5),
    partial(byte_model.compiled, 5),
    (REPLACING,),
    state_copies=12,
    rounds_share=0.5,
    max_tensors=1,
    too_many="unrolled over {} tensors it compiles for minutes",
)
_CAPTURED = (
    Provider(
        "AdamW in a graph",
        "torch.optim.AdamW(fused=True, capturable=True), captured",
        partial(_captured, partial(AdamW, fused=True, capturable=True)),
        lambda admits: byte_model.adamw_fused(),
        (NO_BUFFER,),
        state_copies=2,
    ),
    Provider(
        "AdamCM C=5 in a graph",
        "cm_fused.AdamCM(capacity=5, backend='triton', capturable=True), captured",
        partial(_captured, partial(AdamCM, capacity=5, backend="triton", capturable=True)),
        partial(byte_model.triton, 5, critical_gradients=False),
        (REPLACING,),
        state_copies=8,
    ),
)


def providers(device_type: str) -> tuple[Provider, ...]:
    """Return what is measured on a type of device, besides the baseline."""
    if device_type == "cuda":
        eager = replace(_EAGER, max_tensors=1000, too_many="it launches kernels for {} tensors")
        fused = [_fused(kind, c, device_type) for kind in (AdamCM, AdamCG) for c in (5, 20)]
        return (_FOREACH, *fused, *_CAPTURED, eager, _COMPILED)
    fused = [_fused(AdamCM, 5, "cpu"), _fused(AdamCM, 20, "cpu"), _fused(AdamCG, 5, "cpu")]
    return (_FOREACH, *fused, _EAGER, _COMPILED)
