"""Readings of critical buffers during training, and the sharpness of the loss.

Nothing here changes an optimizer's results: training with it has the same bits as without. A
reading waits for the device, and flushes the state, as `state_dict` does, which the fused backends
would do in the next step. `Recorder` says what it costs.
"""

from cm_fused.diagnostics._history import History
from cm_fused.diagnostics._reading import Reading, combine, read
from cm_fused.diagnostics._recorder import ALL, Recorder
from cm_fused.diagnostics._sharpness import Sharpness, sharpness

__all__ = ["ALL", "History", "Reading", "Recorder", "Sharpness", "combine", "read", "sharpness"]
