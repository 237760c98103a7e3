"""What a critical buffer holds while training goes on, and how sharp the loss is.

Nothing here changes what an optimizer computes: training with it has the same bits as without. It
does wait for the device, and makes commits that the fused backends would make in the next step, as
`state_dict` does.
"""

from cm_fused.diagnostics._history import History
from cm_fused.diagnostics._reading import Reading, combine, read
from cm_fused.diagnostics._recorder import ALL, Recorder
from cm_fused.diagnostics._sharpness import Sharpness, sharpness

__all__ = ["ALL", "History", "Reading", "Recorder", "Sharpness", "combine", "read", "sharpness"]
