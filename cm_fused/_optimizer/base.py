"""The part that AdamCM and AdamCG share: options and the dispatch of a step."""

from collections.abc import Callable, Mapping, Set
from types import FunctionType
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from cm_fused._backends import traced
from cm_fused._backends.capture import check_not_captured_sharded
from cm_fused._backends.eager import Undo
from cm_fused._backends.select import select_for
from cm_fused._distributed import Processes, is_sharded
from cm_fused._optimizer import checks, norms, tensor_checks
from cm_fused._optimizer.plan import Groups, Plan
from cm_fused._optimizer.plan_cache import Plans
from cm_fused._optimizer.planned import PlannedOptimizer
from cm_fused._state.table import State
from cm_fused._state.tracking import OptimizerState


class CriticalAdam(PlannedOptimizer):
    """Base of the optimizers; holds no arithmetic. See `AdamCM` for the arguments."""

    # For `cm_fused.compat`: ids of parameters that take no part although they have gradients.
    _waiting: Set[int] = frozenset()
    # Likewise: options of its own, with their defaults.
    _own_defaults: Mapping[str, Any] = {}

    def __init_subclass__(cls, defaults: dict[str, Any] | None = None, **arguments: Any) -> None:
        """Give the class a constructor of its own, whose errors name it and not its base.

        `defaults` has those arguments of the constructor whose defaults are not the base's.
        """
        super().__init_subclass__(**arguments)
        if "__init__" in cls.__dict__:
            return
        base = cls.__init__
        if not isinstance(base, FunctionType):  # it is not written in Python
            return
        own = FunctionType(
            base.__code__, base.__globals__, "__init__", base.__defaults__, base.__closure__
        )
        own.__dict__.update(base.__dict__)
        own.__doc__, own.__module__ = base.__doc__, cls.__module__
        own.__annotations__ = base.__annotations__
        own.__kwdefaults__ = base.__kwdefaults__
        own.__qualname__ = f"{cls.__qualname__}.__init__"
        if defaults is not None:
            values = base.__defaults__ or ()
            names = base.__code__.co_varnames[: base.__code__.co_argcount][-len(values) :]
            pairs = zip(names, values, strict=True)
            own.__defaults__ = tuple(defaults.get(name, value) for name, value in pairs)
            keywords = base.__kwdefaults__ or {}
            own.__kwdefaults__ = {name: defaults.get(name, keywords[name]) for name in keywords}
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
        buffer_dtype: torch.dtype | str | None = None,
        moment_dtype: torch.dtype | str | None = None,
        low_precision_update: str = "nearest",
        seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        adjust_lr_fn: str | None = None,
        backend: str | None = None,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        # Before any other name is set, these are the arguments and what every method has.
        arguments = dict(locals())
        for name in ("self", "params", "__class__"):
            del arguments[name]
        defaults = checks.plain_options(arguments)
        checks.check_options(defaults)
        super().__init__(params, {**defaults, **self._own_defaults})
        self.state = OptimizerState()
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Drop all that is prepared for later steps."""
        self._plans = Plans()
        # The plans of captured steps: the graphs go on using the tensors of their buckets.
        self._captured_plans: list[Plan] = []
        # A step whose norms are still being summed over processes: its plan, the sums, the work.
        self._pending: tuple[Plan, Tensor, Any] | None = None
        # What compiled steps have prepared, for good: its number is in their code.
        if "_traced_batches" not in vars(self):
            self._traced_batches = traced.Batches()
        # The plans of parameters that are stepped inside backward, by the parameter's id, each with
        # the parameter's index among the optimizer's.
        self._single_plans: dict[int, tuple[Plans, int]] = {}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell `torch.amp.GradScaler` whether a step unscales, and skips where it must."""
        amp_scaling: bool = self.defaults["amp_scaling"]
        return amp_scaling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: "params" and any of the constructor's options.

        Raises:
            ValueError: An option is out of its range, or asks for low-precision state of float64 or
                complex parameters, or for scales of tensors that wrap others, or a parameter is a
                shard of FSDP1; nothing is added.
            RuntimeError: The requested backend, or gradient release, cannot serve the parameters;
                nothing is added.
        """
        if isinstance(param_group, dict):
            options = checks.plain_options(
                {name: value for name, value in param_group.items() if name != "params"}
            )
            merged = {**self.defaults, **options}
            checks.check_options(merged)
            checks.check_partitioner(merged)
            checks.check_amp_scaling(merged["amp_scaling"], self.defaults["amp_scaling"])
            param_group.update(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            tensor_checks.check_not_flattened(len(self.param_groups) - 1, group, ValueError)
            tensor_checks.check_low_precision(group)
            tensor_checks.check_wrappers(len(self.param_groups) - 1, group)
            if group["backend"] is not None or group["fused"]:
                for param in {param.device: param for param in group["params"]}.values():
                    select_for(group, param)
            if self._release is not None:
                self._release._follow_groups()
        except BaseException:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step for every parameter that has a gradient.

        Args:
            closure: Called once, with gradients enabled, before the step.

        Returns:
            The loss that the closure returned, or None.

        Raises:
            RuntimeError: A gradient is sparse, or differs from its parameter in shape, dtype
                (except for half precision of float32) or device, or a parameter is a shard of
                FSDP1. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:  # the parameters have been stepped inside backward
            return loss
        if torch.compiler.is_compiling():
            with torch.no_grad():
                self._traced_step()
            return loss
        # As torch.no_grad does, which would cost five Python calls a step.
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if self._pending is not None:
                self._finish_step()
            self._take_step(self._plans, self.param_groups)
        finally:
            torch._C._set_grad_enabled(grad_enabled)
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the last step's gradients, float64 (); nothing waits for a device.

        The step has computed it for its keys: this adds up a few numbers and reads no gradient.
        It is over all param groups and, with DTensors, all processes, whatever `priority_scope`:
        the key of scope "group" is the norm over one group, keys of scope "tensor" are those of
        each parameter.

        With `max_grad_norm` or `skip_nonfinite` it is the norm before clipping, as
        `torch.nn.utils.clip_grad_norm_` returns it. Else weight decay that is an L2 term counts,
        as it does in the keys. Gradients of a `torch.amp.GradScaler` with `amp_scaling` are
        unscaled.

        0 after a step without gradients. NaN before the first step, after loading, after a step
        that failed, that `amp_scaling` skipped or that `torch.compile` traced. After each replay of
        a captured step it is that step's. With gradient release each parameter counts with its own
        last step; after one that failed the norm is NaN until that parameter is stepped again. With
        `capacity=0` there is no key to find it for: without `max_grad_norm` and `skip_nonfinite` it
        is NaN for critical gradients and, if no group has a buffer, for DTensors.
        """
        self._finish_step()
        every = [self._plans.last]
        if self._release is not None:
            every = [plans.last for plans, _ in self._single_plans.values()]
        last = [plan for plan in every if plan is not None]
        return norms.last_norm(last if len(last) == len(every) else [])

    def _take_step(self, plans: Plans, groups: Groups, first: int = 0) -> None:
        """Validate the cached plan or make a new one, and run it.

        `groups` are the param groups, or one with the one parameter that is stepped. `first` is the
        index of their first parameter among the optimizer's.
        """
        plan = cached = None
        new_state: list[tuple[Tensor, State]] = []
        plans.last = None  # until this step has been taken
        try:
            plan = cached = plans.find(groups, self.state, self._waiting)
            if plans.on_gpu:
                self._accelerator_graph_capture_health_check()
                if torch.cuda.is_current_stream_capturing():
                    checks.check_captured_lrs(groups)
            if plan is None:
                plan = self._new_plan(plans, groups, first, new_state)
            elif not plan.checks_itself:
                self._check(groups, plan)
            self._run(plan, plans, groups)
        except BaseException as error:
            self._remove_new_state(new_state)
            if isinstance(error, RuntimeError) and groups is self.param_groups:
                # An operator names an item of its lists; these checks name group and parameter.
                self._check(groups, cached)
            raise
        finally:
            plans.drop_gradients(plan)
        if cached is None:
            plans.add(plan, self.state)
        if plans.on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured_plans.append(plan)

    def _traced_step(self) -> None:
        """Take a step that torch.compile traces; no plan is kept."""
        params = [param for group in self.param_groups for param in group["params"]]
        is_eager = all(group["backend"] == "eager" for group in self.param_groups)
        if any(map(is_sharded, params)) or (not is_eager and any(map(torch.is_complex, params))):
            # A graph cannot have a sum over processes that ends in the next step, nor a complex
            # input that an operator changes as pairs of reals.
            self._untraced_step()
            return
        plans = Plans()
        plans.read(self.param_groups, self._waiting)
        self._plans.last = None
        plan = self._new_plan(plans, self.param_groups, 0, [])
        plan.batches_number = self._traced_batches.number
        self._run(plan, plans, self.param_groups)
        # Groups with a count of skipped steps have been changed, and are written back as a whole.
        for group, capturable in zip(self.param_groups, self._capturable(), strict=True):
            if group["skip_nonfinite"]:
                group["capturable"] = capturable

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _capturable(self) -> list[bool]:
        """Return `capturable` of each group, which is always True in what torch.compile traces."""
        return [group["capturable"] for group in self.param_groups]

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _untraced_step(self) -> None:
        with torch.no_grad():
            self._finish_step()
            self._take_step(self._plans, self.param_groups)

    @torch.no_grad()
    def _step_one(self, index: int, position: int) -> None:
        """Step one parameter as a priority scope of its own.

        `index` is its group's, `position` its own in the group.
        """
        group = self.param_groups[index]
        param = group["params"][position]
        tensor_checks.check_gradients(index, [param], position)
        if param in self.state:
            self._check_state(param)
        first = position + sum(len(group["params"]) for group in self.param_groups[:index])
        known = self._single_plans.get(id(param))
        if known is None or known[1] != first:
            known = self._single_plans[id(param)] = Plans(), first
        self._take_step(known[0], [{**group, "params": [param]}], first)

    def _forget_norm(self, param: Tensor) -> None:
        """Forget the norm of the last gradient of a parameter that is stepped inside backward."""
        if id(param) not in self._single_plans:
            self._single_plans[id(param)] = Plans(), -1  # which its first step replaces
        self._single_plans[id(param)][0].last = None

    def _finish_step(self) -> None:
        """Update the priorities of the last step, if they still wait for the sum of its norms."""
        if self._pending is None:
            return
        plan, sums, work = self._pending
        work.wait()
        norms.set_sq_norms(plan, sums)
        for backend, batch in plan.batches:
            backend.update_priorities_(batch)
        norms.clear_sq_norms(plan)
        self._pending = None

    def _run(self, plan: Plan, plans: Plans, groups: Groups) -> None:
        """Take a plan's step in all groups, or in none."""
        # torch.amp.GradScaler sets these for the length of a step.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        skipped: list[norms.SkippedSteps] = []
        plan.sums = plan.norm = None
        if not (plan.params or self._waiting):
            plan.norm = torch.zeros((), dtype=torch.float64, device="cpu")
        try:
            if plans.needs_norm or grad_scale is not None or found_inf is not None:
                norms.scale_(plan, groups, plans.processes, grad_scale, found_inf, skipped)
            if plan.has_eager and not plan.is_traced:
                with Undo(plan.eager_buckets()):
                    self._run_buckets(plan, groups, plans.processes)
            else:
                self._run_buckets(plan, groups, plans.processes)
        except BaseException:
            for count in skipped:
                count.restore()
            raise
        plans.last = plan

    def _run_buckets(self, plan: Plan, groups: Groups, among: Processes | None) -> None:
        if not any(group["capacity"] for group in groups):  # the same in all processes
            plan.run_()
            return
        if among is not None:
            check_not_captured_sharded(among.device)
            if not self._critical_gradients:
                # While the norms are added up over processes the next backward may begin.
                plan.sums = sums = norms.gathered(plan, norms.update_all_(plan), among)
                self._pending = plan, sums, among.start_sum(sums)
                return
        if among is not None or plan.divided:
            norms.set_scope_norms(plan, among)
        plan.run_()

    def __repr__(self) -> str:
        active = ", ".join(
            dict.fromkeys(
                _active_backend(group, param)
                for group in self.param_groups
                for param in group["params"]
            )
        )
        return f"{super().__repr__()[:-1]}Active backends: {active}\n)"


def _active_backend(group: dict[str, Any], param: Tensor) -> str:
    try:
        return select_for(group, param).describe(param.device)
    except RuntimeError:
        requested = "fused=True" if group["backend"] is None else repr(group["backend"])
        return f"none on {param.device.type}, where {requested} cannot serve"
