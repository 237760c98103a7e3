"""Many tensors, many groups, many slots, and a tensor whose places do not fit 32 bits."""

import math

import torch
from torch import Tensor

from bench.reliability.finding import Finding, Kind, require
from cm_fused import AdamCG, AdamCM

STEPS = 3
# Of the large tensor: parameter, both moments and one slot, its gradient being one number.
LARGE_NUMEL = 2**31 + 3
LARGE_BYTES = LARGE_NUMEL * (2 + 2 + 2 + 1)


def many(quick: bool) -> Finding:
    """Step many tensors in many groups with many slots, beside the reference in float64."""
    tensors = 600 if quick else 21_000
    cases = 0
    for kind, groups, capacity in ((AdamCM, 1, 5), (AdamCM, 100, 64), (AdamCG, 100, 5)):
        made = [_made(kind, tensors, groups, capacity, backend) for backend in (None, "eager")]
        for t in range(STEPS):
            for params, optimizer in made:
                _give_gradients(params, t)
                optimizer.step()
        for param, expected in zip(made[0][0], made[1][0], strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-9, atol=1e-12)
        cases += tensors
    return Finding(
        "many tensors",
        cases,
        f"tensors, {tensors:,} at once, in 1 or 100 groups, of 5 or 64 slots",
        "the reference's parameters",
    )


def _made(
    kind: Kind, tensors: int, groups: int, capacity: int, backend: str | None
) -> tuple[list[Tensor], AdamCM | AdamCG]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(1 + i % 3, generator=generator, dtype=torch.float64).requires_grad_()
        for i in range(tensors)
    ]
    members = [{"params": params[i::groups]} for i in range(groups)]
    return params, kind(members, lr=1e-2, capacity=capacity, backend=backend)


def _give_gradients(params: list[Tensor], t: int) -> None:
    generator = torch.Generator().manual_seed(1 + t)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def large(quick: bool) -> Finding:
    """Step one tensor of bfloat16 with int8 slots, of more elements than 31 bits count.

    Where the memory is not there the quick size is stepped, and the result says so.
    """
    enough = _available_bytes() > 1.15 * LARGE_BYTES
    numel = LARGE_NUMEL if enough and not quick else 2**16 + 3
    param = torch.ones(numel, dtype=torch.bfloat16).requires_grad_()
    optimizer = AdamCM(
        [param], lr=0.1, capacity=1, buffer_dtype=torch.int8, moment_dtype=torch.bfloat16
    )
    # One number, seen everywhere: a gradient of its own would not fit the memory.
    param.grad = torch.tensor(0.5, dtype=torch.bfloat16).expand(numel)
    for _ in range(2):
        optimizer.step()
    # Not by state_dict(), whose commit goes through the reference, in float32, where state is
    # rounded: the first step's slot has been committed by the second.
    state = optimizer.state[param]
    # Every element has the same history except for the rounding of the moments: one that was left
    # out would differ by more.
    norm, key = 0.5 * math.sqrt(numel), float(state["priorities"].max())
    require(
        math.isclose(key, 0.7 * norm, rel_tol=1e-6),
        f"the key is {key}, the norm {norm}",
    )
    for name, tensor in (("parameter", param.detach()), ("exp_avg", state["exp_avg"])):
        low, high = float(tensor.min()), float(tensor.max())
        require(high - low <= 2**-6 * abs(high), f"{name} lies in [{low}, {high}]")
    slot = state["critical_buffer"]
    require(int(slot.min()) > 0, "a part of the slot is empty")
    return Finding(
        "one large tensor",
        numel,
        "elements of one bfloat16 tensor, int8 slots, bfloat16 moments",
        "every element and slot stepped, the key is the norm",
    )


def _available_bytes() -> int:
    with open("/proc/meminfo") as file:
        kib = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
    return 1024 * int(kib)
