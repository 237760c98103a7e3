"""Short runs for valgrind and ThreadSanitizer: `python -m bench.native.steps WHAT`.

The two races are wrong on purpose: a sanitizer that does not report them shows nothing.
"""

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
from cm_fused._backends import cpu
from cm_fused._optimizer.base import CriticalAdam

CHUNK = 16384
PRECISIONS: tuple[dict[str, Any], ...] = (
    {},
    {"capacity": 2, "amsgrad": True},
    {"buffer_dtype": torch.int8, "moment_dtype": torch.int8},
    {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.bfloat16},
)


def every_kernel() -> None:
    """Take a few steps of both kinds in every dtype and precision, with tails, gaps and views."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for kind, dtype in itertools.product((AdamCM, AdamCG), dtypes):
        for options in PRECISIONS:
            rounded = "buffer_dtype" in options
            if rounded and dtype is torch.float64:
                continue
            _take(*_made(kind, dtype, (CHUNK + 7, 3, 1), **options), steps=3)


def _made(
    kind: type[CriticalAdam], dtype: torch.dtype, sizes: tuple[int, ...], **options: Any
) -> tuple[list[Tensor], CriticalAdam]:
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    strided = [
        torch.randn(5, 3, generator=generator).to(dtype).t(),
        torch.ones(40, dtype=dtype)[::2],
    ]
    params = [tensor.requires_grad_() for tensor in (*flat, *strided)]
    return params, kind(params, backend="cpu", **options)


def _take(params: list[Tensor], optimizer: CriticalAdam, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = gradient * (1 + step)
        optimizer.step()
    optimizer.state_dict()


def optimizers_in_threads() -> None:
    """Step four optimizers in four threads, while others save theirs."""
    made = [
        _made(kind, torch.float32, (3 * CHUNK + 5, *[7] * 600))
        for kind in (AdamCM, AdamCG, AdamCM, AdamCG)
    ]
    _in_threads(lambda i: _take(*made[i], steps=5), len(made))


def one_state_in_threads() -> None:
    """Step one held state in four threads: they take turns."""
    params, optimizer = _made(AdamCM, torch.float32, (2 * CHUNK, *[5] * 600))
    _take(params, optimizer, steps=1)
    group = optimizer.param_groups[0]
    state = [optimizer.state[param] for param in params]
    keys = ("exp_avg", "exp_avg_sq", None, "critical_buffer", "critical_sum", "priorities")
    lists = [[s[key] for s in state] if key else [] for key in (*keys, "pending_slot", "step")]
    held = torch.ops.cm_fused.hold_state(*lists, [], [], [], [], [], [])
    data = [param.detach() for param in params]
    grads = [param.grad for param in params]
    numbers = cpu.held_numbers(
        {
            "lr": group["lr"],
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-8,
            "weight_decay": 0.0,
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
    )

    def step(_: int) -> None:
        for _ in range(5):
            torch.ops.cm_fused.step_held_(
                [held], data, grads, [], [], [], [], None, hyperparameters=numbers, seeds=[0]
            )

    _in_threads(step, 4)
    torch.ops.cm_fused.release_state(held)
    counts = {s["step"].item() for s in state}
    if counts != {21.0}:
        raise AssertionError(f"of 21 steps were counted: {counts}")


def race_of_callers() -> None:
    """Keep the same books in two threads, which nothing orders."""
    priorities = [torch.full((5,), -torch.inf) for _ in range(2000)]
    slots, steps = ([torch.tensor(value) for _ in range(2000)] for value in (-1, 0.0))
    sq_norm = torch.tensor(1.0, dtype=torch.float64)

    def keep(_: int) -> None:
        for _ in range(20):
            torch.ops.cm_fused.keep_books_(
                priorities, slots, steps, sq_norm, None, priority_decay=0.7
            )

    _in_threads(keep, 2)


def race_of_chunks() -> None:
    """Commit to a buffer that is in its list twice: two chunks of one pass are the same memory."""
    exp_avgs, buffers = [torch.ones(CHUNK)] * 2, [torch.zeros(3, CHUNK)] * 2
    pending = [torch.tensor(0), torch.tensor(0)]
    for _ in range(20):
        torch.ops.cm_fused.commit_(exp_avgs, buffers, [], pending, [], [])
        for slot in pending:
            slot.zero_()


def _in_threads(work: Callable[[int], None], count: int) -> None:
    torch.set_num_threads(1)
    start = threading.Barrier(count)

    def run(i: int) -> None:
        start.wait()
        work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


RUNS = {
    run.__name__: run
    for run in (
        every_kernel,
        optimizers_in_threads,
        one_state_in_threads,
        race_of_callers,
        race_of_chunks,
    )
}

if __name__ == "__main__":
    RUNS[sys.argv[1]]()
