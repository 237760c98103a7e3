"""What may be wrong with each row of the state, and what the operators say to it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support.samples import LAST, Sample


def _without_pending_slot(case: Sample) -> dict[str, list[Tensor]]:
    return {key: tensors for key, tensors in case.state.items() if key != "pending_slot"}


# The operators that look at tensors, as calls of a sample.
OPS: dict[str, Callable[[Sample], object]] = {
    "step": Sample.step,
    "step_cg": lambda case: replace(case, state=_without_pending_slot(case)).step(),
    "sq_norms": Sample.sq_norms,
    "update_priorities": Sample.update_priorities,
    "flush": Sample.flush,
}
STEPS = ("step", "step_cg")
MINE = rf"\[{LAST}\] must "


def role_of(key: str) -> str:
    """Return the name of a row's list in messages."""
    return key if key.endswith("s") else f"{key}s"


@dataclass(frozen=True)
class Refused:
    """A tensor that operators must refuse.

    Attributes:
        name: Of the damage.
        key: Of the list whose last tensor is damaged.
        change: The damage: returns another tensor, or changes the one there.
        says: What the error says, after the tensor's role and index.
        ops: The operators that look at the list.
        is_number: Whether a number in the tensor's memory is wrong.
    """

    name: str
    key: str
    change: Callable[[Tensor], Tensor]
    says: str
    ops: tuple[str, ...]
    is_number: bool = False

    @property
    def message(self) -> str:
        """What the error says."""
        return role_of(self.key) + MINE + self.says

    def __str__(self) -> str:
        return f"{self.key}-{self.name}"

    def spoil(self, case: Sample) -> Tensor:
        """Damage a good sample; return the tensor."""
        tensors = case.lists()[self.key]
        tensors[LAST] = self.change(tensors[LAST])
        return tensors[LAST]


def _without_memory(left: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.untyped_storage().resize_(left)
        return tensor

    return change


def _with_gaps(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


def _twice(t: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1), t.reshape(-1)])


Damage = tuple[str, Callable[[Tensor], Tensor], str]
# The last parameter has 5 elements, its buffer 5 slots, its scales one block.
ANY: tuple[Damage, ...] = (
    ("dtype", lambda t: t.to(torch.int16), "(have dtype|be float32).*got Short"),
    ("no_memory", _without_memory(0), "have its memory"),
    ("less_memory", _without_memory(1), "have its memory"),
)
INT32: Damage = ("dtype", lambda t: t.to(torch.int32), "have dtype Short, got Int")
OF_STATE: tuple[Damage, ...] = (
    ("meta", lambda t: t.to("meta"), "be on cpu, got device"),
    ("sparse", lambda t: t.to_sparse(), "be a strided tensor, not a sparse one"),
)
SHAPED: tuple[Damage, ...] = (
    ("shape", _twice, r"have shape \(5\), got \(10\)"),
    ("dim", lambda t: t.unsqueeze(0), r"have shape \(5\), got \(1, 5\)"),
)
STRIDED: Damage = ("strides", _with_gaps, rf"have the strides \(1\) of exp_avgs\[{LAST}\], .*\(2\)")
DENSE: tuple[Damage, ...] = (
    ("strides", _with_gaps, "fill its memory without gaps"),
    ("overlap", lambda t: t[:1].expand(5), "fill its memory without gaps"),
)
SLOTS: tuple[Damage, ...] = (
    ("shape", lambda t: torch.cat([t, t], 1), r"have shape \(capacity, \*\(5\)\), got \(5, 10\)"),
    ("no_slots", lambda t: t[:0], r"have shape \(capacity, .*got \(0, 5\)"),
    ("dim", lambda t: t[0], r"have shape \(capacity, .*got \(5\)"),
    STRIDED,
    ("gaps", lambda t: torch.cat([t, t], 1)[:, :5], "hold its slots one after the other, 5 .*10"),
)
FLAT: tuple[Damage, ...] = (("numel", _twice, r"be contiguous with . elements, got shape"),)
KEYS: tuple[Damage, ...] = (*FLAT, ("gaps", _with_gaps, r"be contiguous with .* strides \(2\)"))
PARAM: tuple[Damage, ...] = (
    ("expanded", lambda t: t[:1].expand(5), "not hold two elements in one place"),
)


def _filled(*values: float) -> tuple[Damage, ...]:
    return tuple((str(value), lambda t, v=value: t.fill_(v), _says(value)) for value in values)


def _says(value: float) -> str:
    """Return what is said of a number: a slot's, else a step count's."""
    if isinstance(value, int):
        return rf"be in \[-1, 5\), got {value}"
    return "be below 2" if value == 2.0**62 else f"be finite and >= 0, got {value:g}"


FLUSHED = (*STEPS, "flush")
# For each list the operators that look at it, and what may be wrong.
_TABLE: dict[str, tuple[tuple[str, ...], tuple[Damage, ...]]] = {
    "params": (STEPS, (*ANY[1:], *PARAM)),
    "grads": ((*STEPS, "sq_norms"), (*ANY, *SHAPED)),
    "exp_avg": (FLUSHED, (*ANY, *OF_STATE, *DENSE)),
    "exp_avg_sq": (STEPS, (*ANY, *OF_STATE, *SHAPED, STRIDED)),
    "max_exp_avg_sq": (STEPS, (*ANY, *OF_STATE, *SHAPED, STRIDED)),
    "critical_buffer": (FLUSHED, (*ANY, *OF_STATE, *SLOTS)),
    "critical_sum": (FLUSHED, (*ANY, *OF_STATE, *SHAPED, STRIDED)),
    "compensation": (STEPS, (*ANY, *OF_STATE, *SHAPED, STRIDED)),
    "master_remainder": (STEPS, (INT32, *ANY[1:], *OF_STATE, *SHAPED, STRIDED)),
    "critical_scales": (FLUSHED, (*ANY, *OF_STATE, *FLAT)),
    "exp_avg_scales": (FLUSHED, (*ANY, *OF_STATE, *FLAT)),
    "exp_avg_sq_scales": (STEPS, (*ANY, *OF_STATE, *FLAT)),
    "priorities": ((*STEPS, "update_priorities"), (*ANY, *OF_STATE)),
    "pending_slot": (("step", "flush", "update_priorities"), (*ANY, *OF_STATE, *FLAT)),
    "step": ((*STEPS, "update_priorities"), (*ANY, *OF_STATE, *FLAT)),
}
REFUSED = [
    *(
        Refused(name, key, change, says, ops)
        for key, (ops, damages) in _TABLE.items()
        for name, change, says in damages
    ),
    Refused("shape", "exp_avg", *SHAPED[0][1:], STEPS),
    *(Refused(name, "priorities", change, says, STEPS) for name, change, says in KEYS),
    Refused("gaps", "priorities", *KEYS[1][1:], ("update_priorities",)),
    Refused("no_slot", "priorities", lambda t: t[:0], "have a slot, got", ("update_priorities",)),
    *(
        Refused(name, "pending_slot", change, says, ("step", "flush"), is_number=True)
        for name, change, says in _filled(-2, 5, 2**40, -(2**40))
    ),
    *(
        Refused(name, "step", change, says, STEPS, is_number=True)
        for name, change, says in _filled(float("nan"), float("inf"), -1.0, 2.0**62)
    ),
]
