"""Backward passes, as a gradient's hook sees them: may more be added to its gradient?"""

import sys
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_leaves

# NOTE: [Backward within backward]
# Reentrant checkpointing computes each checkpoint again and runs a backward pass of its own for it,
# within the outermost pass. The outermost pass does not know of those passes: a parameter that they
# share gets a part of its gradient from each of them, and is used again by the next computation.
# In such a pass all parameters therefore wait until it ends. The engine calls a callback when the
# pass in which it was queued ends, so the outermost pass must queue it: that pass runs the hooks on
# the model's outputs.

# How the engine calls the backward of a Function; the names differ between torch releases.
_BACKWARD_CALLS: frozenset[CodeType] = frozenset(
    getattr(BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(BackwardCFunction, name)
)
_REMEDY = (
    "pass use_reentrant=False to torch.utils.checkpoint, or compute the loss from what calling the "
    "model returns"
)


@dataclass(eq=False)
class _Pass:
    """An outermost backward pass, to which only the engine refers until it ends."""

    graph_task: int
    has_others: bool = False  # whether it may run other passes within it
    stepped: set[int] = field(default_factory=set)  # the ids of parameters stepped in it
    # The sequence numbers of the nodes that have been searched for checkpoints.
    searched: set[int] = field(default_factory=set)


class BackwardPasses:
    """The backward passes of a model, each from its outputs to its parameters."""

    def __init__(self, step: Callable[[Tensor], None]) -> None:
        """Start with no pass; its end calls `step` with each parameter that had to wait."""
        self._step = step
        self._outermost: Callable[[], _Pass | None] = lambda: None
        self._waiting: dict[int, Tensor] = {}

    def watch(self, outputs: Any) -> None:
        """Watch for the backward pass that begins at these outputs of the model."""
        # The graph that refers to the hook must not keep the model alive.
        enter = weakref.WeakMethod(self.enter)

        def hook(_: Tensor) -> None:
            if (begin := enter()) is not None:
                begin()

        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                output.register_hook(hook)  # type: ignore[no-untyped-call]

    def may_step(self, param: Tensor) -> bool:
        """Return whether a gradient is final; else its parameter waits for the end of the pass.

        Its hook calls this when the gradient has been accumulated. RuntimeError where that is a
        part of the pass's, and the end of the pass cannot be found or the parameter has already
        been stepped with another part.
        """
        outermost = self._outermost()
        if outermost is None:
            if any(
                frame.f_code in _BACKWARD_CALLS
                for frame, _ in traceback.walk_stack(sys._getframe())
            ):
                raise RuntimeError(
                    "gradient release cannot tell when the backward pass ends: a gradient of shape "
                    f"{tuple(param.shape)} comes from a backward pass within another one, and the "
                    f"loss was not computed from the model's outputs; {_REMEDY}"
                )
            return True
        outermost.has_others |= _graph_task() != outermost.graph_task
        if not outermost.has_others:
            outermost.stepped.add(id(param))
            return True
        stepped = id(param) in outermost.stepped
        del outermost  # which an error must not keep alive
        if stepped:
            raise RuntimeError(
                f"gradient release has stepped a parameter of shape {tuple(param.shape)} before a "
                "backward pass within the same backward pass added to its gradient; use "
                "torch.utils.checkpoint with use_reentrant=False"
            )
        self._waiting[id(param)] = param
        return False

    def forget(self) -> None:
        """Forget the waiting parameters; their gradients stay."""
        self._waiting.clear()

    def enter(self) -> None:
        """Begin an outermost pass unless one has begun; an output's hook calls this."""
        outermost = self._outermost()
        if outermost is None:
            # Gradients that a failed pass has left are no part of this pass's.
            for param in self._waiting.values():
                param.grad = None
            self.forget()
            outermost = _Pass(_graph_task())
            # torch has no public name for the engine, and no type.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._finish, outermost))
            self._outermost = weakref.ref(outermost)
        if outermost.graph_task == _graph_task() and not outermost.has_others:
            node = torch._C._current_autograd_node()
            outermost.has_others = _leads_to_checkpoint(node, outermost.searched)

    def _finish(self, _: _Pass) -> None:
        self._outermost = lambda: None
        while self._waiting:
            self._step(self._waiting.pop(next(iter(self._waiting))))


def is_outermost_forward() -> bool:
    """Return whether a backward pass may follow: neither a checkpoint's forward nor no_grad's."""
    return torch.is_grad_enabled() and _graph_task() == -1


def _graph_task() -> int:
    """Return the number of the backward pass that this thread is in, or -1."""
    return torch._C._current_graph_task_id()


def _leads_to_checkpoint(node: Any, searched: set[int]) -> bool:
    """Return whether the graph of a node has a reentrant checkpoint.

    `searched` has the sequence numbers of the nodes that were seen, and is changed. Numbers, since
    a reference to a node keeps the tensors alive that a Function stored.
    """
    seen = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node is None or node in seen or node._sequence_nr() in searched:
            continue
        if isinstance(node, BackwardCFunction) and "checkpoint" in type(node).__name__.lower():
            return True
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    searched.update(node._sequence_nr() for node in seen)
    return False
