"""Saving, loading, copying and resizing an optimizer's state, flushed before it is seen."""

import copy
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from cm_fused._backends.flush import flush_all_
from cm_fused._distributed import local_state
from cm_fused._optimizer import load_warnings, release_checks
from cm_fused._optimizer import state_dict as checkpoint
from cm_fused._optimizer.checks import check_capacity, plain_options
from cm_fused._optimizer.plan import Plan
from cm_fused._state.making import resize_buffer
from cm_fused._state.tracking import OptimizerState


class Release(Protocol):
    """Steps an optimizer's parameters inside backward; `enable_gradient_release` makes it."""

    def _follow_groups(self) -> None: ...


class CheckpointedOptimizer(Optimizer):
    """An optimizer whose state can be saved, loaded, copied and resized; it takes no step."""

    # Steps the parameters inside backward, if enabled. It belongs to the process: no copy has it.
    _release: Release | None = None
    # Captured graphs go on using the tensors that a load writes to.
    _captured_plans: list[Plan]
    _critical_gradients: ClassVar[bool]  # whether the slots are gradients

    @abstractmethod
    def _finish_step(self) -> None:
        """Update the priorities of the last step, where that waits for the norms' sum."""

    @abstractmethod
    def _forget_plans(self) -> None:
        """Have nothing prepared for the next step."""

    @abstractmethod
    def _check_state(self, param: Tensor) -> None:
        """Check that the state of a parameter fits it; the error names group and parameter."""

    def state_dict(self) -> StateDict:
        """Return the state as `torch.optim.Optimizer.state_dict`, flushed.

        The tensors are references, not copies: the next step changes them, as it does those of
        torch's optimizers. A state dict that is taken once may be saved after any later step.
        Loading does not change them. Once a step was captured in a CUDA graph, for which loading
        writes into the state, they are copies. Groups have every key that the optimizer's groups
        have: options of the process (`backend`, `fused`, `foreach`, `amp_scaling`) are saved as
        None and False and never loaded, and dtypes are saved by name. Besides,
        `critical_gradients` says whether the slots are gradients.

        DTensors' state with scales is the exception: take it anew each time it is saved. Its scales
        belong to blocks of the local tensor, which differs between meshes. It is saved as float32
        DTensors of the values, new tensors of 4 bytes an element (for int8 slots and moments
        4 C + 8 instead of C + 2), each with a scale of 1 instead of its scales, and its dtype as
        "torch.int8 as values", unless the group has codes of plain parameters too. A
        `torch.distributed.checkpoint` of it loads into such an optimizer on any mesh; for plain
        parameters gather it (`StateDictOptions(full_state_dict=True)`). DTensors'
        `master_remainder` is saved as int32, since processes cannot gather int16.
        """
        self._flush()
        # The first of the hooks, so that all others see what the caller gets.
        hook = partial(checkpoint.saved_form, copies=bool(self._captured_plans))
        saved_form = self.register_state_dict_post_hook(hook, prepend=True)
        try:
            return super().state_dict()
        finally:
            saved_form.remove()

    def _flush(self) -> None:
        """Make the state what it is in Algorithm 1 after the last step."""
        self._finish_step()
        # The state may have other entries.
        params = [param for param in self.state if isinstance(param, Tensor)]
        try:
            flush_all_([local_state(self.state[param]) for param in params])
        except RuntimeError:
            for param in params:
                self._check_state(param)
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of any backend, or one of torch.optim.Adam or AdamW (buffer empty).

        Float32 state of half-precision parameters stays float32. `buffer_dtype` and `moment_dtype`
        stay this optimizer's: state of another precision is rounded to nearest, with a warning.
        Options that are missing in the state dict stay as they are. A warning names the options
        that a state dict of another kind of optimizer brings. The values are copied into new
        tensors, so that neither `state_dict` nor any state dict taken before changes; besides the
        two states, memory is needed for that of one parameter at a time. Once a step of this
        optimizer was captured in a CUDA graph, they are copied into the tensors that the graph
        uses; state of the graph that is missing in `state_dict` starts anew there.

        Args:
            state_dict: A state dict, as `state_dict()` returns it.

        Raises:
            ValueError: Groups, shapes or capacity do not match, the state has codes without their
                scales (a file of `torch.distributed.checkpoint` that was read with an optimizer of
                other dtypes), or gradient release is enabled and cannot serve the groups. Nothing
                has been changed then.
        """
        # Hooks may change it.
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hooked = pre_hook(self, state_dict)
            if hooked is not None:
                state_dict = hooked
        checkpoint.check_form(state_dict)
        saved_groups = state_dict["param_groups"]
        groups = checkpoint.loaded_groups(self.param_groups, saved_groups)
        if self._release is not None:
            release_checks.check_options(groups)
        entries = checkpoint.checked_entries(groups, state_dict)
        load_warnings.warn_of_conversion(groups, saved_groups)
        load_warnings.warn_of_other_slots(self._critical_gradients, state_dict)
        load_warnings.warn_of_another_kind(self.param_groups, groups, state_dict)
        self._finish_step()
        captured = self._captured_plans
        self._forget_plans()  # which have the tensors that are given up
        self._captured_plans = captured
        in_place = bool(captured)
        state = checkpoint.take_over_state(
            entries, state_dict["state"], groups, self.state, in_place=in_place
        )
        if in_place:
            checkpoint.write_options_into_(self.param_groups, groups)
        self.__setstate__({"state": state, "param_groups": groups})
        self._captured_plans = captured
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @torch.no_grad()
    def resize_buffer(self, capacity: int) -> None:
        """Change the capacity of all buffers. A smaller one drops the slots with the lowest keys.

        The buffers are new tensors: a state dict that was taken before stays as it is, and a step
        that was captured in a CUDA graph has to be captured again.

        Args:
            capacity: The number of slots, an int >= 0.

        Raises:
            ValueError: The capacity is not an int >= 0. Nothing has been changed then.
        """
        (capacity,) = plain_options({"capacity": capacity}).values()
        check_capacity(capacity)
        self._flush()
        for group in self.param_groups:
            group["capacity"] = capacity
            for param in group["params"]:
                if "exp_avg" in self.state.get(param, {}):
                    resize_buffer(param, self.state[param], group)

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        state = super().__getstate__()
        dtypes = torch.float8_e4m3fn, torch.uint8
        slots = checkpoint.with_slots_viewed(state["state"], state["param_groups"], *dtypes)
        return {**state, "state": slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds an option that the constructor does not know.
        self.defaults.pop("differentiable", None)
        for name, value in checkpoint.NEWER_OPTIONS.items():
            self.defaults.setdefault(name, value)
        self._forget_plans()
        dtypes = torch.uint8, torch.float8_e4m3fn
        values = checkpoint.with_slots_viewed(self.state, self.param_groups, *dtypes)
        self.state = OptimizerState(dict, values)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
