"""Adam with critical momenta."""

from cm_fused._optimizer.base import CriticalAdam


class AdamCM(CriticalAdam):
    r"""Adam with critical momenta: a buffer of past momenta explores beyond sharp minima.

    The buffer keeps the C momenta whose gradients had the largest norms; old norms decay, so that
    fresh ones win. With g the gradient, per parameter:

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t && (4) \\
        a_t &= m_t + \tfrac1C \sum_{b \in \text{buffer}} b && (5), (6) \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) a_t^2 && (5) \\
        \theta_t &= \theta_{t-1} - \eta \frac{a_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon}} && (7)

    Then :math:`m_t` with the key :math:`\kappa_t = \|g_t\|_2` is appended, or replaces the smallest
    key if :math:`\kappa_t` is strictly greater, and every key is multiplied by
    :math:`\lambda`. A key that is not finite is never admitted.

    Parameters may be float32, float64, bfloat16, float16 or complex (as pairs of reals), with any
    strides. Gradients have their dtype; those of float32 parameters may be bfloat16 or float16, and
    are read as they are (`Tensor.grad_dtype`). State is float32 (float64 for float64), and the
    update of half-precision parameters is computed in float32: per parameter `step` (float32, ()),
    `exp_avg` and `exp_avg_sq` (its shape), `critical_buffer` ((C, \*shape)), `priorities` (float32,
    (C,), -inf where unfilled), with amsgrad `max_exp_avg_sq`, and on the fused backends
    `critical_sum`, the running sum of the slots (of float32 slots from capacity 3 on, of slots of 2
    bytes from 6 on, of 1 byte from 10 on, of int4 from 26 on). A parameter without a gradient takes
    no part in a step.

    The fused backends copy critical momenta to their slot at the next step (`pending_slot`, int64
    (), -1 for none). Replacing `exp_avg` in `optimizer.state` makes that copy first. So does
    `state_dict()`: call it before you change `exp_avg` in place, or the slots.

    `buffer_dtype` and `moment_dtype` store the state in lower precision; a step computes with it in
    float32. int4 slots are packed, two elements a byte: uint8 (C, bytes), whatever the parameter's
    shape. int4, int8 and float8_e4m3fn have one float32 scale for each 256 elements, in memory
    order: `critical_scales` ((C, blocks)), `exp_avg_scales` and `exp_avg_sq_scales` ((blocks,)).
    Slots are rounded to nearest, moments stochastically, so that a slow average is not stuck:
    without bias, by random bits that depend only on `seed`, parameter, step and element.
    `cm_fused.rounding` defines every rounding and cites its source.

    Elements of a DTensor (`fully_shard`, tensor parallel) are numbered by their position in the
    full parameter, so that their random bits do not depend on the sharding. The exceptions are
    DTensors that are not dense or are sharded along two dimensions neither of which is the first:
    each process numbers its own elements. Blocks of 256 are blocks of the local tensor. State with
    such blocks is saved as float32 values, to be loaded on any mesh: on the same mesh it has the
    same bits, on another it is rounded once. See `state_dict`.

    Source: Malviya et al., "Promoting Exploration in Memory-Augmented Adam using Critical Momenta",
    Algorithm 1.

    Args:
        params: Parameters, named parameters or param groups. `step()` changes them, not `.grad`.
        lr: Learning rate, >= 0; a float or a one-element tensor.
        betas: Decay rates of m and v, each in [0, 1).
        eps: Added to the denominator, >= 0; see `eps_inside_sqrt`.
        weight_decay: >= 0; added to the gradient as an L2 term, which then counts in its norm,
            unless `decoupled_weight_decay`.
        amsgrad: Divide by the running maximum of v.
        capacity: C, the number of slots, an int >= 0. One slot is one more copy of the parameters.
            With 0 there is no buffer: the state is Adam's, the mean in eq. (5) is 0, and only
            `max_grad_norm` and `skip_nonfinite` need a norm. `AdamCG` is then Adam, torch's with
            `eps_inside_sqrt=False`, and `AdamCM` divides by the root of a second moment of m.
        priority_decay: lambda, in [0, 1]. Smaller forgets faster; 1 keeps the largest for ever.
        priority_scope: The gradients that share a norm: "group", all of the param group that take
            part in the step (Algorithm 1), or "tensor", each parameter's own.
        buffer_mean: Divide the buffer's sum by "capacity", even while it fills, or by "size", the
            number of filled slots.
        eps_inside_sqrt: sqrt(v + eps) as in the paper, or sqrt(v) + eps as in torch. Inside, 1e-8
            is a floor of 1e-4: updates shrink with gradients below 1e-3. False keeps the updates'
            size.
        buffer_dtype: The slots' dtype: torch.float32, bfloat16, float16, float8_e4m3fn, int8 or
            int4, or its name, as "int8". None is float32, float64 for float64 parameters, which
            like complex ones take no other. Tensors that wrap others take none with scales:
            neither float8_e4m3fn, int8 nor int4.
        moment_dtype: The dtype of `exp_avg` and `exp_avg_sq`: torch.float32, bfloat16 or int8, or
            its name; None likewise. `max_exp_avg_sq` stays float32.
        low_precision_update: How bfloat16 and float16 parameters are rounded: "nearest",
            "stochastic" (without bias), or "kahan": their state has what rounding took, as
            `compensation` (dtype and shape of the parameter), and the next step adds it. "split" is
            for bfloat16 and has the bits of training in float32: the parameter, rounded to nearest
            with ties away from zero, and 16 more bits in the state, `master_remainder` (int16, its
            shape), are a float32 master. Parameters of other dtypes are not rounded.
        seed: The seed of stochastic rounding, an int in [0, 2^63). Saved in checkpoints. No
            generator of torch's is used.
        max_grad_norm: Clip the gradients within the step, > 0: as
            `torch.nn.utils.clip_grad_norm_` over all parameters of the optimizer before it, for one
            more read of the gradients, which are not changed. None: do not. Groups may have
            different bounds; the norm is over all of them.
        skip_nonfinite: A step whose gradients' norm, over all groups, is not finite changes
            nothing, and is counted in its param groups' `skipped_steps`, an int64 (). Costs the
            same read, which clipping shares.
        amp_scaling: Unscale the gradients of a `torch.amp.GradScaler` within the step, and skip it
            where the scaler found one that is not finite, without waiting for the device. The same
            for all groups, never loaded from checkpoints. Trainers refuse to clip gradients then,
            which are still scaled: use `max_grad_norm`.
        maximize: Ascend instead of descend.
        capturable: `step()` may be captured in a CUDA graph, once a step outside of one has made
            the state. Parameters on other devices are refused. For a learning rate that changes
            between replays, pass `lr` as a tensor on the device.
        decoupled_weight_decay: Shrink the parameters by lr * weight_decay instead of the L2 term.
        adjust_lr_fn: None, or "match_rms_adamw" as of `torch.optim.Muon`: the update, not decoupled
            weight decay, is multiplied by sqrt((1 - beta1) / (1 + beta1)), 0.23 at beta1 = 0.9. Its
            root mean square is then AdamW's where gradients are noise, so that AdamW's learning
            rate and weight decay carry over. It follows a changed beta1. It is for critical
            momenta: without it, updates of critical gradients have 1 to 1.6 times AdamW's size.
        backend: "eager" (the reference), "cpu" (C++), "triton" (CUDA devices), or None for the best
            on each parameter's device. Tensors that wrap others (`__tensor_flatten__`, except
            DTensors) are stepped by the reference. Never loaded from checkpoints; `repr` shows what
            is active.
        fused: As of torch's optimizers: True asks for a fused backend, and raises where there is
            none; None takes the best, which may be the reference. Never loaded from checkpoints.
        foreach: None or False; for code that passes it to every optimizer.

    Raises:
        ValueError: An option is out of its range.
        RuntimeError: The requested backend, or one for `fused=True`, is not available; the message
            says why.

    Example:
        >>> import torch
        >>> from cm_fused import AdamCM
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamCM(model.parameters(), lr=1e-2)
        >>> model(torch.ones(2)).sum().backward()
        >>> optimizer.step()
    """

    _critical_gradients = False


class AdamWCM(AdamCM, defaults={"weight_decay": 1e-2, "decoupled_weight_decay": True}):
    """`AdamCM` with decoupled weight decay, 1e-2 by default, as AdamW to Adam.

    Every other argument is `AdamCM`'s.
    """
