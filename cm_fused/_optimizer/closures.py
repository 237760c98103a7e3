"""The two calls of a closure, which must zero the gradients that it finds."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from cm_fused._backends.capture import is_capturing
from cm_fused._distributed import local
from cm_fused._optimizer.ascent import count_nonzero, stacked

_ACCUMULATES = (
    "closure must zero the gradients before it adds to them, as SAM.step calls it twice, at other "
    "parameters; got one that adds to the gradients it finds, or computes none. To accumulate, let "
    "the closure zero the gradients and then run the backward passes of all micro-batches; or run "
    "these, call first_step(zero_grad=True), run them again, call second_step(zero_grad=True). The "
    "parameters are what they were, the gradients are reset"
)


class TwoCalls:
    """The two calls of a step's closure; `total` sums a value over the parameters' processes."""

    def __init__(
        self,
        closure: Callable[[], float],
        params: list[Tensor],
        total: Callable[[Tensor], Tensor],
        zeroes: bool,
    ) -> None:
        # Whether the closure of the last step that found gradients zeroed them.
        self.zeroes = zeroes
        self._closure, self._params, self._total = closure, params, total
        self._found_any = False
        # The parameters whose gradients the first call did not replace.
        self._reused: list[Tensor] = []
        # Whether a closure that does not zero the gradients would be wrong.
        self._must_zero = False

    def first(self) -> float:
        """Call the closure, and find out what it does with the gradients that it finds."""
        # Weakly, so that their memory is free once the closure has dropped them.
        found = [(p, TensorWeakRef(p.grad)) for p in self._params if p.grad is not None]
        self._found_any = bool(found)
        # Counting reads all gradients, so it is not done for a closure that zeroed the last ones.
        # A CUDA graph captures no check: the steps before it have checked.
        known = not found or self.zeroes or self._is_captured()
        nonzero = None if known else count_nonzero(self._params)
        with torch.enable_grad():
            loss = self._closure()
        # A gradient with a graph is not replaced: `backward(create_graph=True)` adds out of place.
        self._reused = [
            param
            for param, ref in found
            if param.grad is not None and (param.grad.requires_grad or ref() is param.grad)
        ]
        if self._reused and not self._is_captured():
            self._must_zero = nonzero is None or bool(self._total(nonzero).item())
        return loss

    def second(self) -> None:
        """Call the closure again, on gradients of zero.

        Where it does not zero gradients and has to, they are reset and RuntimeError is raised.
        """
        reset(self._params, self._reused)
        if self._must_zero:
            self._call_marked()
        else:
            with torch.enable_grad():
                self._closure()
        if self._found_any and not self._reused:
            self.zeroes = True

    def _call_marked(self) -> None:
        """Call the closure on marked gradients, which show whether it adds to them."""
        # One parameter shows whether a closure that zeroed all of them still does.
        filled = [param for param in self._reused if param.numel()]
        marked = filled[:1] if self.zeroes else filled
        self.zeroes = False
        try:
            with Marks(marked) as marks, torch.enable_grad():
                self._closure()
            if self._adds(marks):
                raise RuntimeError(_ACCUMULATES)
        except BaseException:
            reset(self._params, self._reused)  # no mark stays
            raise
        self.zeroes = True

    def _adds(self, marks: "Marks") -> bool:
        """Return whether the closure has added to marked gradients; may call it once more."""
        unsure = marks.unsure()
        flags = stacked(marks.added_to()).amax(), stacked(are_nan(unsure)).amax()
        added, is_unsure = self._total(torch.stack([flag.cpu() for flag in flags])).tolist()
        if added or not is_unsure:
            return bool(added)
        # NaN may be the mark or the closure's own gradient, which is NaN again without a mark.
        reset(self._params, self._reused)
        with torch.enable_grad():
            self._closure()
        finite = stacked(~flag for flag in are_nan(unsure)).amax()
        return bool(self._total(finite).item())

    def _is_captured(self) -> bool:
        return any(map(is_capturing, {param.device for param in self._params}))


@torch.no_grad()
def reset(params: list[Tensor], in_place: list[Tensor]) -> None:
    """Fill the gradients of those in `in_place` with zeros; the other parameters' become None."""
    filled = set(map(id, in_place))
    for param in params:
        if id(param) not in filled:
            param.grad = None
    grads = [_local_grad(param) for param in in_place if param.grad is not None]
    if grads:
        torch._foreach_zero_(grads)


class Marks:
    """Marks in gradients that show whether a closure adds to the gradients that it finds.

    The first element of each gradient becomes NaN. It stays NaN whatever is added to it and however
    the gradient is scaled or clipped, until the gradient is zeroed or overwritten.

    The closure's own gradients may be NaN too. Hence hooks of autograd look for the mark before it
    adds to a gradient: the mark is gone by then if the closure zeroes. Autograd does not add where
    FSDP2 does, or where a closure replays a graph or copies gradients; these are `unsure`. This is
    a context around the call of the closure.
    """

    def __init__(self, params: list[Tensor]) -> None:
        # Nothing can be added to the elements of an empty gradient.
        self._params = [param for param in params if _local_grad(param).numel()]
        self._grads = [param.grad for param in self._params]
        # By index in `_params`, bool (): whether the mark was there when a backward pass reached
        # the parameter, and before every addition so far; None where the gradient was replaced.
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
        same = self._params[i].grad is self._grads[i]
        self._reached[i] = _first_element(self._params[i]).isnan() if same else None

    def _count(self, i: int, _: Tensor) -> None:
        # FSDP2 calls this itself; `torch.autograd.grad` reaches parameters and adds nothing.
        if i not in self._reached:
            return
        is_marked = self._reached.pop(i)
        earlier = self._seen.setdefault(i, is_marked)
        if earlier is not None:
            self._seen[i] = None if is_marked is None else earlier & is_marked

    def added_to(self) -> list[Tensor]:
        """Return a bool () for each gradient that autograd added to: whether it had its mark."""
        return [flag for flag in self._seen.values() if flag is not None]

    def unsure(self) -> list[Tensor]:
        """Return the parameters whose gradients were neither replaced nor added to by autograd."""
        return [
            param
            for i, param in enumerate(self._params)
            if i not in self._seen and param.grad is self._grads[i]
        ]


@torch.no_grad()
def are_nan(params: list[Tensor]) -> list[Tensor]:
    """Return a bool () for each gradient: whether its first element is NaN."""
    return [_first_element(param).isnan() for param in params]


def _local_grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return local(param.grad.detach())


def _first_element(param: Tensor) -> Tensor:
    grad = _local_grad(param)
    return grad[(0,) * grad.ndim]
