"""What AdamCM and AdamCG share: options, state, checkpoints and the dispatch of a step."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from cm_fused import _checkpoint, _state
from cm_fused._backend import Backend, select
from cm_fused._bucket import Bucket, StepOptions
from cm_fused._capture import check_not_capturing, is_capturing
from cm_fused._checks import check_capturable, check_gradients, check_low_precision, check_options
from cm_fused._plan import Plan


class CriticalAdam(Optimizer):
    """Base of the optimizers; holds no arithmetic. See `AdamCM` for the arguments."""

    _critical_gradients: ClassVar[bool]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        capacity: int = 5,
        priority_decay: float = 0.7,
        priority_scope: str = "group",
        buffer_mean: str = "capacity",
        eps_inside_sqrt: bool = True,
        buffer_dtype: torch.dtype | None = None,
        moment_dtype: torch.dtype | None = None,
        low_precision_update: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "capacity": capacity,
            "priority_decay": priority_decay,
            "priority_scope": priority_scope,
            "buffer_mean": buffer_mean,
            "eps_inside_sqrt": eps_inside_sqrt,
            "buffer_dtype": buffer_dtype,
            "moment_dtype": moment_dtype,
            "low_precision_update": low_precision_update,
            "seed": seed,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "backend": backend,
        }
        check_options(defaults)
        super().__init__(params, defaults)
        self.state = _state.OptimizerState()
        # The last step's plan for each group.
        self._plans: dict[int, Plan] = {}
        # The plans of captured graphs, which go on using what their buckets hold.
        self._captured_plans: list[Plan] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: "params" and any of the constructor's options.

        Raises:
            ValueError: An option is out of its range, or asks for low-precision state of float64 or
                complex parameters; nothing is added.
            RuntimeError: The requested backend cannot serve the parameters; nothing is added.
        """
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_low_precision(group)
            for device in {param.device for param in group["params"]}:
                if group["backend"] is not None:
                    select(group["backend"], device)
        except (RuntimeError, ValueError):
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step for every parameter that has a gradient.

        Args:
            closure: Called once, with gradients enabled, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or differs from its parameter in shape, dtype or
                device. Nothing has been changed then.
        """
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All that can fail comes first, for every group.
        kept = [self._kept_plan(i, group) for i, group in enumerate(self.param_groups)]
        if None in kept:
            self._make_state(
                [g for g, plan in zip(self.param_groups, kept, strict=True) if plan is None]
            )
        for i, (group, plan) in enumerate(zip(self.param_groups, kept, strict=True)):
            if plan is None:
                self._plans[i] = plan = self._new_plan(group)
            self._step_group(group, plan.buckets)
            if group["capturable"] and any(
                is_capturing(b.params[0].device) for _, b in plan.buckets
            ):
                self._captured_plans.append(plan)
        return loss

    def _kept_plan(self, index: int, group: dict[str, Any]) -> Plan | None:
        """Check a group's gradients; return the last step's plan if it serves again."""
        params = _participants(group)
        # A plan may end in an operator whose schema does not name all it changes.
        plan = None if torch.compiler.is_compiling() else self._plans.get(index)
        if plan is None or not plan.holds_for(self.state, group, params):
            check_gradients(index, group["params"])
            if group["capturable"]:
                check_capturable(params)
            return None
        for backend, bucket in plan.buckets:
            if bucket.handle is None:
                bucket.handle = backend.hold(bucket)
        if not plan.checks_lists() or len(self.param_groups) > 1:
            # Else the only call of this step checks them before it changes anything.
            check_gradients(index, group["params"])
            for param in params:
                _state.check_param(param, self.state[param])
        plan.take_gradients()
        return plan

    def _make_state(self, groups: list[dict[str, Any]]) -> None:
        """Make the state that the participants of these groups lack, all of it or none."""
        missing = [
            (param, _state.missing_state(param, self.state.get(param, {}), keys, group))
            for group in groups
            for param, keys in self._participants_and_keys(group)
        ]
        for param, tensors in missing:
            if tensors:
                check_not_capturing(param.device)
        for param, tensors in missing:
            if tensors:
                self.state[param].update(tensors)

    def _participants_and_keys(
        self, group: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        for param in _participants(group):
            yield param, self._state_keys(group, select(group["backend"], param.device))

    def _state_keys(self, group: dict[str, Any], backend: Backend) -> tuple[str, ...]:
        slot_bytes = (group["buffer_dtype"] or torch.float32).itemsize
        extra_keys = backend.state_keys(self._critical_gradients, group["capacity"], slot_bytes)
        return (*_state.required_keys(group), *extra_keys)

    def _new_plan(self, group: dict[str, Any]) -> Plan:
        params = _participants(group)
        buckets = []
        for device in dict.fromkeys(param.device for param in params):
            backend = select(group["backend"], device)
            on_device = [param for param in params if param.device == device]
            buckets.append((backend, self._bucket(group, backend, on_device)))
        return Plan(buckets, params, group, self.state)

    def _bucket(self, group: dict[str, Any], backend: Backend, params: list[Tensor]) -> Bucket:
        """Gather the tensors of one bucket, whose state is there."""
        grads = [cast(Tensor, param.grad) for param in params]
        states = [self.state[param] for param in params]
        _state.drop_derived(states, self._state_keys(group, backend))
        lists = _state.lists(states, self._state_keys(group, backend))
        indices = self._indices(params)
        if any(map(torch.is_complex, params)):
            params = [_state.as_real(param) for param in params]
            grads = [_state.as_real(grad) for grad in grads]
            lists = {name: [_state.as_real(t) for t in tensors] for name, tensors in lists.items()}
        return Bucket(params, grads, **lists, param_indices=indices)

    def _indices(self, params: list[Tensor]) -> list[int]:
        """Return the places of parameters among all of the optimizer's."""
        all_params = chain.from_iterable(group["params"] for group in self.param_groups)
        places = {id(param): index for index, param in enumerate(all_params)}
        return [places[id(param)] for param in params]

    def _step_group(self, group: dict[str, Any], buckets: list[tuple[Backend, Bucket]]) -> None:
        options = _step_options(group)
        sq_norm = None
        if options.priority_scope == "group" and len(buckets) > 1:
            sq_norm = _sum_over_devices(
                [backend.sq_norm(bucket, options) for backend, bucket in buckets]
            )
        for backend, bucket in buckets:
            step_ = backend.adam_cg_ if self._critical_gradients else backend.adam_cm_
            on_device = None
            if sq_norm is not None:
                on_device = sq_norm.to(bucket.steps[0].device, non_blocking=True)
            step_(bucket, options, on_device)
            # A plan that is kept must not keep gradients alive.
            bucket.grads = []

    def state_dict(self) -> StateDict:
        """Return the state as `torch.optim.Optimizer.state_dict`, with every commit made.

        The tensors are references, not copies. The choice of a backend is not saved.
        """
        _state.commit_pending(_state.param_states(self.state))
        # The first of the hooks, so that all others see what the caller gets.
        saved_form = self.register_state_dict_post_hook(_checkpoint.saved_form, prepend=True)
        try:
            return super().state_dict()
        finally:
            saved_form.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of any backend, or one of torch.optim.Adam or AdamW (buffer empty).

        Float32 state of half-precision parameters stays float32. `buffer_dtype` and `moment_dtype`
        stay this optimizer's: state of another precision is rounded to nearest, with a warning.
        Options the state dict lacks keep their values. The values are copied; `state_dict` is not
        changed.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: Groups, shapes or capacity do not match. Nothing has been changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hooked = pre_hook(self, state_dict)
            if hooked is not None:
                state_dict = hooked
        saved_groups = state_dict["param_groups"]
        groups = _checkpoint.loaded_groups(self.param_groups, saved_groups)
        state = _checkpoint.loaded_state(groups, state_dict)
        _checkpoint.warn_of_conversion(groups, saved_groups)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        _state.commit_pending(_state.param_states(self.state))
        state = super().__getstate__()
        return {**state, "state": _checkpoint.saved_state(state["state"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch adds an option that the constructor does not know.
        self.defaults.pop("differentiable", None)
        self._plans = {}
        self._captured_plans = []
        self.state = _state.OptimizerState(dict, self.state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __repr__(self) -> str:
        active = ", ".join(
            dict.fromkeys(
                _active_backend(group["backend"], param.device)
                for group in self.param_groups
                for param in group["params"]
            )
        )
        return f"{super().__repr__()[:-1]}Active backends: {active}\n)"


def _active_backend(requested: str | None, device: torch.device) -> str:
    try:
        return select(requested, device).describe(device)
    except RuntimeError:
        return f"none on {device.type}, where {requested!r} cannot serve"


def _sum_over_devices(sq_norms: list[Tensor]) -> Tensor:
    """Return the sum of the buckets' norms: on an accelerator, which is not waited for, or the CPU.

    A CPU among the devices needs the sum, and has to wait for it.
    """
    devices = [sq_norm.device for sq_norm in sq_norms]
    home = next((device for device in devices if device.type == "cpu"), devices[0])
    return torch.stack([sq_norm.to(home) for sq_norm in sq_norms]).sum()


def _check_graph_capture(optimizer: Optimizer) -> None:
    """Call torch's check that a captured step is capturable, by its name in this release."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (newer or optimizer._cuda_graph_capture_health_check)()


def _step_options(group: dict[str, Any]) -> StepOptions:
    beta1, beta2 = group["betas"]
    return StepOptions(
        lr=group["lr"],
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        priority_decay=group["priority_decay"],
        priority_scope=group["priority_scope"],
        buffer_mean=group["buffer_mean"],
        eps_inside_sqrt=group["eps_inside_sqrt"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        low_precision_update=group["low_precision_update"],
        seed=group["seed"],
    )


def _participants(group: dict[str, Any]) -> list[Tensor]:
    return [param for param in group["params"] if param.grad is not None]


class DecoupledCriticalAdam(CriticalAdam):
    """The defaults of the decoupled forms, as AdamW's to Adam. See `AdamCM` for the arguments."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        capacity: int = 5,
        priority_decay: float = 0.7,
        priority_scope: str = "group",
        buffer_mean: str = "capacity",
        eps_inside_sqrt: bool = True,
        buffer_dtype: torch.dtype | None = None,
        moment_dtype: torch.dtype | None = None,
        low_precision_update: str = "nearest",
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            capacity=capacity,
            priority_decay=priority_decay,
            priority_scope=priority_scope,
            buffer_mean=buffer_mean,
            eps_inside_sqrt=eps_inside_sqrt,
            buffer_dtype=buffer_dtype,
            moment_dtype=moment_dtype,
            low_precision_update=low_precision_update,
            seed=seed,
            maximize=maximize,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
            backend=backend,
        )
