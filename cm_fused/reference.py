"""The definition: one step of Adam with critical momenta or critical gradients, in plain torch.

Equation numbers are those of Malviya et al., "Promoting Exploration in Memory-Augmented Adam using
Critical Momenta". This is the `"eager"` backend and the oracle of the others. It branches on
options only, never on data: no host synchronization, and `torch.compile` takes it whole. State of
low precision is read as `cm_fused.rounding` defines and computed with in float32.

An unfilled slot's key is -inf. It is smaller than any norm, so "append while the buffer fills, then
replace the smallest key" is one rule: replace the smallest key.
"""

import torch
from torch import Tensor

from cm_fused import rounding
from cm_fused._bucket import Bucket, StepOptions, over_scope
from cm_fused._distributed import is_wrapper
from cm_fused._state import access
from cm_fused.philox import random_words


def adam_cm_(bucket: Bucket, options: StepOptions, sq_norm: Tensor | None = None) -> Tensor:
    """Take one step of Adam with critical momenta, in place (Algorithm 1).

    Source: Malviya et al., eq. (4) to (7).

    Args:
        bucket: The tensors; `critical_sum` and `pending_slot` are not used.
        options: The hyperparameters.
        sq_norm: The sum of the squares of the gradients over the priority scope, float64 () or one
            for each parameter, (params,). None: the bucket is the whole group.

    Returns:
        The sum of the squares of each gradient, float64 (params,).
    """
    sq_norms = update_cm_(bucket, options)
    update_priorities_(
        bucket, options, over_scope(sq_norms, options) if sq_norm is None else sq_norm
    )
    return sq_norms


def update_cm_(bucket: Bucket, options: StepOptions) -> Tensor:
    """Take the step of `adam_cm_` except for the priorities, which `update_priorities_` updates.

    Returns:
        The sum of the squares of each gradient, float64 (params,).
    """
    sq_norms = []
    for i in range(len(bucket.params)):
        # Parameters that have memory in common are stepped one after the other.
        g = effective_gradient(bucket, i, options)
        sq_norms.append(_sq_norm(g))
        kept = _kept(bucket, i, options)
        m, v = _load_moments(bucket, i)
        m.mul_(options.beta1).add_(g, alpha=1 - options.beta1)  # Eq. (4)
        aggregate = _with_buffer_mean(m, bucket, i, options)  # Eq. (5)
        _update_(bucket, i, v, aggregate, numerator=aggregate, options=options)
        _store_moments_(bucket, i, m, v, options)
        _undo_where_skipped_(bucket, i, kept, options)
    return torch.stack(sq_norms)


def update_priorities_(bucket: Bucket, options: StepOptions, sq_norm: Tensor) -> None:
    """Admit the momenta that `update_cm_` left and count its step; arguments as for `adam_cm_`."""
    for i, key in enumerate(priority_keys(sq_norm, len(bucket.params))):
        kept = _kept(bucket, i, options)
        # What is stored of m is what a deferred commit still finds.
        item, _ = _load_moments(bucket, i)
        admit_(bucket, i, key, item, options)
        _undo_where_skipped_(bucket, i, kept, options)


def adam_cg_(bucket: Bucket, options: StepOptions, sq_norm: Tensor | None = None) -> Tensor | None:
    """Take one step of Adam with critical gradients, in place; arguments as for `adam_cm_`.

    Source: Malviya et al., eq. (3), after McRae et al.'s aggregation of critical gradients.

    Returns:
        The sum of the squares of each gradient, float64 (params,); None if `sq_norm` is given or
        there is no buffer, which needs no norm.
    """
    own = None
    if sq_norm is None and bucket.finds_norms:
        own = sq_norms(bucket, options)
        sq_norm = over_scope(own, options)
    count = len(bucket.params)
    keys = [None] * count if sq_norm is None else priority_keys(sq_norm, count)
    for i in range(len(bucket.params)):
        g = effective_gradient(bucket, i, options)
        kept = _kept(bucket, i, options)
        m, v = _load_moments(bucket, i)
        late = _with_l2_term(g, bucket, i, options) if options.l2_in_aggregate else g
        aggregate = _with_buffer_mean(late, bucket, i, options)  # Eq. (3)
        m.mul_(options.beta1).add_(aggregate, alpha=1 - options.beta1)
        _update_(bucket, i, v, aggregate, numerator=m, options=options)
        _store_moments_(bucket, i, m, v, options)
        admit_(bucket, i, keys[i], g, options)
        _undo_where_skipped_(bucket, i, kept, options)
    return own


def _kept(bucket: Bucket, i: int, options: StepOptions) -> list[Tensor]:
    """Return copies of what a step changes of parameter i, where it may have to be undone."""
    if options.found_inf is None:
        return []
    return [tensor.clone() for tensor in bucket.changed(i)]


def _undo_where_skipped_(bucket: Bucket, i: int, kept: list[Tensor], options: StepOptions) -> None:
    """Put back what a step changed of parameter i, where it was to be skipped.

    That costs copies, but branches on no data.
    """
    if options.found_inf is None:
        return
    for tensor, before in zip(bucket.changed(i), kept, strict=True):
        before, after = access.as_bytes(before), access.as_bytes(tensor)
        after.copy_(torch.where(options.found_inf.to(after.device) != 0, before, after))


def update_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype a parameter's update is computed in; real tensors only."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def sq_norms(bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of each of the bucket's gradients, float64 (params,)."""
    gradients = (effective_gradient(bucket, i, options) for i in range(len(bucket.params)))
    return torch.stack([_sq_norm(g) for g in gradients])


def effective_gradient(bucket: Bucket, i: int, options: StepOptions) -> Tensor:
    """Return the gradient that the step of parameter i uses, in the update's dtype.

    It is unscaled and clipped, then negated to maximize, then the L2 term is added.
    """
    dtype = update_dtype(bucket.params[i])
    g = bucket.grads[i].to(dtype)
    if options.grad_factor is not None:
        g = options.grad_factor.to(g.device, dtype) * g
    if options.maximize:
        g = -g
    return g if options.l2_in_aggregate else _with_l2_term(g, bucket, i, options)


def _sq_norm(g: Tensor) -> Tensor:
    # In float64 a float32 gradient's square neither overflows nor underflows.
    norm: Tensor = torch.linalg.vector_norm(g, dtype=torch.float64)
    if is_wrapper(norm):
        # Other parameters' steps, which may be fused ones, take it as their key or factor.
        norm = torch.zeros((), dtype=torch.float64, device=norm.device).copy_(norm)
    return norm.square()


def _with_l2_term(g: Tensor, bucket: Bucket, i: int, options: StepOptions) -> Tensor:
    if options.weight_decay == 0 or options.decoupled_weight_decay:
        return g
    return g + options.weight_decay * _load_param(bucket, i)


def _load_param(bucket: Bucket, i: int) -> Tensor:
    """Return parameter i in the update's dtype: its master if it has one."""
    param = bucket.params[i]
    if bucket["master_remainder"] and param.dtype is torch.bfloat16:
        return rounding.join_master(param, bucket["master_remainder"][i])
    return param.to(update_dtype(param))


def priority_keys(sq_norm: Tensor, count: int) -> list[Tensor]:
    """Return each parameter's kappa, float32 (): the L2 norm over the priority scope."""
    return list(sq_norm.sqrt().to(torch.float32).expand(count).unbind())


def _with_buffer_mean(x: Tensor, bucket: Bucket, i: int, options: StepOptions) -> Tensor:
    # Without a buffer x itself: x + 0 would turn -0 to 0.
    if not bucket.capacity:
        return x
    return x + buffer_mean(load_buffer(bucket, i), bucket["priorities"][i], options)


def buffer_mean(buffer: Tensor, priorities: Tensor, options: StepOptions) -> Tensor:
    """Return (1/C) times the sum of the slots, or the mean of the filled ones; 0 when empty."""
    if options.buffer_mean == "capacity":
        return (1 / buffer.shape[0]) * access.sum_slots(buffer)  # Eq. (6)
    filled = (priorities > -torch.inf).sum().clamp(min=1)
    return (1 / filled.to(torch.float64)).to(buffer.dtype) * access.sum_slots(buffer)


def admit_(bucket: Bucket, i: int, key: Tensor | None, item: Tensor, options: StepOptions) -> None:
    """Store `(key, item)` where the key is finite and exceeds the smallest; decay all keys.

    The step is counted here, in all backends: with this it is over. Without a buffer that is all,
    and no key is needed.
    """
    if key is not None and bucket.capacity:
        _update_buffer_(bucket, i, key, item, options)
    bucket["step"][i].add_(1)


def _update_buffer_(
    bucket: Bucket, i: int, key: Tensor, item: Tensor, options: StepOptions
) -> None:
    priorities = bucket["priorities"][i]
    slot = priorities.argmin(keepdim=True)  # the lowest index on a tie
    smallest = priorities.index_select(0, slot)
    admitted = torch.isfinite(key) & (key > smallest)
    access.store_slot_(
        bucket["critical_buffer"][i],
        _item(bucket["critical_scales"], i),
        slot,
        admitted,
        item,
        bucket["exp_avg"][i],
    )
    priorities.index_copy_(0, slot, torch.where(admitted, key, smallest))
    # An unfilled slot keeps its key: -inf times a decay of 0 would be NaN.
    unfilled = priorities == -torch.inf
    priorities.copy_(torch.where(unfilled, priorities, priorities * options.priority_decay))


def _item(tensors: list[Tensor], i: int) -> Tensor | None:
    return tensors[i] if tensors else None


def load_buffer(bucket: Bucket, i: int) -> Tensor:
    """Return the slots of parameter i, (C, *shape)."""
    return access.load_slots(
        bucket["critical_buffer"][i], _item(bucket["critical_scales"], i), bucket["exp_avg"][i]
    )


def _load_moments(bucket: Bucket, i: int) -> tuple[Tensor, Tensor]:
    """Return m and v of parameter i: the state itself where it is of the update's dtype."""
    return (
        access.load_moment(bucket["exp_avg"][i], _item(bucket["exp_avg_scales"], i), signed=True),
        access.load_moment(
            bucket["exp_avg_sq"][i], _item(bucket["exp_avg_sq_scales"], i), signed=False
        ),
    )


def _store_moments_(bucket: Bucket, i: int, m: Tensor, v: Tensor, options: StepOptions) -> None:
    """Round m and v of parameter i to the state's dtype, stochastically; no-op where they are it.

    m takes the first of an element's random bits and v the last: halves, or 20 of 32.
    """
    stored = bucket["exp_avg"][i], bucket["exp_avg_sq"][i]
    if m is stored[0]:
        return
    words = _words(bucket, i, options)
    taken = rounding.MOMENT_RANDOM_BITS[stored[0].dtype]
    all_bits = words >> (32 - taken), words & (2**taken - 1)
    all_scales = _item(bucket["exp_avg_scales"], i), _item(bucket["exp_avg_sq_scales"], i)
    for state, values, scales, bits, signed in zip(
        stored, (m, v), all_scales, all_bits, (True, False), strict=True
    ):
        flat = rounding.flat_as(values, state)
        if scales is None:
            flat = rounding.round_stochastically(flat, state.dtype, bits)
        else:
            flat, new_scales = rounding.quantize_moment(flat, bits, signed=signed)
            scales.copy_(new_scales)
        rounding.as_flat(state).copy_(flat)


def _words(bucket: Bucket, i: int, options: StepOptions) -> Tensor:
    index, step = (bucket.param_indices or range(len(bucket.params)))[i], bucket["step"][i] + 1
    numel = bucket.params[i].numel()
    return random_words(options.seed, index, step, numel, bucket.shard_layout(i))


def _update_(
    bucket: Bucket, i: int, v: Tensor, aggregate: Tensor, numerator: Tensor, options: StepOptions
) -> None:
    """Update second moment v and parameter i."""
    param, step = bucket.params[i], bucket["step"][i] + 1
    t = step.to(torch.float64)
    bias_correction1 = 1 - options.beta1**t
    # Its inverse: a product is cheaper than a quotient.
    inverse_bias_correction2 = (1 / (1 - options.beta2**t)).to(v.dtype)
    lr = options.lr
    if isinstance(lr, Tensor):
        lr = lr.to(step.device, torch.float64).reshape(())

    v.mul_(options.beta2).add_(aggregate * aggregate, alpha=1 - options.beta2)  # Eq. (5)
    second_moment = v
    if bucket["max_exp_avg_sq"]:
        second_moment = bucket["max_exp_avg_sq"][i]
        torch.maximum(second_moment, v, out=second_moment)
    corrected = inverse_bias_correction2 * second_moment
    if options.eps_inside_sqrt:
        denominator = (corrected + options.eps).sqrt()
    else:
        denominator = corrected.sqrt() + options.eps

    half = param.dtype in rounding.HALF_DTYPES
    theta = _load_param(bucket, i)
    if half and options.low_precision_update == "kahan":
        theta = theta + bucket["compensation"][i].to(v.dtype)
    if options.decoupled_weight_decay:
        decay_factor = 1 - lr * options.weight_decay
        if isinstance(decay_factor, Tensor):
            # Else a parameter without dimensions would become float64.
            decay_factor = decay_factor.to(v.dtype)
        theta = theta * decay_factor
    step_size = (lr / bias_correction1).to(v.dtype)
    theta = theta - step_size * (numerator / denominator)  # Eq. (7)
    if half and options.low_precision_update == "stochastic":
        words = rounding.shaped_as(_words(bucket, i, options), bucket["exp_avg"][i])
        theta = rounding.round_stochastically(theta, param.dtype, rounding.param_bits(words))
    if bucket["master_remainder"] and param.dtype is torch.bfloat16:
        theta, remainder = rounding.split_master(theta)
        bucket["master_remainder"][i].copy_(remainder)
    param.copy_(theta)
    if half and options.low_precision_update == "kahan":
        bucket["compensation"][i].copy_(theta - param.to(v.dtype))
