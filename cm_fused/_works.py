"""Sums over processes at the end of the interpreter.

gloo adds up in threads of its own. Such a thread frees the work, which holds a tensor of Python's,
and asks for the interpreter lock to do so, unless Python still holds the work. A thread that asks
after Python has begun to finalize is ended there, in the middle of a destructor: the process
aborts ("terminate called without an active exception").

So Python holds the latest works, whatever becomes of the optimizers that started them, and at exit
waits for those that have not finished. torch's own works (of `fully_shard`) are not known here:
a pause at exit lets their threads have the lock.
"""

import atexit
import contextlib
import functools
import os
import time
from collections import deque
from datetime import timedelta
from typing import Any

# A work is freed when so many later ones have been started and it has finished.
_NUM_HELD = 16
# At exit, for a sum that a process which has died does not take part in.
_LONGEST_WAIT = timedelta(seconds=10)
# In which the threads that have finished a work free it; they take microseconds.
_PAUSE_SECONDS = 0.1

_works: deque[Any] = deque()


def hold(work: Any) -> None:
    """Hold a work until its thread has surely let go of it.

    Args:
        work: A `torch.distributed.Work` of gloo's, just started.
    """
    _register()
    _works.append(work)
    while len(_works) > _NUM_HELD and _works[0].is_completed():
        _works.popleft()


@functools.cache
def _register() -> None:
    atexit.register(_finish)
    if hasattr(os, "register_at_fork"):
        # A fork has none of the threads.
        os.register_at_fork(after_in_child=_works.clear)


def _finish() -> None:
    """Wait for all works, and let the threads free what is theirs."""
    if not _works:
        return
    for work in _works:
        # What has failed was an error of the step that waited for it, if any.
        with contextlib.suppress(RuntimeError):
            work.wait(_LONGEST_WAIT)
    time.sleep(_PAUSE_SECONDS)
