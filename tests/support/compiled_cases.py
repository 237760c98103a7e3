"""The cases in which compiled kernels are compared with the C++ step."""

import itertools
from typing import Any

import torch

from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused.rounding import HALF_DTYPES, INT4
from tests.support.same_bits import Case, Class

_SLOTS = (None, *HALF_DTYPES, torch.float8_e4m3fn, torch.int8, INT4)
_MOMENTS = (None, torch.bfloat16, torch.int8)
_UPDATES = ("nearest", "stochastic", "kahan")
# None, a tail, a chunk that is full, and the two together, aligned but for their slots.
_LENGTHS = (0, 257, CHUNK_SIZE, CHUNK_SIZE + 3)


def _precision(slots: Any, moments: Any, update: str) -> dict[str, Any]:
    return {"buffer_dtype": slots, "moment_dtype": moments, "low_precision_update": update}


_LOW = _precision(torch.int8, torch.int8, "stochastic")
_OTHER = _precision(torch.float8_e4m3fn, torch.bfloat16, "kahan")
_SPLIT = {"low_precision_update": "split"}
# Options that are values of a launch: both sides of the branches on them are run.
_CHANGED: dict[str, Any] = {"weight_decay": 0.1, "buffer_mean": "size"}


def _case(cls: Class, options: dict[str, Any], dtype: Any = torch.float32, **more: Any) -> Case:
    return Case(cls, options, dtype, _LENGTHS, changed=_CHANGED, **more)


# Every basic block of the kernels that they compile is run.
QUICK_CASES = (
    _case(AdamCM, {}),
    _case(AdamCG, {"maximize": True, "amsgrad": True}),
    _case(AdamWCM, {"capacity": 2, "lr": torch.tensor(0.03)}),
    _case(AdamCG, {}, torch.float64),
    _case(AdamCG, {"max_grad_norm": 0.5}, torch.float64),
    *(_case(cls, {"capacity": 0}) for cls in (AdamCM, AdamCG)),
    *(_case(AdamCG, {}, grad_dtype=dtype) for dtype in HALF_DTYPES),
    _case(AdamCG, {}, amp=True),
    _case(AdamCM, _LOW, torch.bfloat16, shard=(5, 7, 9)),
    _case(AdamCG, _OTHER, torch.float16),
    _case(AdamCM, _precision(INT4, torch.bfloat16, "nearest")),
    _case(AdamCG, _SPLIT, torch.bfloat16),
    *(_case(AdamCM, {}, layout=layout) for layout in ("shifted", "transposed", "gaps")),
    _case(AdamCM, {"priority_scope": "tensor"}, torch.complex64),
)


# Of one kernel, the default pass: eps in and out of the root, both forms of weight decay, chunks
# that are full and not, or aligned but for their slots, and some whose sums are rebuilt at another
# step; a parameter that is not aligned.
_OUTSIDE: dict[str, Any] = {"weight_decay": 0.1, "eps_inside_sqrt": False, "eps": 1e-3}
MUTATED_CASES = (
    Case(
        AdamCM,
        _OUTSIDE,
        lengths=(130, 5 * CHUNK_SIZE, 2 * CHUNK_SIZE + 1),
        changed={"buffer_mean": "size"},
    ),
    Case(AdamWCM, {"weight_decay": 0.1, "eps": 1e-3}, lengths=(2 * CHUNK_SIZE + 1, CHUNK_SIZE)),
    Case(AdamCM, {}, lengths=(CHUNK_SIZE,), layout="shifted"),
)


def _slow_cases() -> list[Case]:
    """Return every class, dtype, capacity and way to store the state, and options in pairs."""
    classes: tuple[Class, ...] = (AdamCM, AdamCG)
    others: tuple[dict[str, Any], ...] = (
        {},
        {"max_grad_norm": 0.5},
        {"capacity": 0},
        {"capacity": 1},
        {"lr": torch.tensor(0.03)},
    )
    cases = [
        _case(cls, {**options, "amsgrad": amsgrad}, dtype, amp=amp)
        for cls, dtype, amsgrad, amp, options in itertools.product(
            classes,
            (torch.float32, torch.float64, *HALF_DTYPES),
            (False, True),
            (False, True),
            others,
        )
    ]
    for cls, dtype, slots, moments, update in itertools.product(
        classes, (torch.float32, *HALF_DTYPES), _SLOTS, _MOMENTS, _UPDATES
    ):
        if dtype in HALF_DTYPES or update == "nearest":
            cases.append(_case(cls, _precision(slots, moments, update), dtype))
    cases += [_case(AdamCM, _SPLIT, torch.bfloat16, amp=amp) for amp in (False, True)]
    for cls, capacity, slots in itertools.product(classes, (4, 5, 6, 7, 9, 10, 11), _SLOTS):
        options = {"capacity": capacity, "buffer_dtype": slots}
        cases.append(_case(cls, options))
    # More slots than a row of the priority kernel has in 16 lanes, and int4's first running sum.
    cases += [_case(cls, {"capacity": 26, "buffer_dtype": INT4}) for cls in classes]
    for cls, (dtype, layout) in itertools.product(
        (AdamWCM, AdamWCG), itertools.product(HALF_DTYPES, ((0, 4, 8), (2, 7, 7), (3, 2, 11)))
    ):
        cases.append(_case(cls, _LOW, dtype, shard=layout))
    return cases


SLOW_CASES = tuple(_slow_cases())
CASES = {case.name: case for case in (*QUICK_CASES, *SLOW_CASES)}
