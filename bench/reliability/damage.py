"""A damaged checkpoint is refused with an error that says why, and nothing is changed."""

import copy
import io
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.reliability.finding import (
    BUFFER_DTYPES,
    MOMENT_DTYPES,
    Finding,
    Kind,
    require,
    same,
)
from cm_fused import AdamCG, AdamCM

Damage = tuple[str, dict[str, Any]]
Stepped = tuple[list[Tensor], AdamCM | AdamCG]
SHAPES = ((3, 5), (7,))
# Without these a checkpoint is another backend's, one without amsgrad, or an earlier version's.
OPTIONAL_KEYS = (
    *("max_exp_avg_sq", "critical_sum", "compensation", "master_remainder"),
    "pending_slot",
)


def run(quick: bool) -> Finding:
    """Load every damage of the state dicts of all precisions."""
    cases = 0
    precisions = [(b, m) for b in BUFFER_DTYPES for m in MOMENT_DTYPES]
    for kind in (AdamCM, AdamCG):
        for buffer_dtype, moment_dtype in precisions[:: 4 if quick else 1]:
            options = {"buffer_dtype": buffer_dtype, "moment_dtype": moment_dtype, "amsgrad": True}
            _, source = _stepped(kind, SHAPES, steps=3, **options)
            saved = copy.deepcopy(source.state_dict())
            for name, damaged in _damages(saved, kind):
                _check_refused(kind, options, name, damaged)
                cases += 1
    return Finding(
        "damaged checkpoints", cases, "damages of a state dict", "a ValueError, nothing changed"
    )


def _stepped(
    kind: Kind, shapes: tuple[tuple[int, ...], ...], steps: int, **options: Any
) -> Stepped:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    optimizer = kind(params, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return params, optimizer


def _damages(saved: dict[str, Any], kind: Kind) -> Iterator[Damage]:
    for i, state in saved["state"].items():
        for key, value in state.items():
            for name, replacement in _replacements(value):
                if replacement is None and key in OPTIONAL_KEYS:
                    continue  # Made anew, as for a checkpoint of another backend.
                damaged = copy.deepcopy(saved)
                if replacement is None:
                    del damaged["state"][i][key]
                else:
                    damaged["state"][i][key] = replacement
                yield f"{key} of parameter {i}: {name}", damaged
    first = saved["param_groups"][0]
    groups = [
        ({**first, "params": params}, f"{len(params)} parameters") for params in ([0, 1, 2], [0])
    ]
    groups += [({**first, "capacity": capacity}, f"capacity {capacity}") for capacity in (1, 4, 6)]
    for group, name in groups:
        yield name, copy.deepcopy({**saved, "param_groups": [group]})
    yield "a group more", copy.deepcopy({**saved, "param_groups": [first, first]})
    for key, whole in (("state", None), ("param_groups", None), ("state", [])):
        yield f"{key} {whole}", copy.deepcopy({**saved, key: whole})
    state = saved["state"]
    negative = {**state[0], "step": torch.full_like(state[0]["step"], -1)}
    yield "step -1", copy.deepcopy({**saved, "state": {**state, 0: negative}})
    exchanged = {0: state[1], 1: state[0]}
    yield "the parameters' states exchanged", copy.deepcopy({**saved, "state": exchanged})
    _, other = _stepped(kind, ((5, 3), (2, 2)), steps=2, amsgrad=True)
    yield "another model's", copy.deepcopy(other.state_dict())


def _replacements(value: Tensor) -> Iterator[tuple[str, Any]]:
    yield "missing", None
    yield "a string", "damaged"
    yield "a dimension more", value.unsqueeze(0).repeat(2, *[1] * value.ndim)
    if value.ndim:
        yield "an element less", value.narrow(0, 0, value.shape[0] - 1)
        yield "a dimension less", value.flatten()[0].clone()
    yield "empty", value.new_empty(0)


def files(quick: bool) -> Finding:
    """Truncate checkpoint files and flip bits of them; resume as a training script does."""
    chance = random.Random(0)
    _, source = _stepped(AdamCM, SHAPES, steps=3, buffer_dtype=torch.int8)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    whole, cases, refused = buffer.getvalue(), 0, 0
    for _ in range(60 if quick else 2000):
        damaged = bytearray(whole)
        if chance.random() < 0.5:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        refused += _check_file(bytes(damaged))
        cases += 1
    return Finding(
        "damaged files",
        cases,
        "files cut short or with a bit flipped",
        f"an error and nothing changed ({refused}), or loaded and stepped on",
    )


def _check_file(content: bytes) -> bool:
    """Return whether a file's content was refused."""
    params, optimizer = _stepped(AdamCM, SHAPES, steps=2, buffer_dtype=torch.int8)
    twin = _stepped(AdamCM, SHAPES, steps=2, buffer_dtype=torch.int8)
    try:
        optimizer.load_state_dict(torch.load(io.BytesIO(content)))
    except Exception:  # Of many kinds: most are torch.load's.
        _require_alike("a damaged file", (params, optimizer), twin)
        return True
    optimizer.step()
    return False


def _check_refused(kind: Kind, options: dict[str, Any], name: str, damaged: dict[str, Any]) -> None:
    params, optimizer = _stepped(kind, SHAPES, steps=2, **options)
    try:
        optimizer.load_state_dict(damaged)
    except ValueError:
        pass
    else:
        raise AssertionError(f"{kind.__name__} with {options} loaded a state with {name}")
    _require_alike(name, (params, optimizer), _stepped(kind, SHAPES, steps=2, **options))


def _require_alike(name: str, found: Stepped, expected: Stepped) -> None:
    require(all(map(torch.equal, found[0], expected[0])), f"{name}: parameters were changed")
    states = [optimizer.state_dict()["state"] for _, optimizer in (found, expected)]
    require(same(*states), f"{name}: the state was changed")
