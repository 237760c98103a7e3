"""Short runs for valgrind and ThreadSanitizer: `python -m bench.reliability.native.steps WHAT`.

The two races are wrong on purpose: a sanitizer that does not report them shows nothing.
"""

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.reliability.finding import Kind
from cm_fused import AdamCG, AdamCM

# Elements that one thread takes at a time.
CHUNK = 16384
PRECISIONS: tuple[dict[str, Any], ...] = (
    {},
    {"capacity": 2, "amsgrad": True},
    {"buffer_dtype": torch.int8, "moment_dtype": torch.int8},
    {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.bfloat16},
    {"buffer_dtype": "int4", "moment_dtype": torch.bfloat16, "low_precision_update": "split"},
    {"capacity": 0, "moment_dtype": torch.int8, "low_precision_update": "kahan"},
)
Made = tuple[list[Tensor], AdamCM | AdamCG]


def every_kernel() -> None:
    """Take a few steps of both kinds in every dtype and precision, with tails, gaps and views."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for kind, dtype, options in itertools.product((AdamCM, AdamCG), dtypes, PRECISIONS):
        if dtype is torch.float64 and "moment_dtype" in options:
            continue
        # A float16 is no half of a float32 master.
        if dtype is torch.float16 and "low_precision_update" in options:
            options = {**options, "low_precision_update": "stochastic"}
        _take(_made(kind, dtype, (CHUNK + 7, 3, 1), **options), steps=3)


def _made(kind: Kind, dtype: torch.dtype, sizes: tuple[int, ...], **options: Any) -> Made:
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    strided = [
        torch.randn(5, 3, generator=generator).to(dtype).t(),
        torch.ones(40, dtype=dtype)[::2],
    ]
    params = [tensor.requires_grad_() for tensor in (*flat, *strided)]
    return params, kind(params, backend="cpu", **options)


def _take(made: Made, steps: int) -> None:
    params, optimizer = made
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = gradient * (1 + step)
        optimizer.step()
    optimizer.state_dict()


def optimizers_in_threads() -> None:
    """Step four optimizers in four threads, while others save theirs."""
    kinds = (AdamCM, AdamCG, AdamCM, AdamCG)
    made = [_made(kind, torch.float32, (3 * CHUNK + 5, *[7] * 600)) for kind in kinds]
    _in_threads(lambda i: _take(made[i], steps=5), len(made))


def race_of_callers() -> None:
    """Step the same parameters by two optimizers in two threads, which nothing orders."""
    params, first = _made(AdamCM, torch.float32, (CHUNK,))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizers = (first, AdamCM(params, backend="cpu"))
    _in_threads(lambda i: [optimizers[i].step() for _ in range(20)], 2)


def race_of_chunks() -> None:
    """Step parameters whose second moments are one tensor: two chunks of a pass write it."""
    params = [torch.ones(CHUNK, requires_grad=True) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = AdamCM(params, backend="cpu")
    optimizer.step()
    first, second = (optimizer.state[param] for param in params)
    second["exp_avg_sq"] = first["exp_avg_sq"]
    for _ in range(20):
        optimizer.step()


def _in_threads(work: Callable[[int], object], count: int) -> None:
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


SOUND = (every_kernel, optimizers_in_threads)
RACES = (race_of_callers, race_of_chunks)

if __name__ == "__main__":
    {run.__name__: run for run in (*SOUND, *RACES)}[sys.argv[1]]()
