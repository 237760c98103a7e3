"""All numbers of the report, computed once."""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from bench.paper import experiments
from bench.paper.experiments import (
    ACKLEY,
    LANDSCAPES,
    Buffers,
    CapacityEscapes,
    Escapes,
    Lines,
    Opposition,
    Outcome,
    Scan,
)


@dataclass(frozen=True)
class Results:
    """The numbers; the functions of `experiments` that return them say how they are keyed.

    Args:
        scans: Fig. 1 and 5 and Table 2, by (surface, box of starts).
        ackley: Fig. 3 and 13, by box of starts.
        escapes: Fig. 4.
        capacity_escapes: Fig. 12.
        lines: Fig. 6, 17 and 18.
        first_buffers: Fig. 2.
        opposition: Fig. 11.
        admission: Shares of steps that admit.
        update_rms: RMS of updates in learning rates.
    """

    scans: dict[tuple[str, str], Scan]
    ackley: dict[str, dict[tuple[str, str], Outcome]]
    escapes: Escapes
    capacity_escapes: CapacityEscapes
    lines: Lines
    first_buffers: dict[str, Buffers]
    opposition: Opposition
    admission: dict[tuple[str, int, float], float]
    update_rms: dict[tuple[str, str], float]


def compute() -> Results:
    """Run every experiment, one a core at a time, with a progress bar."""
    # The longest first, so that no core is left with one of them at the end.
    parts: dict[tuple[str, Any], Callable[[], Any]] = {
        **{(name, None): getattr(experiments, name) for name in _WHOLE},
        **{("ackley", place.starts): partial(_ackley, i) for i, place in enumerate(ACKLEY)},
        **{
            ("scans", (place.name, place.starts)): partial(_scan, i)
            for i, place in enumerate(LANDSCAPES)
        },
    }
    done: dict[str, Any] = {"ackley": {}, "scans": {}}
    for (name, key), result in _in_parallel(parts).items():
        if key is None:
            done[name] = result
        else:
            done[name][key] = result
    return Results(**done)


_WHOLE = (
    "escapes",
    "capacity_escapes",
    "lines",
    "first_buffers",
    "opposition",
    "admission",
    "update_rms",
)


def _ackley(index: int) -> dict[tuple[str, str], Outcome]:
    return experiments.ackley(ACKLEY[index])


def _scan(index: int) -> Scan:
    return experiments.scan(LANDSCAPES[index])


def _in_parallel(parts: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Return what each part returns, in the order of the parts."""
    context = multiprocessing.get_context("spawn")
    cores = len(os.sched_getaffinity(0))
    found = {}
    with ProcessPoolExecutor(cores, context, torch.set_num_threads, (1,)) as pool:
        try:
            tasks = {pool.submit(_pickled, part): key for key, part in parts.items()}
            for task in tqdm(
                as_completed(tasks), total=len(tasks), desc="experiments", disable=None
            ):
                found[tasks[task]] = pickle.loads(task.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return {key: found[key] for key in parts}


def _pickled(part: Callable[[], Any]) -> bytes:
    # A tensor that a process sends as such takes a file descriptor, and there are thousands.
    return pickle.dumps(part())
