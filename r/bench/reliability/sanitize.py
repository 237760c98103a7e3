"""Steps of every path of the fused kernels: `python -m bench.reliability.sanitize`.

For compute-sanitizer: whole and unfinished chunks, tensors that are not aligned, not contiguous or
empty, running sums and summed slots. The result is held against the reference, which runs on the
CPU: on the device there is little but the kernels. Without a GPU it needs TRITON_INTERPRET=1, or
shows the CPU's backend.
"""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn import Parameter

from bench import machine
from bench.internals import TRITON_CHUNK_SIZE as CHUNK_SIZE
from bench.reliability.parity import fused_backend
from cm_fused import AdamCG, AdamCM

_STEPS = 7
_CLASSES: tuple[type[AdamCM | AdamCG], ...] = (AdamCM, AdamCG)
_CAPACITIES = (3, 5)
_TOLERANCE = 1e-5


def _tensors(generator: torch.Generator) -> list[Tensor]:
    """Return tensors on the CPU, all of whose memory is their own."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(list(shape), generator=generator)

    return [
        normal(2 * CHUNK_SIZE),
        normal(CHUNK_SIZE + 7),
        normal(3),
        normal(0),
        normal(),
        normal(5, 3).t(),
        normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
        normal(40)[::2],
    ]


def _on(device: str, tensor: Tensor, offset: int) -> Tensor:
    """Return a copy on a device, in a layout of the same strides, `offset` elements off."""
    extent = 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    # What does not belong to the tensor must be neither read nor written: memcheck sees the end.
    memory = torch.full((offset + max(extent, 0),), torch.nan, device=device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def _params(device: str, tensors: list[Tensor]) -> list[Parameter]:
    return [Parameter(_on(device, tensor, i % 2)) for i, tensor in enumerate(tensors)]


def _check(
    optimizer_class: type[AdamCM | AdamCG], capacity: int, amsgrad: bool, device: str
) -> None:
    generator = torch.Generator().manual_seed(capacity)
    initial = _tensors(generator)
    params, expected = _params(device, initial), _params("cpu", initial)
    options = {"lr": 1e-2, "capacity": capacity, "amsgrad": amsgrad, "weight_decay": 0.1}
    fused = optimizer_class(params, backend=fused_backend(device), **options)  # type: ignore[arg-type]
    eager = optimizer_class(expected, backend="eager", **options)  # type: ignore[arg-type]
    for step in range(_STEPS):
        # Growing norms are admitted, a small one is not.
        scale = 0.01 if step == _STEPS - 2 else 1.0 + step
        for param, other, grad in zip(params, expected, _tensors(generator), strict=True):
            other.grad = scale * grad
            # Now and then a gradient that lies otherwise than its parameter.
            param.grad = _on(device, scale * grad, step % 2)
            if step % 3 == 2:
                param.grad = param.grad.contiguous()
        fused.step()
        eager.step()
    machine.synchronize(device)
    fused.state_dict()
    eager.state_dict()
    for i, (param, other) in enumerate(zip(params, expected, strict=True)):
        for name, tensor in {"parameter": other, **eager.state[other]}.items():
            own = param if name == "parameter" else fused.state[param][name]
            torch.testing.assert_close(
                own.detach().cpu(),
                tensor.detach(),
                rtol=_TOLERANCE,
                atol=_TOLERANCE,
                msg=partial("{} of parameter {}: {}".format, name, i),
            )


def main() -> None:
    """Run all paths and say which."""
    device = machine.default_device()
    for optimizer_class, capacity in itertools.product(_CLASSES, _CAPACITIES):
        # Kernels of their own: once is enough.
        amsgrad = capacity == _CAPACITIES[0]
        _check(optimizer_class, capacity, amsgrad, device)
        print(
            f"{optimizer_class.__name__} capacity={capacity} amsgrad={amsgrad}: {_STEPS} steps "
            f"of backend={fused_backend(device)!r} on {device} are the reference's",
            flush=True,
        )


if __name__ == "__main__":
    main()
