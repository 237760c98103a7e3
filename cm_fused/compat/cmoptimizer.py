"""`Adam_CM` and `Adam_C` of the research package, on cm_fused's backends.

They take that package's arguments and follow its trajectory. It differs from that of the paper
(Malviya et al.) and of `cm_fused.AdamCM`:

1. The buffer's mean is over its filled slots, eps is outside of the root, and with `synced` the key
   is the sum of the tensors' norms instead of the norm of them all.
2. A parameter's first step of `Adam_CM` only stores its gradient in the buffer, with its key. The
   moments stay zero, so that the second step divides a whole gradient by the root of a second
   moment with one entry: it moves every coordinate by several lr.
3. `Adam_CM` decays weights as AdamW does; `Adam_C` adds an L2 term to the aggregate, which neither
   keys nor buffer have.

The package's faults are gone: checkpoints resume (its own too: `convert_state_dict`), `kappa=0` is
AdamW (`Adam_C`: Adam), bad hyperparameters raise, nothing waits for the device, no generator of
NumPy's is used. A key that is not finite is not admitted, sums are float32 whatever `buffer_dtype`,
and a slot chosen by chance (`critical_test`) is replaced as one of key 0: a gradient of zeros does
not take it, and of several slots of key 0 the first one is replaced.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from cm_fused import reference
from cm_fused._backends.eager import Undo
from cm_fused._backends.flush import as_real
from cm_fused._backends.select import select_for
from cm_fused._bucket import Bucket, StepOptions, step_options
from cm_fused._devices import to_device
from cm_fused._distributed import Processes, is_sharded, local_grad
from cm_fused._optimizer.ascent import stacked
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._optimizer.checks import IN_UNIT_INTERVAL, NOT_NEGATIVE, check_number
from cm_fused._optimizer.norms import sq_norms_of_buckets
from cm_fused._optimizer.plan import Groups, Member, Plan, view_as_real_
from cm_fused._optimizer.plan_cache import Plans
from cm_fused._state import access
from cm_fused._state.tracking import OptimizerState
from cm_fused.compat._cmoptimizer_checkpoint import convert_state_dict, read_checkpoint, translated
from cm_fused.philox import random_words

__all__ = ["Adam_C", "Adam_CM", "convert_state_dict", "read_checkpoint"]

# The parameters that get new state, with its keys.
_Made = list[tuple[Tensor, Iterable[str]]]


class _ResearchAdam(CriticalAdam):
    """Base of both optimizers; see `Adam_CM` for the arguments."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 0.7,
        kappa: float = 1.0,
        topC: int = 5,  # noqa: N803
        weight_decay: float = 0,
        amsgrad: bool = False,
        critical_test: float = 0.0,
        synced: bool = True,
        buffer_dtype: torch.dtype | str | None = None,
    ) -> None:
        _check(kappa, critical_test, topC)
        self._own_defaults = {"kappa": kappa, "critical_test": critical_test}
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            capacity=topC,
            priority_decay=decay,
            priority_scope="group" if synced else "tensor",
            buffer_mean="size",
            eps_inside_sqrt=False,
            buffer_dtype=buffer_dtype,
            decoupled_weight_decay=not self._critical_gradients,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, whose options may have either package's names.

        Raises:
            ValueError: An option is out of its range or a parameter a DTensor; nothing is added.
        """
        if isinstance(param_group, dict):
            group = translated(param_group)
            merged = {**self.defaults, **group}
            _check(merged["kappa"], merged["critical_test"], merged["capacity"])
            if not merged["kappa"]:
                group["capacity"] = 1  # the slot stays empty
            param_group.clear()
            param_group.update(group)
        super().add_param_group(param_group)
        if any(map(is_sharded, self.param_groups[-1]["params"])):
            self.param_groups.pop()
            raise ValueError(
                "params must not be DTensors, which cm_fused.compat does not step, got one; shard "
                "with cm_fused.AdamCM"
            )

    def _stores_gradients(self, group: dict[str, Any]) -> bool:
        # Without a buffer, critical gradients are Adam; critical momenta have a second moment of m.
        return self._critical_gradients or not group["kappa"]

    @property
    def _waiting(self) -> set[int]:  # type: ignore[override]
        """The ids of parameters whose first step only stores their gradient."""
        started = self._started()
        return {
            id(param)
            for group in self.param_groups
            if not self._stores_gradients(group)
            for param in group["params"]
            if id(param) not in started
        }

    def _take_step(self, plans: Plans, groups: Groups, first: int = 0) -> None:
        kinds = [self._stores_gradients(group) for group in groups]
        if kinds != plans.kinds:
            plans.forget()
            plans.kinds = kinds
        super()._take_step(plans, groups, first)

    def _run_buckets(self, plan: Plan, groups: Groups, among: Processes | None) -> None:
        if groups is self.param_groups and any(map(self._first_timers, groups)):
            self._check(groups, None)
        # Little is prepared here. It is undone where it or the steps fail.
        made: _Made = []
        try:
            with Undo([]) as undo:
                self._prepare_(plan, groups, undo, made)
                # From here on it is known which slot changes.
                with Undo(plan.eager_buckets()):
                    plan.run_()
        except BaseException:
            for param, keys in made:
                self._drop_state(param, keys)
            raise

    def _prepare_(self, plan: Plan, groups: Groups, undo: Undo, made: _Made) -> None:
        """Choose slots by chance and take first steps; give the buckets their options and norms."""
        plan.options = None
        for index, group in enumerate(groups):
            grad_factor, found_inf = plan.scalars[index] if plan.scalars else (None, None)
            options = step_options(group)._replace(
                l2_in_aggregate=self._critical_gradients,
                sum_of_norms=True,
                grad_factor=grad_factor,
                found_inf=found_inf,
            )
            buckets = [bucket for bucket in plan.buckets if bucket.group == index]
            for bucket in buckets:
                bucket.options, bucket.sq_norm = options, None
            first = self._first_timers(group)
            keys = [_norm(param) for param in first]
            if options.priority_scope == "group" and (first or len(buckets) > 1):
                pairs = sq_norms_of_buckets(plan, group=index)
                total = stacked([*(sums.sqrt().sum() for _, sums in pairs), *keys]).sum()
                keys = [total] * len(first)
                for bucket in buckets:
                    bucket.sq_norm = to_device(total.square(), bucket.device)
            for bucket in buckets:
                self._choose_slots_(group, bucket, options, undo, made)
                if not group["kappa"]:
                    # NaN is never admitted.
                    nan = torch.full((), math.nan, dtype=torch.float64, device=bucket.device)
                    bucket.sq_norm = nan
            for param, key in zip(first, keys, strict=True):
                undo.keep(param)
                self._store_first_(group, param, options, key, made)

    def _first_timers(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the parameters that take their first step, if it only stores their gradient."""
        if self._stores_gradients(group):
            return []
        started = self._started()
        return [p for p in group["params"] if p.grad is not None and id(p) not in started]

    def _forget_plans(self) -> None:
        super()._forget_plans()
        # The ids that `_started` returned, and the state and its count of changes then.
        self._started_ids: set[int] = set()
        self._started_at: tuple[int, int | None] | None = None

    def _started(self) -> set[int]:
        """Return the ids of the parameters that have taken a step."""
        state: Any = self.state
        counts = isinstance(state, OptimizerState) and all(map(state.tracks, state))
        count = state.changes.count if counts else None
        if count is None or self._started_at != (id(state), count):
            self._started_ids = {id(param) for param, values in state.items() if "step" in values}
            self._started_at = id(state), count
        return self._started_ids

    def _choose_slots_(
        self, group: dict[str, Any], bucket: Bucket, options: StepOptions, undo: Undo, made: _Made
    ) -> None:
        """Draw for each parameter whether the next admission takes a slot whatever the keys.

        That slot is the one that was the smallest at the last search for it, at first slot 0. A
        parameter's state has its index as `smallest`.
        """
        chance = group["critical_test"] if group["kappa"] and group["capacity"] else 0.0
        if not chance:
            return
        params = [param for group in self.param_groups for param in group["params"]]
        for i, index in enumerate(bucket.param_indices):
            state, keys = self.state[params[index]], bucket["priorities"][i]
            if "smallest" not in state:
                state["smallest"] = torch.zeros((), dtype=torch.int64, device=keys.device)
                made.append((params[index], ["smallest"]))
            smallest: Tensor = state["smallest"]
            undo.keep(keys)
            undo.keep(smallest)
            # Nothing is rounded stochastically here: no other use is made of these words.
            bits = random_words(options.seed, index, bucket["step"][i], 1)[0]
            chosen = bits.to(torch.float64) < chance * 2.0**32
            full = (keys > -torch.inf).all()
            smallest.copy_(torch.where(full & ~chosen, keys.argmin(), smallest))
            slots = torch.arange(len(keys), device=keys.device)
            # Not -inf: the step counts the filled slots after this.
            keys.masked_fill_(full & chosen & (slots == smallest), 0.0)

    def _store_first_(
        self, group: dict[str, Any], param: Tensor, options: StepOptions, key: Tensor, made: _Made
    ) -> None:
        """Take a parameter's first step: its gradient goes into the buffer."""
        member = Member(0, select_for(group, param), [param], [0])
        made += self._make_state([member], [group])
        bucket = self._bucket(member, group)
        view_as_real_([bucket])
        grad = local_grad(param)
        bucket.grads = [as_real(grad.resolve_conj())]
        g = reference.effective_gradient(bucket, 0, options)
        reference.admit_(bucket, 0, key.to(param.device, torch.float32), g, options)
        for critical_sum in bucket["critical_sum"]:
            critical_sum.copy_(access.sum_slots(reference.load_buffer(bucket, 0)))
        lr = options.lr
        if isinstance(lr, Tensor):
            lr = lr.to(param.device).reshape(())
        param.mul_(1 - lr * options.weight_decay)


def _check(kappa: object, critical_test: object, capacity: object) -> None:
    check_number("kappa", kappa, *NOT_NEGATIVE)
    check_number("critical_test", critical_test, *IN_UNIT_INTERVAL)
    if capacity == 0:
        raise ValueError("capacity must be an int >= 1, got 0; kappa=0 does without a buffer")


def _norm(param: Tensor) -> Tensor:
    """Return the norm of a parameter's gradient, float64 ()."""
    assert param.grad is not None
    dtype = torch.complex128 if param.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(param.grad, dtype=dtype)
    return norm.double()


class Adam_CM(_ResearchAdam):  # noqa: N801
    """The research package's Adam with critical momenta, step by step.

    Source: `cmoptimizer.Adam_CM` of the authors of Malviya et al. Parameters and gradients as of
    `cm_fused.AdamCM`.

    Args:
        params: Parameters or param groups.
        lr: Learning rate, >= 0.
        betas: Decay rates of momentum and second moment, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        decay: Factor of the keys at every step, in [0, 1].
        kappa: 0 is AdamW; every other number >= 0 is 1.
        topC: Capacity of the buffer, an int >= 1.
        weight_decay: Decoupled, >= 0.
        amsgrad: Divide by the running maximum of the second moment.
        critical_test: In [0, 1]: the probability with which a full buffer takes a momentum whatever
            its key, in the slot that was the smallest when it was last looked for.
        synced: The key is the sum of the gradients' norms over the group, else the norm of each.
        buffer_dtype: The slots' dtype, as of `cm_fused.AdamCM`.

    Raises:
        ValueError: An argument is out of its range.
    """

    _critical_gradients = False


class Adam_C(_ResearchAdam, defaults={"topC": 10}):  # noqa: N801
    """The research package's Adam with critical gradients, step by step.

    Source: `cmoptimizer.Adam_C`. The arguments are `Adam_CM`'s, except that `weight_decay` is an L2
    term, added to the aggregate, that `kappa=0` is Adam, and that `topC` is 10 by default.
    """

    _critical_gradients = True
