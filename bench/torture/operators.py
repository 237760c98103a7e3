"""Operators of the C++ library called with damaged arguments: an error or the right result.

The calls are made in child processes, so that a crash is reported with the case that it was.
"""

import copy
import multiprocessing
import random
from collections.abc import Callable, Iterable
from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor

from bench.torture.arguments import ROLES, SCALARS, STATE, Arguments, damage, valid
from bench.torture.finding import Finding, require
from cm_fused import reference
from cm_fused._backends import cpu
from cm_fused._backends.triton import columns as table
from cm_fused._bucket import Bucket, StepOptions

ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
CASES_OF_A_CHILD = 1_000
_ROLES = {
    "sq_norms": ("params", "grads"),
    "keep_books_": ("priorities", "pending_slots", "steps"),
    "update_priorities_": ("priorities", "pending_slots", "steps"),
    "commit_": (
        *("exp_avgs", "critical_buffers", "critical_sums", "pending_slots"),
        *("critical_scales", "exp_avg_scales"),
    ),
}
STEP_LISTS = ("params", "grads", *STATE[:6], "pending_slots", "steps", *STATE[8:])
OPS = torch.ops.cm_fused


def run(quick: bool) -> Finding:
    """Call every operator with arguments damaged at random."""
    cases = 1_000 if quick else 10_000
    # A child of its own start: libgomp's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    current = context.Value(c_int64, 0)
    outcomes = context.Array(c_int64, 3)
    for first in range(0, cases, CASES_OF_A_CHILD):
        last = min(first + CASES_OF_A_CHILD, cases)
        child = context.Process(target=_run_cases, args=(first, last, current, outcomes))
        child.start()
        child.join()
        if child.exitcode != 0:
            raise AssertionError(f"exit status {child.exitcode}: run_case({current.value})")
    refused, compared, others = outcomes[:]
    return Finding(
        "operators' arguments",
        cases,
        "calls of operators, damaged at random",
        f"{refused:,} errors with no bit changed, {compared:,} results equal to the reference's, "
        f"{others:,} without one to compare, of shared memory or wild numbers; no crash",
    )


def _describe(seed: int, name: str, arguments: Arguments) -> str:
    damages = ", ".join(arguments.damages) or "nothing"
    return f"run_case({seed}), {name} after {damages}"


def _run_cases(first: int, last: int, current: Any, outcomes: Any) -> None:
    torch.set_num_threads(2)
    for seed in range(first, last):
        current.value = seed
        outcomes[run_case(seed)] += 1


def run_case(seed: int) -> int:
    """Make one call; return 0 where it was refused, 1 where compared, 2 where neither.

    Raises:
        AssertionError: An error changed something, or a result is not the reference's.
    """
    chance = random.Random(seed)
    name, call = _choose(chance)
    arguments = valid(chance, _ROLES.get(name, ROLES))
    held = OPS.hold_state(*_state(arguments, name)) if chance.random() < 0.5 else None
    held_lists = {role: list(arguments.lists[role]) for role in STATE}
    if held is not None and chance.random() < 0.5:
        # It looks at everything, and changes nothing.
        skipped = copy.deepcopy(arguments)
        skipped.scalars["found_inf"] = torch.tensor(1.0, dtype=torch.float64)
        skipped.scalars["local_sq_norms"] = None
        _step_held(held, skipped)
    damage(arguments, chance)
    if name.startswith("step_held") or name == "refresh_table_":
        if held is None:
            held = OPS.hold_state(*_state(arguments, name)) if _holds(arguments, name) else -1
        else:
            # What is held is what was handed over, but for what happened to it in place.
            arguments.lists.update(held_lists)
    twin = copy.deepcopy(arguments) if arguments.has_result else None
    before = _Memory(arguments.tensors())
    case = _describe(seed, name, arguments)
    try:
        result = call(held, arguments)
    except ERRORS as error:
        require(before.is_unchanged(), f"{case}: changed something, then: {error}")
        return 0
    finally:
        if held is not None:
            OPS.release_state(held)
    require(before.is_unchanged_around(), f"{case}: changed memory of no tensor")
    if twin is None or name == "refresh_table_":
        return 2
    expected = EXPECTED[name](twin)
    _compare(arguments, twin, result, expected, case)
    return 1


def _choose(chance: random.Random) -> tuple[str, Any]:
    name = chance.choice([*CALLS])
    return name, CALLS[name]


def _holds(arguments: Arguments, name: str) -> bool:
    """Whether torch takes the state at all."""
    try:
        OPS.release_state(OPS.hold_state(*_state(arguments, name)))
    except ERRORS:
        return False
    return True


def _state(arguments: Arguments, name: str = "") -> tuple[Any, ...]:
    lists = {role: arguments.lists[role] for role in STATE}
    if name == "step_held_cg":
        lists["pending_slots"] = []
    return (*lists.values(), arguments.param_indices, arguments.element_places)


def _scalars(arguments: Arguments, *names: str) -> list[Any]:
    return [arguments.scalars[name] for name in names]


_OF_STEPS = ("sq_norm", "lr_tensor", "grad_factor", "found_inf")


def _adam_cm(_: int | None, a: Arguments) -> None:
    lists = (a.lists[role] for role in STEP_LISTS)
    scalars = _scalars(a, *_OF_STEPS, "local_sq_norms")
    OPS.adam_cm_(*lists, a.param_indices, a.element_places, *scalars, **a.options)


def _adam_cg(_: int | None, a: Arguments) -> None:
    lists = (a.lists[role] for role in STEP_LISTS if role != "pending_slots")
    scalars = _scalars(a, *_OF_STEPS)
    OPS.adam_cg_(*lists, a.param_indices, a.element_places, *scalars, **a.options)


def _step_held(held: int | None, a: Arguments, *besides: tuple[int | None, Arguments]) -> None:
    """Step a held state, and those of other arguments in the same call."""
    all_held = [held, *(other for other, _ in besides)]
    arguments = [a, *(other for _, other in besides)]
    OPS.step_held_(
        all_held,
        [t for each in arguments for t in each.lists["params"]],
        [t for each in arguments for t in each.lists["grads"]],
        *(
            [each.scalars[name] for each in arguments if each.scalars[name] is not None]
            for name in _OF_STEPS
        ),
        a.scalars["local_sq_norms"],
        hyperparameters=[n for each in arguments for n in cpu.held_numbers(each.options)],
        seeds=[each.options["seed"] for each in arguments],
    )


def _step_held_beside(held: int | None, a: Arguments) -> None:
    """Step a held state after a sound one, which is as it was where the call is refused."""
    chance = random.Random(len(a.damages))
    other = valid(chance, ROLES)
    for name in SCALARS:
        given = name != "local_sq_norms" and a.scalars[name] is not None
        other.scalars[name] = torch.tensor(0.5, dtype=torch.float64) if given else None
    if a.scalars["local_sq_norms"] is not None:
        _step_held(held, a)
        return
    twin, before = copy.deepcopy(other), _Memory(other.tensors())
    other_held = OPS.hold_state(*_state(other))
    try:
        _step_held(other_held, other, (held, a))
    except ERRORS:
        require(before.is_unchanged(), "a refused call stepped the sound state before it")
        raise
    finally:
        OPS.release_state(other_held)
    _expected_cm(twin)
    _compare(other, twin, None, None, "the sound state beside another")


def _sq_norms(_: int | None, a: Arguments) -> Tensor:
    names = ("weight_decay", "maximize", "decoupled_weight_decay")
    options = {name: a.options[name] for name in names}
    result: Tensor = OPS.sq_norms(
        a.lists["params"], a.lists["grads"], a.scalars["grad_factor"], **options
    )
    return result


def _keep_books(_: int | None, a: Arguments) -> None:
    OPS.keep_books_(
        *(a.lists[role] for role in ("priorities", "pending_slots", "steps")),
        _given_sq_norm(a),
        a.scalars["found_inf"],
        priority_decay=a.options["priority_decay"],
    )


def _given_sq_norm(a: Arguments) -> Any:
    sq_norm = a.scalars["sq_norm"]
    return torch.tensor(4.0, dtype=torch.float64) if sq_norm is None else sq_norm


def _commit(_: int | None, a: Arguments) -> None:
    OPS.commit_(*(a.lists[role] for role in _ROLES["commit_"]))


def _refresh_table(held: int | None, a: Arguments) -> None:
    rows = torch.zeros(len(a.lists["params"]), table.WIDTH, dtype=torch.int64)
    code = OPS.refresh_table_(held, a.lists["params"], a.lists["grads"], rows)
    require(code in (0, 1, 2), f"refresh_table_ gave {code}")
    if code == 1:
        addresses = [t.data_ptr() for t in a.lists["params"]]
        require(rows[:, table.Column.PARAM].tolist() == addresses, "a table has other addresses")
    else:
        require(not rows.any(), "a table was written that was not to be")


def _update_priorities(_: int | None, a: Arguments) -> None:
    """Damage the table too: its addresses are right or 0, all else is not trusted."""
    priorities, slots, steps = (a.lists[role] for role in ("priorities", "pending_slots", "steps"))
    rows = torch.zeros(len(priorities), table.WIDTH, dtype=torch.int64)
    _require_books(priorities, slots, steps)
    for i, row in enumerate(rows):
        row[table.Column.PRIORITIES] = priorities[i].data_ptr()
        row[table.Column.SLOT] = slots[i].data_ptr()
        row[table.Column.STEP] = steps[i].data_ptr()
        row[table.Column.FIRST_CHUNK], row[table.Column.NUM_CHUNKS] = i, 1
    chance = random.Random(a.options["seed"] if isinstance(a.options["seed"], int) else 0)
    norms = torch.ones(len(priorities), dtype=torch.float64)
    capacity = priorities[0].numel()
    kind = chance.randrange(12)
    if kind == 0:
        rows = rows.float()
    elif kind == 1:
        rows = rows[:, :-1]
    elif kind == 2:
        rows[-1, chance.randrange(table.WIDTH)] = 0
    elif kind == 3:
        rows[-1, chance.choice((17, 18))] = chance.choice((-1, 5, 2**62, -(2**62)))
    elif kind == 4:
        norms = chance.choice((norms.float(), norms[:0], norms[:, None], norms.to("meta")))
    elif kind == 5:
        capacity = chance.choice((0, -1, -(2**62)))
    elif kind == 6:
        rows = rows.t().contiguous().t()
    elif kind == 7:
        rows.untyped_storage().resize_(8)
    OPS.update_priorities_(
        rows,
        norms,
        *_scalars(a, "sq_norm", "found_inf"),
        capacity=capacity,
        priority_decay=a.options["priority_decay"],
        group_scope=a.options["group_scope"],
    )


def _require_books(*lists: list[Any]) -> None:
    """Check what the makers of tables check: the kernel is given addresses."""
    dtypes = (torch.float32, torch.int64, torch.float32)
    if not lists[0] or len({len(tensors) for tensors in lists}) != 1:
        raise ValueError("no row, or no whole one")
    capacity = lists[0][0].numel()
    for tensors, dtype, numel in zip(lists, dtypes, (capacity, 1, 1), strict=True):
        for t in tensors:
            whole = t.layout == torch.strided and t.dtype == dtype and t.numel() == numel
            there = t.device.type == "cpu" and not t.is_quantized
            if not (whole and there and t.is_contiguous() and numel):
                raise ValueError("no such row")
            if t.untyped_storage().nbytes() < (t.storage_offset() + numel) * t.itemsize:
                raise ValueError("no memory")


CALLS: dict[str, Any] = {
    "adam_cm_": _adam_cm,
    "adam_cg_": _adam_cg,
    "step_held_cm": _step_held,
    "step_held_cg": _step_held,
    "step_held_beside": _step_held_beside,
    "sq_norms": _sq_norms,
    "keep_books_": _keep_books,
    "commit_": _commit,
    "refresh_table_": _refresh_table,
    "update_priorities_": _update_priorities,
}


# What the reference makes of the same arguments.


def _bucket(a: Arguments) -> Bucket:
    lists = dict(a.lists)
    if lists["critical_sums"]:
        lists["critical_sums"] = []
    return Bucket(**lists, param_indices=a.param_indices, element_places=a.element_places)


def _options(a: Arguments) -> StepOptions:
    options = dict(a.options)
    lr = a.scalars["lr_tensor"]
    return StepOptions(
        lr=options["lr"] if lr is None else lr.reshape(()),
        priority_scope="group" if options["group_scope"] else "tensor",
        buffer_mean="capacity" if options["mean_over_capacity"] else "size",
        low_precision_update="nearest",
        grad_factor=_flat(a.scalars["grad_factor"]),
        found_inf=_flat(a.scalars["found_inf"]),
        **{
            name: options[name]
            for name in (
                "beta1",
                "beta2",
                "eps",
                "weight_decay",
                "priority_decay",
                "eps_inside_sqrt",
                "maximize",
                "decoupled_weight_decay",
                "sum_of_norms",
                "seed",
            )
        },
    )


def _flat(scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.reshape(())


def _commit_all(a: Arguments) -> None:
    for i, slot in enumerate(a.lists["pending_slots"]):
        reference.commit_(
            a.lists["exp_avgs"][i],
            a.lists["critical_buffers"][i],
            None,
            slot,
            *(
                a.lists[name][i] if a.lists[name] else None
                for name in ("critical_scales", "exp_avg_scales")
            ),
        )


def _expected_cm(a: Arguments) -> None:
    _commit_all(a)
    if not a.lists["params"]:
        return
    local = a.scalars["local_sq_norms"]
    if local is None:
        reference.adam_cm_(_bucket(a), _options(a), a.scalars["sq_norm"])
        return
    sq_norms = reference.update_cm_(_bucket(a), _options(a))
    found_inf = a.scalars["found_inf"]
    if found_inf is None or found_inf.item() == 0:
        local.reshape(-1).copy_(sq_norms)
        # The pass has made what was pending, and left the number to keep_books_.
        a.lists["pending_slots"] = []


def _expected_cg(a: Arguments) -> None:
    a.lists["pending_slots"] = []
    if a.lists["params"]:
        reference.adam_cg_(_bucket(a), _options(a), a.scalars["sq_norm"])


def _expected_sq_norms(a: Arguments) -> Tensor:
    _commit_all(a)
    return reference.sq_norms(_bucket(a), _options(a))


def _expected_books(a: Arguments) -> None:
    found_inf = a.scalars["found_inf"]
    if found_inf is not None and found_inf.item() != 0:
        _commit_all(a)
        return
    # The pass before has made what was pending: the slots say no more.
    reference.keep_books_(_bucket(a), _options(a), _given_sq_norm(a))


def _expected_update(a: Arguments) -> None:
    if a.scalars["sq_norm"] is None:
        of_each_row = float(len(a.lists["priorities"])) if a.options["group_scope"] else 1.0
        a.scalars["sq_norm"] = torch.tensor(of_each_row, dtype=torch.float64)
    _expected_books(a)


EXPECTED: dict[str, Callable[[Arguments], object]] = {
    "adam_cm_": _expected_cm,
    "adam_cg_": _expected_cg,
    "step_held_cm": _expected_cm,
    "step_held_cg": _expected_cg,
    "step_held_beside": _expected_cm,
    "sq_norms": _expected_sq_norms,
    "keep_books_": _expected_books,
    "update_priorities_": _expected_update,
    "commit_": _commit_all,
}


def _compare(a: Arguments, twin: Arguments, result: Any, expected: Any, what: str) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-12, msg=what)
    if twin.lists["pending_slots"]:
        _commit_all(a)
    for role, tensors in twin.lists.items():
        if role in ("critical_sums", "pending_slots"):
            continue
        for mine, theirs in zip(a.lists[role], tensors, strict=True):
            # A momentum's code apart is 3 % of it: four codes of a slot's.
            codes = 5 if role == "critical_buffers" else 1
            _compare_values(mine, theirs, codes, f"{what}: {role}")


def _compare_values(mine: Tensor, theirs: Tensor, most_codes: int, what: str) -> None:
    if mine.itemsize == 1:
        codes = [t.view(torch.int8).to(torch.int16) for t in (mine, theirs)]
        if mine.dtype == torch.float8_e4m3fn:
            for each in codes:
                each[each == -128] = 0  # minus zero
        away = (codes[0] - codes[1]).abs().remainder(255)
        require(not away.numel() or away.max().item() <= most_codes, what)
        return
    rtol = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(mine.dtype, 1e-4)
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * 1e-2, equal_nan=True, msg=what)


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
    if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized:
        return False
    return not torch._is_zerotensor(t) and t.untyped_storage().nbytes() > 0


def _bytes(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _set_to_zero(t: Tensor, storage: Tensor) -> None:
    view = torch.empty(0, dtype=t.dtype).set_(storage.untyped_storage())
    if t.numel() and _end(t) <= view.numel():
        view.as_strided(t.shape, t.stride(), t.storage_offset()).zero_()


def _end(t: Tensor) -> int:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset() + last + 1)
