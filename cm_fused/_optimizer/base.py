"""What AdamCM and AdamCG share: options, state and the dispatch of a step."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_
from types import FunctionType
from typing import Any, ClassVar, Protocol, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from cm_fused._backends.capture import check_not_captured_sharded, check_not_capturing, is_capturing
from cm_fused._backends.select import EAGER, Backend, select
from cm_fused._bucket import Bucket, BucketStep, step_options
from cm_fused._distributed import (
    Processes,
    is_sharded,
    local,
    local_grad,
    places_of,
    processes,
)
from cm_fused._optimizer.checkpointed import CheckpointedOptimizer
from cm_fused._optimizer.checks import (
    check_capturable,
    check_gradients,
    check_low_precision,
    check_no_duplicates,
    check_not_flattened,
    check_optimizer_option,
    check_options,
    check_partitioner,
    plain_options,
)
from cm_fused._optimizer.norms import GroupStep, Norms, PendingBooks, scaled, step_all_
from cm_fused._optimizer.plan import Plan, one_call_checks
from cm_fused._optimizer.undo import Undo
from cm_fused._state import making as _state
from cm_fused._state.tracking import OptimizerState


class Release(Protocol):
    """Steps an optimizer's parameters inside backward; `enable_gradient_release` makes it."""

    def _check_groups(self, groups: list[dict[str, Any]]) -> None: ...

    def _follow_groups(self) -> None: ...


class CriticalAdam(CheckpointedOptimizer):
    """Base of the optimizers; holds no arithmetic. See `AdamCM` for the arguments."""

    _critical_gradients: ClassVar[bool]
    # What steps the parameters inside backward: belongs to the process, never copied.
    _release: Release | None = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Give the class a constructor of its own, whose errors name it and not its base."""
        super().__init_subclass__(**arguments)
        if "__init__" in cls.__dict__:
            return
        base = cls.__init__
        if not isinstance(base, FunctionType):  # of a base that is not Python's
            return
        own = FunctionType(
            base.__code__, base.__globals__, "__init__", base.__defaults__, base.__closure__
        )
        own.__dict__.update(base.__dict__)
        own.__doc__, own.__module__ = base.__doc__, cls.__module__
        own.__annotations__ = base.__annotations__
        own.__kwdefaults__ = base.__kwdefaults__
        own.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.__init__ = own  # type: ignore[method-assign]

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
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
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
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "amp_scaling": amp_scaling,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "backend": backend,
        }
        defaults = plain_options(defaults)
        check_options(defaults)
        super().__init__(params, defaults)
        self.state = OptimizerState()
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Have nothing prepared for the next step."""
        # The last step's plan for each group.
        self._plans: dict[int, Plan] = {}
        # The plans of captured graphs, which go on using what their buckets hold.
        self._captured_plans: list[Plan] = []
        # Of a step whose norms other processes are still adding to.
        self._pending_books: PendingBooks | None = None
        # The parameters when it was last asked what processes they are sharded among, and those.
        self._processes: tuple[list[Tensor], Processes | None] = ([], None)
        # The plans of parameters that are stepped inside backward, by parameter.
        self._plans_alone: dict[int, Plan] = {}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler` asks: whether a step unscales, and skips where it must."""
        amp_scaling: bool = self.defaults["amp_scaling"]
        return amp_scaling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: "params" and any of the constructor's options.

        Raises:
            ValueError: An option is out of its range, or asks for low-precision state of float64 or
                complex parameters, or a parameter is a shard of FSDP1; nothing is added.
            RuntimeError: The requested backend, or gradient release, cannot serve the parameters;
                nothing is added.
        """
        if isinstance(param_group, dict):
            options = plain_options(
                {name: value for name, value in param_group.items() if name != "params"}
            )
            check_options({**self.defaults, **options})
            check_partitioner({**self.defaults, **options})
            check_optimizer_option("amp_scaling", options, self.defaults)
            param_group.update(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_not_flattened(len(self.param_groups) - 1, group, ValueError)
            check_low_precision(group)
            for device in {param.device for param in group["params"]}:
                if group["backend"] is not None:
                    select(group["backend"], device)
            if self._release is not None:
                self._release._follow_groups()
        except BaseException:
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
                device, or a parameter is a shard of FSDP1. Nothing has been changed then.
        """
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            return loss
        self._finish_step()
        # All that can fail comes first, for every group.
        kept = self._kept_plans()
        lacking = [g for g, plan in zip(self.param_groups, kept, strict=True) if plan is None]
        made = self._make_state(lacking) if lacking else []
        try:
            plans = [
                plan or self._new_plan(group, first)
                for (group, first), plan in zip(self._groups_and_firsts(), kept, strict=True)
            ]
            self._take_steps(plans)
        except BaseException as error:
            self._unmake_state(made)
            if isinstance(error, RuntimeError):
                self._check(kept)  # which names the group and the parameter
            raise
        self._plans = dict(enumerate(plans))
        for plan in plans:
            plan.drop_gradients()
        for group, plan in zip(self.param_groups, plans, strict=True):
            if group["capturable"] and any(
                is_capturing(bucket.params[0].device) for _, bucket in plan.buckets
            ):
                self._captured_plans.append(plan)
        return loss

    @torch.no_grad()
    def _step_alone(self, index: int, position: int) -> None:
        """Step one parameter, which is a priority scope of its own, if it has a gradient.

        Args:
            index: Of its group.
            position: Of the parameter in the group.
        """
        group = self.param_groups[index]
        param = group["params"][position]
        alone = {**group, "params": [param]}
        check_gradients(index, [param], position)
        made = []
        first = position + sum(len(group["params"]) for group in self.param_groups[:index])
        plan = self._plans_alone.get(id(param))
        if plan is not None and plan.holds_for(self.state, alone, first, self._participants(alone)):
            self._check_state(param)
            plan.take_gradients()
        else:
            plan = None
            made = self._make_state([alone])
        try:
            plan = plan or self._new_plan(alone, first)
            with Undo([], plan.buckets):
                self._step_groups([self._group_step(alone, plan, first=0)], None)
        except BaseException:
            self._unmake_state(made)
            raise
        self._plans_alone[id(param)] = plan
        plan.drop_gradients()

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._release is not None:
            self._release._check_groups(groups)

    def _finish_step(self) -> None:
        """Keep the books of the last step, where they were left for the norms' sum."""
        if self._pending_books is not None:
            self._pending_books.keep_()
            self._pending_books = None

    def _take_steps(self, plans: list[Plan]) -> None:
        """Take the steps of all groups, all of them or none."""
        if torch.compiler.is_compiling():
            self._step_groups(*self._prepared_steps(plans))
            return
        with Undo(self.param_groups, chain.from_iterable(plan.buckets for plan in plans)):
            self._step_groups(*self._prepared_steps(plans))

    def _prepared_steps(self, plans: list[Plan]) -> tuple[list[GroupStep], Processes | None]:
        """Return each group's step and the processes it is sharded among."""
        steps = [
            self._group_step(group, plan, first)
            for (group, first), plan in zip(self._groups_and_firsts(), plans, strict=True)
        ]
        among = self._sharded_among()
        if among is not None:
            check_not_captured_sharded(among.device)
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        return scaled(steps, among, grad_scale, found_inf), among

    def _groups_and_firsts(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield every param group, and its first parameter's place among the optimizer's."""
        first = 0
        for group in self.param_groups:
            yield group, first
            first += len(group["params"])

    def _group_step(self, group: dict[str, Any], plan: Plan, first: int) -> GroupStep:
        critical_gradients = self._stores_gradients(group)
        count = len(group["params"])
        return GroupStep(group, step_options(group), critical_gradients, plan.buckets, first, count)

    def _step_groups(self, steps: list[GroupStep], among: Processes | None) -> None:
        """Take the steps of all groups: the first change, after all that can be wrong."""
        if among is not None and not self._critical_gradients:
            # While the norms are added up over processes the next backward may begin.
            summing = Norms(steps, among, _update_cm_)
            self._pending_books = PendingBooks(steps, summing)
            return
        norms: Norms | None = None
        if among is not None or not all(map(GroupStep.is_alone, steps)):
            norms = Norms(steps, among, _sq_norms)
        step_all_(chain.from_iterable(step.on_buckets(norms) for step in steps))

    def _sharded_among(self) -> Processes | None:
        params = [param for group in self.param_groups for param in group["params"]]
        if torch.compiler.is_compiling():
            return processes(params)
        known, found = self._processes
        if len(known) != len(params) or not all(map(is_, known, params)):
            found = processes(params)
            self._processes = params, found
        return found

    def _kept_plans(self) -> list[Plan | None]:
        """Check all gradients; return the last step's plan of each group, where it serves again."""
        plans = [
            self._kept_plan(i, group, first)
            for i, (group, first) in enumerate(self._groups_and_firsts())
        ]
        if not one_call_checks(plans):
            self._check(plans)
        for plan in plans:
            if plan is not None:
                plan.take_gradients()
        return plans

    def _kept_plan(self, index: int, group: dict[str, Any], first: int) -> Plan | None:
        # A plan may end in an operator whose schema does not name all it changes.
        plan = None if torch.compiler.is_compiling() else self._plans.get(index)
        if plan is None:
            return None
        if not plan.holds_for(self.state, group, first, self._participants(group)):
            return None
        for backend, bucket in plan.buckets:
            if bucket.handle is None:
                bucket.handle = backend.hold(bucket)
        return plan

    def _check(self, plans: list[Plan | None]) -> None:
        """Check all gradients, and parameters against the state of plans that serve again."""
        for i, (group, plan) in enumerate(zip(self.param_groups, plans, strict=True)):
            # A model may have been wrapped since the group was added.
            check_not_flattened(i, group)
            check_gradients(i, group["params"])
            if plan is not None:
                for param in self._participants(group):
                    self._check_state(param)
            elif group["capturable"]:
                check_capturable(self._participants(group))
        if None in plans:
            check_no_duplicates(self.param_groups)

    def _check_states(self) -> None:
        """Check that the state of every parameter fits it."""
        for param in self.state:
            if isinstance(param, Tensor):
                self._check_state(param)

    def _check_state(self, param: Tensor) -> None:
        with self._naming(param):
            _state.check_param(local(param), _state.local_state(self.state[param]))

    def _make_state(self, groups: list[dict[str, Any]]) -> list[tuple[Tensor, _state.State]]:
        """Make the state that the participants of these groups lack, all of it or none.

        Returns:
            What was made, for `_unmake_state`.
        """
        missing = []
        for group in groups:
            for param, keys in self._participants_and_keys(group):
                with self._naming(param):
                    state = self.state.get(param, {})
                    missing.append((param, _state.missing_state_of(param, state, keys, group)))
        for param, tensors in missing:
            if tensors:
                check_not_capturing(param.device)
        made = [(param, tensors) for param, tensors in missing if tensors]
        for param, tensors in made:
            self.state[param].update(tensors)
        return made

    @contextlib.contextmanager
    def _naming(self, param: Tensor) -> Iterator[None]:
        """Have errors about a parameter say which one it is."""
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # running out of a device's memory, for one
                raise
            raise RuntimeError(f"{self._name_of(param)}: {error}") from error

    def _name_of(self, param: Tensor) -> str:
        """Return a parameter's place among the groups, and its names where it has such."""
        for i, group in enumerate(self.param_groups):
            for j, member in enumerate(group["params"]):
                if member is param:
                    names = [group["name"]] if "name" in group else []
                    names += group.get("param_names", [])[j : j + 1]
                    name = f" ({', '.join(map(repr, names))})" if names else ""
                    return f"parameter {j} of group {i}{name}"
        return "a parameter of no group"

    def _unmake_state(self, made: list[tuple[Tensor, _state.State]]) -> None:
        """Take away what `_make_state` made and no step has used, after one that failed."""
        for param, tensors in made:
            if "step" not in tensors or local(tensors["step"]) > 0:
                continue
            self._drop_state(param, tensors)

    def _drop_state(self, param: Tensor, keys: Iterable[str]) -> None:
        """Take away some of a parameter's state."""
        for key in keys:
            self.state[param].pop(key, None)
        if not self.state[param]:
            del self.state[param]

    def _participants(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the parameters of a group that this step is to step."""
        return [param for param in group["params"] if param.grad is not None]

    def _stores_gradients(self, group: dict[str, Any]) -> bool:
        """Return whether the buffers of a group hold gradients, else momenta."""
        return self._critical_gradients

    def _participants_and_keys(
        self, group: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        for param in self._participants(group):
            yield param, self._state_keys(group, select(group["backend"], param.device))

    def _state_keys(self, group: dict[str, Any], backend: Backend) -> tuple[str, ...]:
        slot_bytes = (group["buffer_dtype"] or torch.float32).itemsize
        extra_keys = backend.state_keys(
            self._stores_gradients(group), group["capacity"], slot_bytes
        )
        return (*_state.required_keys(group), *extra_keys)

    def _new_plan(self, group: dict[str, Any], first: int) -> Plan:
        params = self._participants(group)
        buckets = []
        for device in dict.fromkeys(param.device for param in params):
            backend = select(group["backend"], device)
            on_device = [param for param in params if param.device == device]
            buckets.append((backend, self._bucket(group, backend, on_device)))
        buckets.sort(key=lambda pair: pair[0] is not EAGER)
        return Plan(buckets, params, group, first, self.state)

    def _bucket(self, group: dict[str, Any], backend: Backend, params: list[Tensor]) -> Bucket:
        """Gather the tensors of one bucket, whose state is there."""
        grads = [local_grad(param) for param in params]
        states = [_state.local_state(self.state[param]) for param in params]
        keys = self._state_keys(group, backend)
        _state.drop_derived([self.state[param] for param in params], keys)
        lists = _state.lists(states, keys)
        indices = self._indices(params)
        places = _element_places(params, lists["exp_avgs"], group)
        params = [local(param) for param in params]
        if any(map(torch.is_complex, params)):
            if torch.compiler.is_compiling() and backend is not EAGER:
                # A graph cannot give an operator that changes it a complex input as pairs of reals.
                torch._dynamo.graph_break("complex parameters are compiled by backend='eager'")
            params = [_state.as_real(param) for param in params]
            # Autograd leaves the conjugation of a complex gradient to whoever reads it.
            grads = [_state.as_real(grad.resolve_conj()) for grad in grads]
            lists = {name: [_state.as_real(t) for t in tensors] for name, tensors in lists.items()}
        return Bucket(params, grads, **lists, param_indices=indices, element_places=places)

    def _indices(self, params: list[Tensor]) -> list[int]:
        """Return the places of parameters among all of the optimizer's."""
        all_params = chain.from_iterable(group["params"] for group in self.param_groups)
        places = {id(param): index for index, param in enumerate(all_params)}
        return [places[id(param)] for param in params]

    def __repr__(self) -> str:
        active = ", ".join(
            dict.fromkeys(
                _active_backend(group["backend"], param.device)
                for group in self.param_groups
                for param in group["params"]
            )
        )
        return f"{super().__repr__()[:-1]}Active backends: {active}\n)"


def _update_cm_(backend: Backend, steps: list[BucketStep]) -> list[Tensor]:
    return backend.update_cm_(steps)


def _sq_norms(backend: Backend, steps: list[BucketStep]) -> list[Tensor]:
    return [backend.sq_norms(step.bucket, step.options) for step in steps]


def _element_places(
    params: list[Tensor], exp_avgs: list[Tensor], group: dict[str, Any]
) -> list[int]:
    """Return the `element_places` of a bucket, which only random words need."""
    rounds = group["moment_dtype"] in (torch.bfloat16, torch.int8)
    if not (rounds or group["low_precision_update"] == "stochastic"):
        return []
    if not any(map(is_sharded, params)):
        return []
    return list(chain.from_iterable(map(places_of, params, exp_avgs)))


def _active_backend(requested: str | None, device: torch.device) -> str:
    try:
        return select(requested, device).describe(device)
    except RuntimeError:
        return f"none on {device.type}, where {requested!r} cannot serve"


def _check_graph_capture(optimizer: Optimizer) -> None:
    """Call torch's check that a captured step is capturable, by its name in this release."""
    if hasattr(optimizer, "_accelerator_graph_capture_health_check"):
        optimizer._accelerator_graph_capture_health_check()
    else:
        optimizer._cuda_graph_capture_health_check()
