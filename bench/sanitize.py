"""A few small steps, for compute-sanitizer: `compute-sanitizer python -m bench.sanitize`.

Full and partial chunks, tensors that are not aligned or not contiguous, every dtype, with and
without a running sum. Under TRITON_INTERPRET=1 the same on the CPU.
"""

import torch
from torch import Tensor

from bench import machine
from cm_fused import AdamCG, AdamCM
from cm_fused.ops import triton_kernels
from cm_fused.ops.table import CHUNK_SIZE

_STEPS = 5
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _params(device_type: str) -> list[Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device_type)

    plain = [normal(2 * CHUNK_SIZE), normal(CHUNK_SIZE + 5), normal(3), normal(), normal(0)]
    unaligned = normal(CHUNK_SIZE + 1)[1:]
    strided = normal(20, 30)[::2, ::3]
    return [*(param.to(dtype) for dtype in _DTYPES for param in plain), unaligned, strided]


def main() -> None:
    """Take the steps."""
    device_type = "cpu" if triton_kernels.INTERPRETED else machine.default_device()
    for kind in (AdamCM, AdamCG):
        for capacity in (3, 5):
            params = _params(device_type)
            optimizer = kind(params, capacity=capacity, amsgrad=True, backend="triton")
            for _ in range(_STEPS):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            print(f"{kind.__name__}, capacity {capacity}: {_STEPS} steps of {len(params)} tensors")


if __name__ == "__main__":
    main()
