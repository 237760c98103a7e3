"""Adam with critical momenta for PyTorch, at the speed of memory."""

from cm_fused.adam_cg import AdamCG, AdamWCG
from cm_fused.adam_cm import AdamCM, AdamWCM

__all__ = ["AdamCG", "AdamCM", "AdamWCG", "AdamWCM"]
