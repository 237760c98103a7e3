"""Arguments of the C++ library's operators, in the middle of training."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm_fused import rounding
from cm_fused._backends.library import RegisteredState
from tests.support.training import SHAPES

HYPERPARAMETERS: Mapping[str, float] = {
    "lr": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "priority_decay": 0.7,
    "group_scope": True,
    "mean_over_capacity": True,
    "eps_inside_sqrt": True,
    "maximize": False,
    "decoupled_weight_decay": False,
    "stochastic_update": False,
    "l2_in_aggregate": False,
    "sum_of_norms": False,
}
# The last parameter, so that everything before it could have been changed.
LAST = len(SHAPES) - 1


@dataclass
class Sample:
    """A bucket's tensors and the numbers of its step.

    Attributes:
        params: The parameters.
        grads: Their gradients.
        state: By key, one tensor for each parameter; without pending_slot of critical gradients.
        shard_layouts: Three numbers for each parameter, or none.
        hyperparameters: By name, the seed among them.
        scalars: Those that come in tensors: sq_norm, lr, grad_factor, found_inf.
        local_sq_norms: Receives the norms, if given.
    """

    params: list[Tensor]
    grads: list[Tensor]
    state: dict[str, list[Tensor]]
    shard_layouts: list[int] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=lambda: {**HYPERPARAMETERS, "seed": 0})
    scalars: dict[str, Tensor] = field(default_factory=dict)
    local_sq_norms: Tensor | None = None

    def lists(self) -> dict[str, list[Tensor]]:
        """Return all lists of tensors by key."""
        return {"params": self.params, "grads": self.grads, **self.state}

    def copied(self, besides: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Return copies of all tensors but one."""
        lists = self.lists().items()
        return {key: [t.clone() for t in tensors if t is not besides] for key, tensors in lists}

    def without(self, *keys: str) -> "Sample":
        """Take rows out of the state; return self."""
        for key in keys:
            del self.state[key]
        return self

    def numbers(self) -> list[float]:
        """Return the hyperparameters as the operators take them, with the kind of the buffer."""
        critical_gradients = "critical_buffer" in self.state and "pending_slot" not in self.state
        numbers = {"critical_gradients": critical_gradients, **self.hyperparameters}
        names = torch.ops.cm_fused.hyperparameter_names().split(",")
        return [float(numbers[name]) for name in names]

    def register(self) -> RegisteredState:
        """Register the state."""
        return RegisteredState(self.state, list(range(len(self.params))), self.shard_layouts)

    def step(self) -> None:
        """Register the state and step it once."""
        step_([self.register()], [self])

    def sq_norms(self) -> Tensor:
        """Call the operator of this name."""
        names = ("weight_decay", "maximize", "decoupled_weight_decay")
        result: Tensor = torch.ops.cm_fused.sq_norms(
            self.params,
            self.grads,
            self.scalars.get("grad_factor"),
            **{name: self.hyperparameters[name] for name in names},
        )
        return result

    def update_priorities(self) -> None:
        """Register the state and update its priorities."""
        found_inf = self.scalars.get("found_inf")
        state = self.register()
        torch.ops.cm_fused.update_registered_priorities_(
            [state.id],
            [self.scalars.get("sq_norm", float64(4.0))],
            [] if found_inf is None else [found_inf],
            priority_decays=[self.hyperparameters["priority_decay"]],
        )

    def flush(self) -> None:
        """Register the state and flush it."""
        state = self.register()
        torch.ops.cm_fused.flush_registered_([state.id])


def step_(states: Iterable[RegisteredState | int], cases: list[Sample]) -> None:
    """Step some registered states in one call."""
    torch.ops.cm_fused.step_registered_(
        [state if isinstance(state, int) else state.id for state in states],
        [param for case in cases for param in case.params],
        [grad for case in cases for grad in case.grads],
        *(
            [case.scalars[name] for case in cases if name in case.scalars]
            for name in ("sq_norm", "lr", "grad_factor", "found_inf")
        ),
        cases[0].local_sq_norms,
        hyperparameters=[number for case in cases for number in case.numbers()],
        seeds=[case.hyperparameters["seed"] for case in cases],
    )


def float64(value: object) -> Tensor:
    """Return numbers as the operators take them."""
    return torch.tensor(value, dtype=torch.float64)


def sample(
    dtype: torch.dtype = torch.float32,
    *,
    capacity: int = 3,
    amsgrad: bool = False,
    running_sum: bool = False,
    strided: bool = False,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> Sample:
    """Return arguments with two slots filled, one of them yet to flush."""
    generator = torch.Generator().manual_seed(0)
    state_dtype = torch.float64 if dtype is torch.float64 else torch.float32

    def noise(*shape: int, of: torch.dtype = state_dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(of)

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0] if strided else tensor

    buffers = [noise(capacity, *shape) for shape in shapes]
    for buffer in buffers:
        buffer[2:] = 0
    keys = [1.0, 0.5, *[-torch.inf] * capacity][:capacity]
    case = Sample(
        params=[spread(noise(*shape, of=dtype)) for shape in shapes],
        grads=[spread(noise(*shape, of=dtype)) for shape in shapes],
        state={
            "exp_avg": [noise(*shape) for shape in shapes],
            "exp_avg_sq": [noise(*shape).square() for shape in shapes],
            "critical_buffer": buffers,
            "priorities": [torch.tensor(keys) for _ in shapes],
            "pending_slot": [torch.tensor(min(1, capacity - 1)) for _ in shapes],
            "step": [torch.tensor(2.0) for _ in shapes],
        },
    )
    if amsgrad:
        case.state["max_exp_avg_sq"] = [noise(*shape).square() for shape in shapes]
    if running_sum:
        case.state["critical_sum"] = [buffer.sum(0) for buffer in buffers]
    return case


def rounded_sample(
    dtype: torch.dtype, slot_dtype: torch.dtype, moment_dtype: torch.dtype, **options: Any
) -> Sample:
    """Return arguments with state of low precision; a half parameter has a compensation."""
    case = sample(dtype, capacity=5, **options)
    if dtype in (torch.bfloat16, torch.float16):
        case.state["compensation"] = [torch.zeros_like(param) for param in case.params]

    def store(key: str, scales_key: str, quantize: Callable[[Tensor], Any]) -> None:
        quantized = [quantize(tensor) for tensor in case.state[key]]
        case.state[scales_key] = [scales for _, scales in quantized]
        case.state[key] = [
            stored.contiguous().view(
                stored.shape if stored.dtype is rounding.PACKED else tensor.shape
            )
            for (stored, _), tensor in zip(quantized, case.state[key], strict=True)
        ]

    store(
        "critical_buffer",
        "critical_scales",
        lambda t: rounding.quantize(rounding.as_flat(t, leading=1), slot_dtype),
    )
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if moment_dtype is torch.int8:
            store(
                key,
                f"{key}_scales",
                lambda t, signed=signed: rounding.quantize_moment(  # type: ignore[misc]
                    rounding.as_flat(t), None, signed=signed
                ),
            )
        else:
            case.state[key] = [moment.to(moment_dtype) for moment in case.state[key]]
    return case


def split_sample() -> Sample:
    """Return arguments whose parameters are parts of float32 masters."""
    return _with_remainders(sample(torch.bfloat16))


def full_sample() -> Sample:
    """Return arguments with every row of the state."""
    options = {"amsgrad": True, "running_sum": True}
    return _with_remainders(rounded_sample(torch.bfloat16, torch.int8, torch.int8, **options))


def _with_remainders(case: Sample) -> Sample:
    case.state["master_remainder"] = [
        torch.full_like(param, 77, dtype=torch.int16) for param in case.params
    ]
    return case


SAMPLES: dict[str, Callable[[], Sample]] = {
    "plain": sample,
    "amsgrad": lambda: sample(amsgrad=True),
    "running_sum": lambda: sample(capacity=5, running_sum=True),
    "one_slot": lambda: sample(capacity=1),
    "float64": lambda: sample(torch.float64, amsgrad=True),
    "bfloat16": lambda: sample(torch.bfloat16, capacity=5, running_sum=True),
    "float16": lambda: sample(torch.float16),
    "split": split_sample,
    "strided": lambda: sample(strided=True),
    "strided_bfloat16": lambda: sample(torch.bfloat16, strided=True),
    "int8": lambda: rounded_sample(torch.float32, torch.int8, torch.int8),
    "int4": lambda: rounded_sample(torch.float32, rounding.PACKED, torch.bfloat16),
    "float8": lambda: rounded_sample(torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16),
    "empty": lambda: sample(shapes=((0,), (0, 3))),
}
