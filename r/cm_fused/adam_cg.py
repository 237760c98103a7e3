"""Adam with critical gradients, the paper's baseline."""

from cm_fused._optimizer.base import CriticalAdam


class AdamCG(CriticalAdam):
    r"""Adam with critical gradients: the buffer has gradients instead of momenta.

    .. math::
        a_t &= g_t + \tfrac1C \sum_{b \in \text{buffer}} b && (3) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) a_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) a_t^2 \\
        \theta_t &= \theta_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}
            {\sqrt{v_t / (1 - \beta_2^t) + \epsilon}} && (7)

    Then :math:`g_t` asks for a slot with its norm, by the rule of `AdamCM`, whose arguments, state
    and errors are this class's too. The gradient's norm takes a pass of its own, which
    reads 4 bytes an element more than `AdamCM`.

    Source: Malviya et al., eq. (3), the baseline of "Promoting Exploration in Memory-Augmented
    Adam using Critical Momenta"; the gradients' buffer is McRae et al.'s, "Memory Augmented
    Optimizers for Deep Learning".
    """

    _critical_gradients = True


class AdamWCG(AdamCG, defaults={"weight_decay": 1e-2, "decoupled_weight_decay": True}):
    """`AdamCG` with decoupled weight decay, 1e-2 by default, as AdamW to Adam.

    Every other argument is `AdamCM`'s.
    """
