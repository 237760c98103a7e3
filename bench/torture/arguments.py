"""Argument lists of the operators of the C++ library: valid ones, and damage to them."""

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cm_fused import rounding

SHAPES = ((), (0,), (1,), (5,), (3, 4), (2, 3, 2), (257,), (16385,))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (
    *DTYPES,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
STATE = (
    "exp_avgs",
    "exp_avg_sqs",
    "max_exp_avg_sqs",
    "critical_buffers",
    "critical_sums",
    "priorities",
    "pending_slots",
    "steps",
    "critical_scales",
    "exp_avg_scales",
    "exp_avg_sq_scales",
    "compensations",
)
ROLES = ("params", "grads", *STATE)
SCALARS = ("sq_norm", "lr_tensor", "grad_factor", "found_inf", "local_sq_norms")


@dataclass
class Arguments:
    """Everything that the operators take, of which each takes a part.

    Attributes:
        lists: The lists of tensors, by the schemas' names.
        param_indices: The list of numbers.
        element_places: The other one.
        scalars: The optional tensors.
        options: The hyperparameters.
        damages: What was done to them, in words.
        roles: The lists that the operator takes.
        has_result: Whether a call that succeeds must give what the reference gives: not where
            tensors share memory or numbers are no numbers.
    """

    lists: dict[str, list[Any]]
    param_indices: list[int]
    scalars: dict[str, Tensor | None]
    options: dict[str, Any]
    roles: tuple[str, ...]
    element_places: list[int] = field(default_factory=list)
    damages: list[str] = field(default_factory=list)
    has_result: bool = True

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        scalars = [s for s in self.scalars.values() if isinstance(s, Tensor)]
        return [*(t for tensors in self.lists.values() for t in tensors), *scalars]


def valid(chance: random.Random, roles: tuple[str, ...]) -> Arguments:
    """Return arguments that every operator takes, in the middle of training."""
    generator = torch.Generator().manual_seed(chance.getrandbits(31))
    dtype, capacity = chance.choice(DTYPES), chance.randint(1, 6)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    shapes = chance.choices(SHAPES[: -1 if chance.random() < 0.9 else None], k=chance.randint(1, 5))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(wide)

    exp_avgs = [noise(*shape) for shape in shapes]
    buffers = [noise(capacity, *shape) for shape in shapes]
    filled = chance.randint(0, capacity)
    for buffer in buffers:
        buffer[filled:] = 0
    keys = torch.cat(
        [noise(filled).abs().float() + 0.1, torch.full((capacity - filled,), -torch.inf)]
    )
    slot = chance.randint(-1, filled - 1)
    lists: dict[str, list[Any]] = {
        "params": [noise(*shape).to(dtype) for shape in shapes],
        "grads": [noise(*shape).to(dtype) for shape in shapes],
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": [noise(*shape).square() for shape in shapes],
        "max_exp_avg_sqs": [noise(*s).square() for s in shapes] if chance.random() < 0.5 else [],
        "critical_buffers": buffers,
        "critical_sums": [buffer.sum(0) for buffer in buffers] if chance.random() < 0.5 else [],
        "priorities": [keys.clone() for _ in shapes],
        "pending_slots": [torch.tensor(slot) for _ in shapes],
        "steps": [torch.tensor(float(chance.choice((0, 1, 7, 1000)))) for _ in shapes],
        **{role: [] for role in STATE[8:]},
    }
    if dtype is not torch.float64 and chance.random() < 0.3:
        _round_state(lists, chance)
    options = {
        "lr": 0.01,
        "beta1": chance.choice((0.0, 0.9)),
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": chance.choice((0.0, 0.1)),
        "priority_decay": chance.choice((0.0, 0.7, 1.0)),
        "group_scope": chance.random() < 0.5,
        "mean_over_capacity": chance.random() < 0.5,
        "eps_inside_sqrt": chance.random() < 0.5,
        "maximize": chance.random() < 0.3,
        "decoupled_weight_decay": chance.random() < 0.5,
        "stochastic_update": False,
        "l2_in_aggregate": False,
        "sum_of_norms": chance.random() < 0.3,
        "seed": chance.getrandbits(62),
    }
    scalars: dict[str, Tensor | None] = dict.fromkeys(SCALARS)
    for name in SCALARS[:4]:
        if chance.random() < 0.2:
            scalars[name] = torch.tensor(chance.choice((0.0, 0.5, 3.0)), dtype=torch.float64)
    if chance.random() < 0.1:
        scalars["local_sq_norms"] = torch.zeros(len(shapes), dtype=torch.float64)
    return Arguments(lists, list(range(len(shapes))), scalars, options, roles)


def _round_state(lists: dict[str, list[Any]], chance: random.Random) -> None:
    """Store slots and moments in 8 bits."""
    slots = chance.choice((torch.int8, torch.float8_e4m3fn))
    flat = [
        rounding.quantize(rounding.as_flat(b, leading=1), slots) for b in lists["critical_buffers"]
    ]
    lists["critical_scales"] = [scales for _, scales in flat]
    lists["critical_buffers"] = [
        stored.contiguous().view_as(buffer)
        for (stored, _), buffer in zip(flat, lists["critical_buffers"], strict=True)
    ]
    lists["critical_sums"] = []
    for name, signed in (("exp_avgs", True), ("exp_avg_sqs", False)):
        codes = [
            rounding.quantize_moment(rounding.as_flat(t), None, signed=signed) for t in lists[name]
        ]
        lists[name.removesuffix("s") + "_scales"] = [scales for _, scales in codes]
        lists[name] = [
            code.contiguous().view_as(moment)
            for (code, _), moment in zip(codes, lists[name], strict=True)
        ]


# Of one tensor: what takes its place, which has its values where the call can have a result.


def _with_gaps(t: Tensor, _: random.Random) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _at_an_offset(t: Tensor, _: random.Random) -> Tensor:
    return torch.cat([t.new_zeros(3), t.reshape(-1), t.new_zeros(2)])[3 : 3 + t.numel()].view(
        t.shape
    )


def _transposed(t: Tensor, _: random.Random) -> Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t.clone()


def _other_dtype(t: Tensor, chance: random.Random) -> Tensor:
    return t.to(chance.choice(OTHER_DTYPES))


def _other_shape(t: Tensor, chance: random.Random) -> Tensor:
    shapes: tuple[Callable[[], Tensor], ...] = (
        lambda: torch.cat([t.reshape(-1), t.reshape(-1)]),
        lambda: t.unsqueeze(0),
        lambda: t.unsqueeze(-1),
        lambda: t.reshape(-1)[:-1],
        lambda: t.new_zeros(0),
        lambda: t.new_zeros(()),
        lambda: t.new_zeros(2, 0, 3),
        lambda: t.new_zeros(2, *t.shape),
    )
    return chance.choice(shapes)()


def _on_meta(t: Tensor, _: random.Random) -> Tensor:
    return t.to("meta")


def _sparse(t: Tensor, _: random.Random) -> Tensor:
    return t.to_sparse()


def _quantized(t: Tensor, _: random.Random) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch will have no such tensors
        quantized: Tensor = torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)
    return quantized


def _implied(t: Tensor, chance: random.Random) -> Tensor:
    zeros: Tensor = torch._efficientzerotensor(t.shape, dtype=t.dtype)
    return zeros if chance.random() < 0.5 else torch._neg_view(t)


_REPLACEMENTS = (
    (_with_gaps, True),
    (_at_an_offset, True),
    (_transposed, True),
    (_other_dtype, True),
    (_other_shape, False),
    (_on_meta, True),
    (_sparse, False),
    (_quantized, False),
    (_implied, False),
)


# Of everything. Each says whether a success still has a result to compare.


def _replace_one(arguments: Arguments, chance: random.Random) -> bool:
    tensors, i = _any_tensor(arguments, chance)
    replace, has_result = chance.choice(_REPLACEMENTS)
    tensors[i] = replace(tensors[i], chance)
    return has_result


def _expand(arguments: Arguments, chance: random.Random) -> bool:
    tensors, i = _any_tensor(arguments, chance)
    t = tensors[i]
    if t.numel():
        strides = [chance.choice((0, 1)) for _ in t.shape]
        tensors[i] = t.as_strided(t.shape, strides)
    return tensors is arguments.lists["grads"]


def _alias(arguments: Arguments, chance: random.Random) -> bool:
    tensors, i = _any_tensor(arguments, chance)
    others, j = _any_tensor(arguments, chance)
    tensors[i] = others[j]
    return False


def _overlap(arguments: Arguments, chance: random.Random) -> bool:
    """Give two tensors parts of one memory."""
    tensors, i = _any_tensor(arguments, chance)
    others, j = _any_tensor(arguments, chance)
    t, other = tensors[i], others[j]
    memory = torch.zeros(t.numel() + other.numel() + 1, dtype=t.dtype)
    tensors[i] = memory[: t.numel()].view(t.shape)
    if other.dtype == t.dtype:
        others[j] = memory[1 : 1 + other.numel()].view(other.shape)
    return False


def _change_length(arguments: Arguments, chance: random.Random) -> bool:
    tensors = arguments.lists[chance.choice(arguments.roles)]
    changes: tuple[Callable[[], object], ...] = (
        lambda: tensors.pop() if tensors else None,
        lambda: tensors.append(torch.zeros(5)),
        tensors.clear,
        lambda: tensors.extend(list(tensors)),
    )
    chance.choice(changes)()
    return False


def _clear_all(arguments: Arguments, _: random.Random) -> bool:
    for tensors in arguments.lists.values():
        tensors.clear()
    arguments.param_indices.clear()
    return False


def _change_values(arguments: Arguments, chance: random.Random) -> bool:
    tensors, i = _any_tensor(arguments, chance)
    values = (-1.0, -2.0, 2.5, 1e30, 3e38, torch.nan, torch.inf, -torch.inf, 2.0**62)
    t = tensors[i]
    if t.is_floating_point() and t.itemsize > 1:
        t.fill_(chance.choice(values))
    elif t.dtype == torch.int64:
        t.fill_(chance.choice((-2, -1, 0, 3, 100, 2**40, -(2**40), 2**62, -(2**63))))
    return False


def _resize_storage(arguments: Arguments, chance: random.Random) -> bool:
    """Take a tensor's memory from under it."""
    tensors, i = _any_tensor(arguments, chance)
    storage = tensors[i].untyped_storage()
    storage.resize_(chance.choice((0, storage.nbytes() // 2, max(storage.nbytes() - 1, 0))))
    return False


def _change_in_place(arguments: Arguments, chance: random.Random) -> bool:
    """Change a tensor's metadata, whose memory stays where it is."""
    tensors, i = _any_tensor(arguments, chance)
    t = tensors[i]
    if t._is_zerotensor():
        return False  # torch itself crashes where one without memory is resized
    numel = t.numel()
    changes: tuple[Callable[[], object], ...] = (
        lambda: t.resize_(numel // 2),
        lambda: t.resize_(2 * numel + 1),
        lambda: t.resize_(0),
        lambda: t.unsqueeze_(0),
        lambda: t.set_(torch.zeros(3, dtype=t.dtype)),
        lambda: t.t_() if t.ndim == 2 else None,
    )
    chance.choice(changes)()
    return False


def _change_scalar(arguments: Arguments, chance: random.Random) -> bool:
    values: tuple[Any, ...] = (
        torch.tensor(1.0),
        torch.ones(2, dtype=torch.float64),
        torch.ones(len(arguments.lists["params"]), dtype=torch.float64),
        torch.ones(0, dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor(torch.nan, dtype=torch.float64),
        torch.tensor(-1.0, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64, device="meta"),
        torch.ones(6, dtype=torch.float64)[::2],
        torch.tensor(1.0, dtype=torch.float64).to_sparse(),
        "1.0",
    )
    arguments.scalars[chance.choice(SCALARS)] = chance.choice(values)
    return False


def _change_option(arguments: Arguments, chance: random.Random) -> bool:
    name = chance.choice([*arguments.options])
    values: tuple[Any, ...] = (torch.nan, torch.inf, -torch.inf, -1.0, 1.0, 1e308, 0.0, "1", None)
    if name == "seed":
        values = (-1, 2**63 - 1, -(2**63), 2**64, "1", None)
    arguments.options[name] = chance.choice(values)
    return False


def _change_param_indices(arguments: Arguments, chance: random.Random) -> bool:
    values: tuple[list[int], ...] = (
        [],
        [0],
        [-1, -1],
        list(range(100)),
        [2**62] * len(arguments.lists["params"]),
        [2**64],
    )
    arguments.param_indices = chance.choice(values)
    return False


def _change_element_places(arguments: Arguments, chance: random.Random) -> bool:
    count = len(arguments.lists["params"])
    values: tuple[list[int], ...] = (
        [0],
        [0, 1, 1] * (count + 1),
        [0, 0, 0] * count,
        [-1, -1, -1] * count,
        [2**62, 2**62, 2**62] * count,
        [3, 2, 5] * count,
    )
    arguments.element_places = chance.choice(values)
    return False


def _any_tensor(arguments: Arguments, chance: random.Random) -> tuple[list[Any], int]:
    roles = [role for role in arguments.roles if arguments.lists[role]]
    if not roles:
        return [torch.zeros(1)], 0
    tensors = arguments.lists[chance.choice(roles)]
    return tensors, chance.randrange(len(tensors))


DAMAGES = (
    *[_replace_one] * 6,
    _expand,
    _alias,
    _overlap,
    _change_length,
    _clear_all,
    _change_values,
    _resize_storage,
    _change_in_place,
    _change_scalar,
    _change_option,
    _change_param_indices,
    _change_element_places,
)


def damage(arguments: Arguments, chance: random.Random) -> None:
    """Damage arguments at one place or several; where that cannot be done, not."""
    changes = chance.choices(DAMAGES, k=chance.choice((0, 1, 1, 1, 1, 1, 2, 3)))
    # What has no memory, torch crashes on as the others would touch it.
    for change in sorted(changes, key=lambda change: change is _resize_storage):
        try:
            has_result = change(arguments, chance)
        except (RuntimeError, NotImplementedError, TypeError, IndexError):
            has_result = False  # an earlier damage, or a dtype, is in this one's way
        arguments.has_result &= has_result
        arguments.damages.append(change.__name__.strip("_"))
