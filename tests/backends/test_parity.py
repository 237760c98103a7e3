"""Every fused backend does what the reference does: in lock-step, whatever the tensors are like."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import (
    BLOCK,
    CHUNK,
    DTYPES,
    FUSED_BACKENDS,
    KINDS,
    MIXED,
    REGIMES,
    SHORT,
    Event,
    Kind,
    Regime,
    adjusted_options,
    backend_params,
    generator,
    make_gradients,
    make_optimizer,
    make_params,
    name_of,
    normal_like,
    option_matrix,
)
from tests.support.lockstep import Lockstep, Maker, maker
from tests.support.oracle import Options

pytestmark = [
    pytest.mark.sampled,
    pytest.mark.parametrize("backend", backend_params(FUSED_BACKENDS)),
]

# lr is large, so that an error of the update shows in the parameters.
LR = 0.05
# From here on every fused backend keeps a running sum; below 3 none does.
CAPACITY = 5
# Around the blocks and chunks of each backend; in one of whole chunks, all of them are aligned.
SIZES = (
    *(0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7, CHUNK - 1, CHUNK, CHUNK + 1),
    *(CHUNK_SIZE - 1, CHUNK_SIZE, 2 * CHUNK_SIZE + 4),
)
EVENTS = MIXED.events(capacity=3)


def _run(backend: str, params: list[Tensor], make: Maker, events: list[Event]) -> None:
    lockstep = Lockstep(params, make, backend)
    for grads in make_gradients(params, events):
        lockstep.step(grads)


@pytest.mark.parametrize("options", [*option_matrix((3,)), *adjusted_options()], ids=name_of)
def test_options(backend: str, options: Options) -> None:
    """Every combination of the discrete options."""
    _run(
        backend,
        make_params([(3 * BLOCK + 7,), (5, 3)]),
        maker(options),
        SHORT.events(options.capacity),
    )


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
@pytest.mark.parametrize(
    ("dtype", "capacity"),
    [
        *((dtype, CAPACITY) for dtype in DTYPES),
        *((dtype, 0) for dtype in DTYPES),
        *((torch.float32, capacity) for capacity in (1, 2, 3, 4, 20)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_regimes(
    backend: str, kind: Kind, dtype: torch.dtype, capacity: int, regime: Regime
) -> None:
    """Whatever the buffer goes through, in every dtype, with and without a running sum."""
    options = Options(kind, lr=LR, capacity=capacity, priority_decay=regime.priority_decay)
    _run(
        backend, make_params([(BLOCK + 1,), (2, 3)], dtype), maker(options), regime.events(capacity)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(backend: str, kind: Kind, size: int, dtype: torch.dtype) -> None:
    """Sizes around a block and a chunk, beside a tensor that fills neither."""
    options = Options(kind, lr=LR, capacity=CAPACITY, weight_decay=0.1)
    events = SHORT.events(options.capacity)
    _run(backend, make_params([(size,), (3,)], dtype), maker(options), events)


def test_a_tensor_without_elements_alone(backend: str) -> None:
    """A group that has no element at all: steps are counted, its norm is 0."""
    _run(backend, make_params([(0,)]), maker(Options()), EVENTS)


def test_many_tensors(backend: str) -> None:
    """More tensors than any table of a backend should take for granted."""
    shapes: list[tuple[int, ...]] = [
        (1 + i % 70,) for i in range(300 if backend != "triton" else 90)
    ]
    _run(
        backend,
        make_params(shapes),
        maker(Options(lr=LR, capacity=2)),
        [Event(), Event(2.0), Event(0.1)],
    )


# Layouts: each makes a parameter; its gradient is laid out alike unless said otherwise.


def _strided_slice() -> Tensor:
    return make_params([(10, 50)])[0][::2, 1:40:3]


def _slice_of_transposed() -> Tensor:
    return make_params([(20, 30, 4)])[0].permute(2, 0, 1)[1:, ::3, :7]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: make_params([()])[0],
    "transposed": lambda: make_params([(17, 9)])[0].t(),
    "permuted": lambda: make_params([(4, 30, 5)])[0].permute(1, 2, 0),
    "strided_slice": _strided_slice,
    "slice_of_transposed": _slice_of_transposed,
    "every_other": lambda: make_params([(2 * (3 * BLOCK + 7),)])[0][::2],
    "gaps_beyond_a_chunk": lambda: make_params([(CHUNK + 70, 3)])[0][:, 1],
    "channels_last": lambda: make_params([(3, 5, 7, 6)])[0].to(memory_format=torch.channels_last),
    "one_element_dimensions": lambda: make_params([(1, 40, 1, 5)])[0].transpose(1, 3),
    "inner_one": lambda: make_params([(33, 8)])[0][:, 2:3],
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "alike": lambda grad: grad,
    "contiguous": lambda grad: grad.contiguous(),
    "reversed_dimensions": lambda grad: _in_order(grad, list(reversed(range(grad.ndim)))),
    "gaps": lambda grad: _with_gaps(grad),
    "expanded": lambda grad: grad.reshape(-1)[:1].reshape([1] * grad.ndim).expand(grad.shape),
}


def _in_order(tensor: Tensor, order: list[int]) -> Tensor:
    """Return the values with dimensions in memory from `order[0]`, outermost, on."""
    inverse = sorted(range(tensor.ndim), key=lambda d: order[d])
    return tensor.permute(order).contiguous().permute(inverse)


def _with_gaps(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize(
    ("dtype", "kind", "gradient"),
    [
        *((torch.float32, "cm", gradient) for gradient in GRADIENTS),
        *((torch.bfloat16, "cm", gradient) for gradient in ("alike", "reversed_dimensions")),
        *((torch.float32, "cg", gradient) for gradient in ("alike", "reversed_dimensions")),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, layout: str, dtype: torch.dtype, kind: Kind, gradient: str) -> None:
    """A parameter's memory layout and another one of its gradient, beside a plain parameter."""
    made = LAYOUTS[layout]()
    param = torch.empty_strided(made.shape, made.stride(), dtype=dtype)
    params = [param.copy_(made), *make_params([(7,)], dtype)]
    options = Options(kind, lr=LR, capacity=5, amsgrad=True, weight_decay=0.1)
    lockstep = Lockstep(params, maker(options), backend)
    for first, second in make_gradients(params, SHORT.events(5)):
        lockstep.step([None if first is None else GRADIENTS[gradient](first), second])


def test_layout_of_a_gradient_may_change(backend: str) -> None:
    """The gradient's strides are those of this step, whatever they were in the last."""
    params = [normal_like(torch.empty(9, 6, 4), 1.0, generator(0))]
    lockstep = Lockstep(params, maker(Options(lr=LR)), backend)
    for i, (grad,) in enumerate(make_gradients(params, [Event()] * 10)):
        assert grad is not None
        lockstep.step([list(GRADIENTS.values())[i % len(GRADIENTS)](grad)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_complex(backend: str, kind: Kind, dtype: torch.dtype) -> None:
    """Complex parameters, one of them transposed, beside a real one."""
    first, second = make_params([(BLOCK + 1,), (5, 9)], dtype)
    real = make_params([(11,)], torch.empty(0, dtype=dtype).real.dtype, seed=2)
    _run(backend, [first, second.t(), *real], maker(Options(kind, lr=LR, weight_decay=0.1)), EVENTS)


@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes(backend: str, kind: Kind, scope: Any) -> None:
    """All dtypes in one group, whose norm is over all of them."""
    dtypes = (*DTYPES, torch.complex64, torch.complex128)
    params = [make_params([(BLOCK + 3,)], dtype, seed)[0] for seed, dtype in enumerate(dtypes)]
    _run(backend, params, maker(Options(kind, lr=LR, priority_scope=scope)), EVENTS)


def _three_groups(params: list[Tensor], backend: str) -> CriticalAdam:
    options = Options("cm", capacity=CAPACITY, lr=LR)
    optimizer = make_optimizer(params[:2], options, backend)
    optimizer.add_param_group(
        {
            "params": params[2:3],
            "lr": 0.01,
            "betas": (0.5, 0.8),
            "capacity": 2,
            "priority_scope": "tensor",
            "amsgrad": True,
            "eps_inside_sqrt": False,
            "backend": backend,
        }
    )
    optimizer.add_param_group(
        {
            "params": params[3:],
            "weight_decay": 0.1,
            "maximize": True,
            "buffer_mean": "size",
            "priority_decay": 1.0,
            "backend": backend,
        }
    )
    return optimizer


def test_groups_with_options_of_their_own(backend: str) -> None:
    """Every option is the group's, and every group's norm its own."""
    _run(backend, make_params([(70,), (3, 3), (65,), (20,), (1,)]), _three_groups, EVENTS)
