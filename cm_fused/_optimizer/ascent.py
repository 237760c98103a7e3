"""The ascent of `SAM` to where the loss is worst: norms over all parameters and processes."""

from collections.abc import Iterable
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from cm_fused._backends.flush import as_real
from cm_fused._devices import to_device
from cm_fused._distributed import Processes, local, processes
from cm_fused.rounding import HALF_DTYPES

# Keeps the perturbation of a zero gradient zero.
_TINY = 1e-12
_Pair = tuple[Tensor, Tensor]


class Sums:
    """Sums over the processes that an optimizer's parameters are sharded among."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._processes: Processes | None = None
        self._counted: set[int] = set()

    def follow(self, params: list[Tensor]) -> None:
        """Sum over the processes of these parameters from now on."""
        if len(params) == len(self._params) and all(map(is_, params, self._params)):
            return
        # A reference to each, so that no other parameter gets the address of one.
        self._params = params
        self._processes = processes(params)
        if self._processes is not None:
            pairs = zip(params, self._processes.counted.tolist(), strict=True)
            self._counted = {id(param) for param, share in pairs if share}

    def counts(self, param: Tensor) -> bool:
        """Return whether this process, of those with the same part, counts that of a parameter."""
        return self._processes is None or id(param) in self._counted

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the processes, all of which must call this."""
        if self._processes is None:
            return value
        total = value.to(self._processes.device, copy=True)
        self._processes.start_sum(total).wait()
        return total

    def norm(self, own: Tensor) -> Tensor:
        """Return the norm over all processes, given that of the parts which this one counts."""
        return own if self._processes is None else self.total(own.square()).sqrt()


def ascend_(pairs: list[_Pair], rho: float, adaptive: bool, sums: Sums) -> None:
    """Move the parameters of the pairs along their local gradients, as `SAM` defines."""
    lists = _by_kind(pairs)
    counted = [pair for pair in pairs if sums.counts(pair[0])]
    kinds = lists if len(counted) == len(pairs) else _by_kind(counted)
    norm = sums.norm(_norm([_products(*kind) if adaptive else kind[1] for kind in kinds]))
    for params, directions in lists:
        scale = to_device(rho / (norm + _TINY), params[0].device)
        if adaptive:
            directions = _products(params, _products(params, directions))
        else:
            # The perturbation is computed in float32; only the moved parameter is rounded.
            directions = [
                each.float() if each.dtype in HALF_DTYPES else each for each in directions
            ]
        moves = torch._foreach_mul(directions, scale.to(directions[0].dtype))
        torch._foreach_add_(params, moves)


def _by_kind(pairs: list[_Pair]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return local tensors and gradients by device and dtype for multi-tensor kernels, all real."""
    lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for param, grad in pairs:
        # Autograd does not resolve the lazy conjugation of a complex gradient.
        target = as_real(local(param).resolve_conj())
        params, grads = lists.setdefault((target.device, target.dtype), ([], []))
        params.append(target)
        grads.append(as_real(grad.resolve_conj()))
    return list(lists.values())


def _products(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return theta * g, in float32 or wider."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    return list(torch._foreach_mul([param.to(dtype) for param in params], grads))


def _norm(lists: list[list[Tensor]]) -> Tensor:
    """Return the norm over all tensors, float64 (), on the first one's device."""
    norms = [torch._foreach_norm(tensors, dtype=torch.float64) for tensors in lists]
    norm: Tensor = torch.linalg.vector_norm(stacked(chain.from_iterable(norms)))
    return norm


@torch.no_grad()
def count_nonzero(params: list[Tensor]) -> Tensor:
    """Return how many local gradients are not all zeros, float64 (), on the first one's device."""
    grads = [local(param.grad) for param in params if param.grad is not None]
    dense = [grad if grad.layout == torch.strided else grad.to_dense() for grad in grads]
    filled = [as_real(grad.resolve_conj()) for grad in dense if grad.numel()]
    # Not the Euclidean norm: squares of small values are 0.
    norms = torch._foreach_norm(filled, 1) if filled else ()
    return stacked(norm != 0 for norm in norms).sum()


def stacked(numbers: Iterable[Tensor]) -> Tensor:
    """Return tensors of shape () as float64 (numbers,) on the first one's device; if none, a 0."""
    listed = list(numbers) or [torch.zeros((), device="cpu")]
    return torch.stack([to_device(number.double(), listed[0].device) for number in listed])
