"""Gradients under a closure that is called twice, which may find some and add to them."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from cm_fused._distributed import local


class Found:
    """The gradients that a closure is about to find.

    They are not kept alive: their memory is free once the closure has dropped them.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self._refs = [
            (param, TensorWeakRef(param.grad)) for param in params if param.grad is not None
        ]

    def __bool__(self) -> bool:
        return bool(self._refs)

    def kept(self) -> list[Tensor]:
        """Return the parameters whose gradients have not been replaced since.

        A gradient with a graph counts as kept: `backward(create_graph=True)` adds out of place.
        """
        return [
            param
            for param, ref in self._refs
            if param.grad is not None and (param.grad.requires_grad or ref() is param.grad)
        ]


@torch.no_grad()
def reset(params: list[Tensor], kept: list[Tensor]) -> None:
    """Reset the gradients of parameters.

    Args:
        params: All of them.
        kept: Those whose gradients stay the tensors that they are, filled with zeros. The others'
            become None.
    """
    in_place = set(map(id, kept))
    for param in params:
        if id(param) not in in_place:
            param.grad = None
    grads = [_local(param.grad) for param in kept if param.grad is not None]
    if grads:
        torch._foreach_zero_(grads)


class Marks:
    """Marks in gradients, which show whether a closure adds to the gradients that it finds.

    The first element of each gradient becomes NaN. It stays NaN whatever is added to it and however
    the gradient is scaled or clipped, until the gradient is zeroed or overwritten.

    The closure's own gradients may be NaN too. Hence autograd is asked to look for the mark before
    it adds to a gradient: the mark is gone by then if the closure zeroes. Autograd does not add
    where FSDP2 does, or where a closure replays a graph or copies gradients; these are `unsure`.

    A context around the call of the closure.

    Args:
        params: Parameters with gradients, which are changed.
    """

    def __init__(self, params: list[Tensor]) -> None:
        # Nothing can be added to the elements of an empty gradient.
        self._params = [param for param in params if _local_grad(param).numel()]
        self._grads = [param.grad for param in self._params]
        # By place in `_params`, bool (): whether the mark was there when a backward pass got to the
        # parameter, and before every addition so far; None where the gradient was replaced.
        self._reached: dict[int, Tensor | None] = {}
        self._seen: dict[int, Tensor | None] = {}
        self._hooks = []
        for i, param in enumerate(self._params):
            if param.requires_grad:
                self._hooks += [
                    param.register_hook(partial(self._look, i)),  # type: ignore[no-untyped-call]
                    param.register_post_accumulate_grad_hook(partial(self._count, i)),  # type: ignore[no-untyped-call]
                ]
        with torch.no_grad():
            for param in self._params:
                _first_element(param).fill_(float("nan"))

    def __enter__(self) -> "Marks":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _look(self, i: int, _: Tensor) -> None:
        same = self._is_same(i)
        self._reached[i] = _first_element(self._params[i]).isnan() if same else None

    def _count(self, i: int, _: Tensor) -> None:
        # FSDP2 calls this itself; `torch.autograd.grad` reaches parameters and adds nothing.
        if i not in self._reached:
            return
        is_marked = self._reached.pop(i)
        earlier = self._seen.setdefault(i, is_marked)
        if earlier is not None:
            self._seen[i] = None if is_marked is None else earlier & is_marked

    def _is_same(self, i: int) -> bool:
        return self._params[i].grad is self._grads[i]

    def added_to(self) -> list[Tensor]:
        """Return for each gradient that autograd added to whether its mark was there, bool ()."""
        return [flag for flag in self._seen.values() if flag is not None]

    def unsure(self) -> list[Tensor]:
        """Return the parameters whose gradients are the same and that autograd did not add to."""
        return [
            param
            for i, param in enumerate(self._params)
            if i not in self._seen and self._is_same(i)
        ]


@torch.no_grad()
def are_nan(params: list[Tensor]) -> list[Tensor]:
    """Return for each gradient whether its first element is NaN, bool ()."""
    return [_first_element(param).isnan() for param in params]


def any_of(flags: list[Tensor]) -> Tensor:
    """Return whether any of some flags is set, float64 (), on the first one's device."""
    if not flags:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    here = flags[0].device
    return torch.stack([flag.to(here, torch.float64) for flag in flags]).amax()


def _local(grad: Tensor) -> Tensor:
    return local(grad.detach())


def _local_grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return _local(param.grad)


def _first_element(param: Tensor) -> Tensor:
    held = _local_grad(param)
    return held[(0,) * held.ndim]
