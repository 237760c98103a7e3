"""Operators of the C++ library called with arguments damaged at random.

A call is refused, and then changes nothing, or gives the result of the arguments before the damage.
"""

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tests.support.rows import OPS
from tests.support.samples import SAMPLES, Sample, float64, step_

ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
DTYPES = (torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int8, torch.int64)
NUMBERS = (torch.nan, torch.inf, -torch.inf, -1.0, 2.5, 3e38, 2.0**62)
INTEGERS = (-2, -1, 0, 3, 100, 2**40, -(2**40), 2**62, -(2**63))

# What takes a tensor's place, with its values and then without them.
REPLACEMENTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: torch.stack([t, t], -1)[..., 0],
    lambda t: torch.cat([t.new_zeros(3), t.reshape(-1), t.new_zeros(2)])[3:-2].view(t.shape),
    lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.clone(),
)
OTHERS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES),
    lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
    lambda t: t.unsqueeze(0),
    lambda t: t.reshape(-1)[:-1],
    lambda t: t.new_zeros(0),
    lambda t: t.new_zeros(2, 0, 3),
    lambda t: t.as_strided(t.shape, [0] * t.ndim) if t.numel() else t,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    torch._neg_view,
    lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
)
IN_PLACE: tuple[Callable[[Tensor], object], ...] = (
    lambda t: t.resize_(t.numel() // 2),
    lambda t: t.resize_(2 * t.numel() + 1),
    lambda t: t.unsqueeze_(0),
    lambda t: t.set_(torch.zeros(3, dtype=t.dtype).untyped_storage()),
    *(lambda t, n=n: t.fill_(n) for n in (*NUMBERS, *INTEGERS)),
)


def run_case(seed: int) -> str:
    """Make one call; return whether it was refused, compared, or neither.

    Raises:
        AssertionError: An error changed something, or a result is another one.
    """
    chance = random.Random(seed)
    op = chance.choice([*OPS])
    case = SAMPLES[chance.choice([*SAMPLES])]()
    if op == "step_cg":
        case.without("pending_slot")
        op = "step"
    state = case.register()
    cached = op == "step" and chance.random() < 0.5
    if cached:
        # It looks at everything, and changes nothing.
        case.scalars["found_inf"] = float64(1.0)
        step_([state], [case])
        del case.scalars["found_inf"]
    twin = copy.deepcopy(case)
    call = (lambda case: step_([state], [case])) if cached else OPS[op]
    has_result = all([_damage(case, chance, cached) for _ in range(chance.choice((0, 1, 1, 1, 2)))])
    if chance.random() < 0.1:  # the last: what has no memory, torch crashes on
        has_result &= _take_memory(chance.choice([*case.lists().values()]), chance)
    before = _Memory(t for tensors in case.lists().values() for t in tensors)
    try:
        result = call(case)
    except ERRORS as error:
        unchanged, outcome = before.is_unchanged(), f"refused: {error}"
    else:
        unchanged, outcome = before.is_unchanged_around(), "compared" if has_result else "other"
    assert unchanged, f"run_case({seed}): changed what it must not, {outcome}"
    if outcome == "compared":
        _compare((result, case.lists()), (OPS[op](twin), twin.lists()), f"run_case({seed})")
    return outcome.partition(":")[0]


def _damage(case: Sample, chance: random.Random, cached: bool) -> bool:
    """Damage one thing; return whether a call still has the result from before."""
    # A registered state is what was handed over, except for what happens to it in place.
    lists = {"params": case.params, "grads": case.grads} if cached else case.lists()
    tensors = chance.choice([*(case.lists() if chance.random() < 0.3 else lists).values()])
    if not tensors or any(map(torch._is_zerotensor, tensors)):
        return False  # torch itself crashes where a zero tensor is resized
    i = chance.randrange(len(tensors))
    kind = chance.randrange(8)
    try:
        if kind == 0 or not any(tensors is of_call for of_call in lists.values()):
            chance.choice(IN_PLACE)(tensors[i])
        elif kind == 1:
            tensors[i] = chance.choice(OTHERS)(tensors[i])
        elif kind == 2:
            others = chance.choice([*lists.values()])
            tensors[i] = others[chance.randrange(len(others))]
        elif kind == 3:
            chance.choice((tensors.pop, tensors.clear, lambda: tensors.extend([*tensors])))()
        elif kind == 4:
            name = chance.choice(("sq_norm", "lr", "grad_factor", "found_inf"))
            case.scalars[name] = float64(chance.choice((*NUMBERS, [1.0, 2.0], [])))
        elif kind == 5:
            name = chance.choice([*case.hyperparameters])
            numbers = (-1, 2**63 - 1, 2**64, "1") if name == "seed" else (*NUMBERS, "1")
            case.hyperparameters[name] = chance.choice(numbers)
        else:
            tensors[i] = chance.choice(REPLACEMENTS)(tensors[i])
            return True
    except (*ERRORS, NotImplementedError):
        pass  # an earlier damage, or a dtype, is in this one's way
    return False


def _take_memory(tensors: list[Tensor], chance: random.Random) -> bool:
    """Take a tensor's memory from under it; return whether a call still has a result."""
    for tensor in filter(_has_memory, tensors[-1:]):
        storage = tensor.untyped_storage()
        storage.resize_(chance.choice((0, storage.nbytes() // 2, max(storage.nbytes() - 1, 0))))
        return False
    return True


def _compare(got: Any, expected: Any, what: str) -> None:
    """Check that two results agree to rounding, and codes to one."""
    if isinstance(expected, Tensor):
        if expected.itemsize == 1:
            got, expected = (t.float() for t in (got, expected))
        rtol = 2e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-4
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol / 100, msg=what)
    elif isinstance(expected, dict):
        for key in expected:
            _compare(got[key], expected[key], f"{what}: {key}")
    elif expected is not None:
        for mine, theirs in zip(got, expected, strict=True):
            _compare(mine, theirs, what)


class _Memory:
    """The memory of tensors as it was, with what lies around them."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [t for t in tensors if _has_memory(t)]
        self.before = [_bytes(t).clone() for t in self.tensors]

    def is_unchanged(self) -> bool:
        return all(map(torch.equal, map(_bytes, self.tensors), self.before))

    def is_unchanged_around(self) -> bool:
        """Whether only elements of tensors changed."""
        now = [_bytes(t).clone() for t in self.tensors]
        for t in self.tensors:
            for other, *memory in zip(self.tensors, now, self.before, strict=True):
                if other.untyped_storage().data_ptr() == t.untyped_storage().data_ptr():
                    for storage in memory:
                        _set_to_zero(t, storage)
        return all(map(torch.equal, now, self.before))


def _has_memory(t: Tensor) -> bool:
    if t.layout != torch.strided or t.device.type != "cpu" or torch._is_zerotensor(t):
        return False
    return t.untyped_storage().nbytes() > 0


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _set_to_zero(t: Tensor, storage: Tensor) -> None:
    view = torch.empty(0, dtype=t.dtype).set_(storage.untyped_storage())
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    if t.numel() and t.storage_offset() + last < view.numel():
        view.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()
