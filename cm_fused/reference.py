"""The definition: one step of Adam with critical momenta or critical gradients, in plain torch.

Equation numbers are those of Malviya et al., "Promoting Exploration in Memory-Augmented Adam using
Critical Momenta". This is the `"eager"` backend and the oracle of the others. It branches on
options only, never on data: no host synchronization, and `torch.compile` takes it whole.

An unfilled slot's key is -inf. It is smaller than any norm, so "append while the buffer fills, then
replace the smallest key" is one rule: replace the smallest key.
"""

import torch
from torch import Tensor

from cm_fused._bucket import Bucket, StepOptions


def adam_cm_(bucket: Bucket, options: StepOptions, sq_norm: Tensor | None = None) -> None:
    """Take one step of Adam with critical momenta, in place (Algorithm 1).

    Source: Malviya et al., eq. (4) to (7).

    Args:
        bucket: The tensors; `critical_sums` and `pending_slots` are not used.
        options: The hyperparameters.
        sq_norm: The sum of the squares of all the group's gradients, float64 (), for
            `priority_scope="group"`. None: the bucket is the whole group.
    """
    gradients = effective_gradients(bucket, options)
    keys = priority_keys(gradients, options, sq_norm)
    for i, g in enumerate(gradients):
        m = bucket.exp_avgs[i]
        mean = buffer_mean(bucket.critical_buffers[i], bucket.priorities[i], options)
        m.mul_(options.beta1).add_(g, alpha=1 - options.beta1)  # Eq. (4)
        aggregate = m + mean  # Eq. (5)
        _update_(bucket, i, aggregate, numerator=aggregate, options=options)
        admit_(bucket.critical_buffers[i], bucket.priorities[i], keys[i], m, options)


def adam_cg_(bucket: Bucket, options: StepOptions, sq_norm: Tensor | None = None) -> None:
    """Take one step of Adam with critical gradients, in place; arguments as for `adam_cm_`.

    Source: Malviya et al., eq. (3), after McRae et al.'s aggregation of critical gradients.
    """
    gradients = effective_gradients(bucket, options)
    keys = priority_keys(gradients, options, sq_norm)
    for i, g in enumerate(gradients):
        m = bucket.exp_avgs[i]
        mean = buffer_mean(bucket.critical_buffers[i], bucket.priorities[i], options)
        aggregate = g + mean  # Eq. (3)
        m.mul_(options.beta1).add_(aggregate, alpha=1 - options.beta1)
        _update_(bucket, i, aggregate, numerator=m, options=options)
        admit_(bucket.critical_buffers[i], bucket.priorities[i], keys[i], g, options)


def sq_norm(bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of the bucket's gradients, float64 ()."""
    return _sq_norms(effective_gradients(bucket, options)).sum()


def effective_gradients(bucket: Bucket, options: StepOptions) -> list[Tensor]:
    """Return the gradients the step uses, in the state's dtype: negated to maximize, with L2."""
    gradients = []
    for param, grad, exp_avg in zip(bucket.params, bucket.grads, bucket.exp_avgs, strict=True):
        g = grad.to(exp_avg.dtype)
        if options.maximize:
            g = -g
        if options.weight_decay != 0 and not options.decoupled_weight_decay:
            g = g + options.weight_decay * param.to(exp_avg.dtype)
        gradients.append(g)
    return gradients


def _sq_norms(gradients: list[Tensor]) -> Tensor:
    # In float64 a float32 gradient's square neither overflows nor underflows.
    return torch.stack(
        [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
    )


def priority_keys(
    gradients: list[Tensor], options: StepOptions, sq_norm: Tensor | None
) -> list[Tensor]:
    """Return each parameter's kappa, float32 (): the L2 norm over the priority scope."""
    sq_norms = _sq_norms(gradients)
    if options.priority_scope == "group":
        sq_norms = (sq_norms.sum() if sq_norm is None else sq_norm).expand(len(gradients))
    return list(sq_norms.sqrt().to(torch.float32).unbind())


def buffer_mean(buffer: Tensor, priorities: Tensor, options: StepOptions) -> Tensor:
    """Return (1/C) times the sum of the slots, or the mean of the filled ones; 0 when empty."""
    if options.buffer_mean == "capacity":
        return (1 / buffer.shape[0]) * buffer.sum(0)  # Eq. (6)
    filled = (priorities > -torch.inf).sum().clamp(min=1)
    return (1 / filled.to(torch.float64)).to(buffer.dtype) * buffer.sum(0)


def admit_(
    buffer: Tensor, priorities: Tensor, key: Tensor, item: Tensor, options: StepOptions
) -> None:
    """Store `(key, item)` where the key is finite and exceeds the smallest; decay all keys."""
    slot = priorities.argmin(keepdim=True)  # the lowest index on a tie
    smallest = priorities.index_select(0, slot)
    admitted = torch.isfinite(key) & (key > smallest)
    stored = torch.where(
        admitted.reshape(-1, *[1] * item.ndim), item.unsqueeze(0), buffer.index_select(0, slot)
    )
    buffer.index_copy_(0, slot, stored)
    priorities.index_copy_(0, slot, torch.where(admitted, key, smallest))
    # An unfilled slot keeps its key: -inf times a decay of 0 would be NaN.
    unfilled = priorities == -torch.inf
    priorities.copy_(torch.where(unfilled, priorities, priorities * options.priority_decay))


def commit_(
    exp_avg: Tensor, buffer: Tensor, critical_sum: Tensor | None, pending_slot: Tensor
) -> None:
    """Copy a momentum to its pending slot, where it has one, and follow with the running sum.

    The form of `cm_fused::commit_` for any device, with the same bits.

    Args:
        exp_avg: The momentum; not changed.
        buffer: The slots, (C, *shape). Changed.
        critical_sum: The running sum, or None. Changed.
        pending_slot: The slot to copy to, int64 (). Changed to -1.
    """
    slot = pending_slot.clamp(min=0).reshape(1)
    evicted = buffer.index_select(0, slot)
    stored = torch.where(pending_slot >= 0, exp_avg.unsqueeze(0), evicted)
    if critical_sum is not None:
        critical_sum.add_((stored - evicted).squeeze(0))
    buffer.index_copy_(0, slot, stored)
    pending_slot.fill_(-1)


def _update_(
    bucket: Bucket, i: int, aggregate: Tensor, numerator: Tensor, options: StepOptions
) -> None:
    """Update step count, second moment and parameter i."""
    param, v, step = bucket.params[i], bucket.exp_avg_sqs[i], bucket.steps[i]
    step.add_(1)
    t = step.to(torch.float64)
    bias_correction1 = 1 - options.beta1**t
    bias_correction2 = (1 - options.beta2**t).to(v.dtype)
    lr = options.lr
    if isinstance(lr, Tensor):
        lr = lr.to(step.device).reshape(())

    v.mul_(options.beta2).add_(aggregate * aggregate, alpha=1 - options.beta2)  # Eq. (5)
    second_moment = v
    if bucket.max_exp_avg_sqs:
        second_moment = bucket.max_exp_avg_sqs[i]
        torch.maximum(second_moment, v, out=second_moment)
    corrected = second_moment / bias_correction2
    if options.eps_inside_sqrt:
        denominator = (corrected + options.eps).sqrt()
    else:
        denominator = corrected.sqrt() + options.eps

    theta = param.to(v.dtype)
    if options.decoupled_weight_decay:
        theta = theta * (1 - lr * options.weight_decay)
    step_size = (lr / bias_correction1).to(v.dtype)
    param.copy_(theta - step_size * (numerator / denominator))  # Eq. (7)
