"""The launches as triton's own code takes them: bound, specialized and compiled, but not run.

A stand-in for the driver says that the device is an sm_90; every launch is turned into a warm-up.
In a process of its own, where kernels are not interpreted.
"""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

from tests.support.cases import ROOT, needs_cpu_backend, needs_triton

pytestmark = [needs_triton, needs_cpu_backend]

LAUNCHES = """
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Sm90:
    def get_current_device(self):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device=0):
        return 0


driver.set_active(Sm90())

from cm_fused import AdamCG, AdamCM
from cm_fused._backends.triton import launch as triton
from cm_fused._backends.triton import kernels as triton_kernels
from cm_fused._backends.triton import norms as triton_norms
from cm_fused._backends.triton import priorities

launched = []
KERNELS = (
    triton_kernels.critical_adam_kernel,
    triton_norms.sq_norm_kernel,
    triton_norms.tensor_sq_norms_kernel,
    triton_norms.update_priorities_kernel,
)


def warm_up(kernel):
    run = kernel.run

    def record(*arguments, grid, warmup, **options):
        launched.append((kernel.__name__, grid[0]))
        run(*arguments, grid=grid, warmup=True, **options)

    kernel.run = record


for kernel in KERNELS:
    warm_up(kernel)
triton.unavailable_reason = lambda device: None
priorities.priority_kernel = lambda device: "Triton"
# As on a CUDA device: with the caps on registers.
triton._compiles_ptx = lambda device: True


def variants():
    return sum(len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values())


"""


CHANGES = """
params = [torch.randn(5000), torch.randn(3)]
optimizer = AdamCM(params, backend="triton")
counts = []
for change in (
    {},
    {},
    {"lr": 0.5},
    {"lr": 1.0, "betas": (0.0, 0.5), "eps": 0.0, "weight_decay": 1.0},
    {"priority_decay": 1.0, "maximize": True, "eps_inside_sqrt": False},
    {"buffer_mean": "size", "decoupled_weight_decay": True},
):
    optimizer.param_groups[0].update(change)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    counts.append(variants())
other = AdamCM(params, backend="triton", capacity=8)
other.step()
counts.append(variants())
print(json.dumps(counts))
"""


COUNTS = """
launched.clear()
totals = {}
for kind in (AdamCM, AdamCG):
    for dtypes in ([torch.float32], [torch.float32, torch.bfloat16, torch.float16, torch.float64]):
        params = [torch.randn(10).to(dtype) for dtype in dtypes for _ in range(50)]
        optimizer = kind(params, backend="triton", priority_scope="tensor")
        for param in params:
            param.grad = torch.ones_like(param)
        for _ in range(3):
            launched.clear()
            optimizer.step()
        totals[f"{kind.__name__} {len(dtypes)}"] = launched
        launched = []
        optimizer.param_groups[0]["max_grad_norm"] = 1.0
        for _ in range(3):
            launched.clear()
            optimizer.step()
        totals[f"{kind.__name__} {len(dtypes)} clipped"] = launched
        launched = []
from cm_fused.compat.cmoptimizer import Adam_C

params = [torch.randn(10) for _ in range(50)]
optimizer = Adam_C([{"params": params, "backend": "triton"}], critical_test=0.0)
for param in params:
    param.grad = torch.ones_like(param)
for _ in range(3):
    launched.clear()
    optimizer.step()
totals["Adam_C"] = launched
print(json.dumps(totals))
"""


@cache
def _results() -> tuple[Any, Any]:
    """Return what the two parts of the script print."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHES + CHANGES + COUNTS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    changes, counts = map(json.loads, result.stdout.splitlines())
    return changes, counts


def test_no_option_compiles_anew() -> None:
    """Hyperparameters are values of a launch: a scheduler, or another capacity, compiles nothing.

    The interpreter has no variants, so no test of results could tell. There are two: the pass and
    the kernel of priorities, whose block has the next power of two of the capacity.
    """
    assert _results()[0] == [2] * 7


def test_launches_of_a_step() -> None:
    """However many tensors: a pass for each dtype, one for the norm of CG, one for priorities."""
    totals = _results()[1]
    update, norm, books = (
        [f"{name}_kernel", 50] for name in ("critical_adam", "sq_norm", "update_priorities")
    )
    assert totals["AdamCM 1"] == [update, books]
    assert totals["AdamCG 1"] == [norm, books, update]
    assert totals["AdamCM 4"] == [*[update] * 4, [books[0], 200]]
    assert totals["AdamCG 4"] == [*[norm] * 4, [books[0], 200], *[update] * 4]
    # Clipping: one pass more that reads the gradients, and the sums of its parts.
    for kind in ("AdamCM", "AdamCG"):
        for dtypes, count in ((1, 50), (4, 200)):
            plain, clipped = (totals[f"{kind} {dtypes}{suffix}"] for suffix in ("", " clipped"))
            assert clipped == [*[norm] * dtypes, ["tensor_sq_norms_kernel", count], *plain]
    # The research package's key is a sum of norms, which its class takes before the step: once.
    names = [name for name, _ in totals["Adam_C"]]
    assert names == [
        *("sq_norm_kernel", "tensor_sq_norms_kernel"),
        *("update_priorities_kernel", "critical_adam_kernel"),
    ]
