"""Keeps sums over processes alive until their threads have finished.

gloo adds up in threads of its own. Such a thread frees the work, which refers to a tensor of
Python's, and asks for the interpreter lock to do so, unless Python still refers to the work. A
thread that asks after Python has begun to finalize is ended there, in the middle of a destructor:
the process aborts ("terminate called without an active exception").

So this module refers to the latest works, whatever becomes of the optimizers that started them, and
at exit waits for those that have not finished. It does not know torch's own works (of
`fully_shard`): a pause at exit lets their threads have the lock.
"""

import atexit
import contextlib
import functools
import os
import time
from collections import deque
from datetime import timedelta
from typing import Any

# A work is freed once it has finished and this many later ones have been started.
_NUM_HELD = 16
# At exit, for a sum in which a process that has died takes no part.
_LONGEST_WAIT = timedelta(seconds=10)
# In this time, threads that have finished a work free it; they need microseconds.
_PAUSE_SECONDS = 0.1

_works: deque[Any] = deque()


def hold(work: Any) -> None:
    """Refer to a work of gloo's, just started, until its thread no longer does."""
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
    """Wait for all works, and give the threads time to free theirs."""
    if not _works:
        return
    for work in _works:
        # The step that waited for a work has raised its error.
        with contextlib.suppress(RuntimeError):
            work.wait(_LONGEST_WAIT)
    time.sleep(_PAUSE_SECONDS)
