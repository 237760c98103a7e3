"""The optimizers under test, and what is held fixed about their buffers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """

    step: Callable[[], object]
    priorities: list[Tensor]

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
        max_tensors: The largest workload whose making does not take minutes.
    """

    name: str
    what: str
    make: Callable[[list[Parameter], Regime], Contestant]
    bytes: Callable[[bool], Bytes]
    regimes: tuple[Regime, ...]
    state_copies: int
    rounds_share: float = 1.0
    max_tensors: int | None = None


def parameters(shapes: Shapes) -> list[Parameter]:
    """Return parameters with gradients, both normal deviates."""
    params = [Parameter(_normal(shape)) for shape in shapes]
    for param in params:
        param.grad = _normal(param.shape)
    return params


def _normal(shape: Sequence[int]) -> Tensor:
    # Repeated from some size on: drawing as many as GPT-2 has takes longer than stepping them.
    numel = math.prod(shape)
    block = torch.randn(min(numel, _DRAWN))
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


_ALL = (FILLING, REPLACING, SKIPPING)


def _cm(capacity: int) -> Provider:
    return Provider(
        f"AdamCM C={capacity}",
        f"cm_fused.AdamCM(capacity={capacity}, backend='cpu')",
        partial(_critical, AdamCM, capacity, "cpu"),
        partial(byte_model.adam_cm, capacity),
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
PROVIDERS = (
    Provider(
        "AdamW foreach",
        "torch.optim.AdamW(foreach=True)",
        partial(_adamw, partial(AdamW, foreach=True)),
        lambda admits: byte_model.adamw_foreach(),
        (NO_BUFFER,),
        state_copies=3,
        rounds_share=0.5,
    ),
    _cm(5),
    _cm(20),
    Provider(
        "AdamCG C=5",
        "cm_fused.AdamCG(capacity=5, backend='cpu')",
        partial(_critical, AdamCG, 5, "cpu"),
        partial(byte_model.adam_cg, 5),
        _ALL,
        state_copies=8,
    ),
    Provider(
        "AdamCM C=5 eager",
        "cm_fused.AdamCM(capacity=5, backend='eager')",
        partial(_critical, AdamCM, 5, "eager"),
        partial(byte_model.eager, 5),
        (REPLACING,),
        state_copies=12,
        rounds_share=0.1,
    ),
    Provider(
        "AdamCM C=5 compiled",
        "torch.compile(cm_fused.reference.adam_cm_, fullgraph=True), capacity 5",
        partial(_compiled, 5),
        partial(byte_model.compiled, 5),
        (REPLACING,),
        state_copies=12,
        rounds_share=0.5,
        max_tensors=1,
    ),
)
