"""Adam with critical momenta for PyTorch, at the speed of memory."""

from cm_fused.adam_cg import AdamCG, AdamWCG
from cm_fused.adam_cm import AdamCM, AdamWCM
from cm_fused.gradient_release import enable_gradient_release
from cm_fused.master_params import get_master_param, set_master_param
from cm_fused.param_groups import param_groups_weight_decay
from cm_fused.sam import SAM

__all__ = [
    "SAM",
    "AdamCG",
    "AdamCM",
    "AdamWCG",
    "AdamWCM",
    "enable_gradient_release",
    "get_master_param",
    "param_groups_weight_decay",
    "set_master_param",
]
