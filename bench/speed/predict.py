"""How long a GPU's steps should take, on paper: `python -m bench.speed.predict`.

Nothing here was measured. A step is its launches, one after the other. A launch takes the gap
before it, and then what is longer: moving its bytes at a copy's speed, or its waves of programs,
each as long as the loads of one program that wait for each other. Given a results file the table
has the measured times beside the predicted ones.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import internals, markdown
from bench.speed import bytes as byte_model
from bench.speed.bytes import Bytes
from bench.speed.providers import BASELINE, NO_BUFFER, REPLACING, Provider, providers
from bench.speed.workloads import Workload, workloads

# The machine: an H200. Its datasheet: 4.8 TB/s, 132 multiprocessors. The CUDA guide's table for
# compute capability 9.0: 65,536 registers and 2048 threads a multiprocessor.
PEAK_BYTES_PER_SECOND = 4.8e12
MULTIPROCESSORS = 132
REGISTERS = 65_536
THREADS = 2048
# A large copy is assumed to reach this part of the peak. The first run measures the copy.
COPY_SHARE = 0.9
# From the end of a kernel to the start of the next one of a full queue: an assumption, from the 2
# to 3 µs that short kernels are usually said to take each.
GAP_SECONDS = 2e-6
# A load that another one waits for. arXiv 2402.13499 has 479 cycles for an H100's memory without
# other traffic, 0.27 µs at 1.755 GHz; an assumption is twice that with traffic.
LOAD_SECONDS = 0.55e-6

# The launches: 128 threads a Triton program, which take four elements each at a time. Registers are
# those that the pass is compiled for (`launch_options`; bench.machine_code counts them).
_PROGRAM_THREADS = 128
_PROGRAM_BLOCK = 4 * _PROGRAM_THREADS
PASS_REGISTERS = {"float32": 64, "rounded": 96, "scaled": 168}
# The pass's entry, the columns of the tensor's row, the slot that is named there. Then each block
# waits for its loads: nothing is loaded ahead.
_PASS_LOADS, _NORM_LOADS = 3, 2
# The CUDA priority kernel: a row's columns, its keys, the keys written; 256 threads take eight sums
# of chunks each at a time. (Without that library 128 threads take one each, which a tensor of a
# billion elements should notice: 1900 loads in turn, a millisecond.)
_PRIORITY_LOADS, _PRIORITY_BATCH, _PRIORITY_THREADS = 3, 8 * 256, 256
# torch's fused AdamW (ATen/native/cuda/MultiTensorApply.cuh, for CUDA 13): elements a block,
# elements at a time, and the tensors and blocks of one launch. Launches of their own count the
# steps, of so many tensors each.
_ATEN_CHUNK, _ATEN_BLOCK = 65_536, 4 * 512
_ATEN_TENSORS, _ATEN_BLOCKS, _ATEN_COUNTED = 252, 2240, 770
# An assumption: two blocks a multiprocessor, of 40 to 64 registers.
_ATEN_RESIDENT = 2
# One pass an operator, whose launches are torch's affair.
_NOT_PREDICTED = ("foreach", "eager", "compiled")


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        name: What it is.
        programs: Programs, or blocks.
        resident: Of them on a multiprocessor at a time.
        loads: Of one program, that wait for each other.
        moved: Bytes from and to memory.
    """

    name: str
    programs: int
    resident: int
    loads: int
    moved: float

    @property
    def waves(self) -> float:
        """Programs over those that run at a time."""
        return self.programs / (self.resident * MULTIPROCESSORS)

    @property
    def bytes_seconds(self) -> float:
        """The seconds of its bytes at a copy's speed."""
        return self.moved / (COPY_SHARE * PEAK_BYTES_PER_SECOND)

    @property
    def waiting_seconds(self) -> float:
        """The seconds of its waves' loads that wait for each other."""
        return math.ceil(self.waves) * self.loads * LOAD_SECONDS

    @property
    def seconds(self) -> float:
        """The gap before it, and the longer of bytes and waiting."""
        return GAP_SECONDS + max(self.bytes_seconds, self.waiting_seconds)


@dataclass(frozen=True)
class Prediction:
    """The predicted step."""

    workload: str
    provider: str
    launches: list[Launch]

    @property
    def seconds(self) -> float:
        """The seconds of the device."""
        return sum(launch.seconds for launch in self.launches)

    @property
    def limit(self) -> str:
        """Return what most of the time goes to."""
        parts = {
            "bytes": sum(launch.bytes_seconds for launch in self.launches),
            "waiting": sum(launch.waiting_seconds for launch in self.launches),
            "launches": GAP_SECONDS * len(self.launches),
        }
        return max(parts, key=parts.__getitem__)


def _chunks(workload: Workload, size: int) -> list[int]:
    """Return the number of chunks of each tensor."""
    return [-(-math.prod(shape) // size) for shape in workload.shapes]


def _longest(workload: Workload, chunk: int, block: int) -> int:
    """Return the blocks that the fullest chunk has, one after the other."""
    return -(-min(chunk, max(math.prod(shape) for shape in workload.shapes)) // block)


def _adamw(workload: Workload) -> Iterator[Launch]:
    chunks, tensors = _chunks(workload, _ATEN_CHUNK), len(workload.shapes)
    counted = -(-tensors // _ATEN_COUNTED)
    for _ in range(counted):
        yield Launch("steps", -(-tensors // counted), _ATEN_RESIDENT, 2, 0)
    passes = max(-(-sum(chunks) // _ATEN_BLOCKS), -(-tensors // _ATEN_TENSORS))
    moved = byte_model.adamw_fused().total * workload.numel / passes
    loads = 1 + _longest(workload, _ATEN_CHUNK, _ATEN_BLOCK)
    for _ in range(passes):
        yield Launch("pass", -(-sum(chunks) // passes), _ATEN_RESIDENT, loads, moved)


def _fused(
    workload: Workload, moved: Bytes, state: str, critical_gradients: bool
) -> Iterator[Launch]:
    chunks = _chunks(workload, internals.TRITON_CHUNK_SIZE)
    blocks = _longest(workload, internals.TRITON_CHUNK_SIZE, _PROGRAM_BLOCK)
    resident = REGISTERS // (PASS_REGISTERS[state] * _PROGRAM_THREADS)
    batches = -(-max(chunks) // _PRIORITY_BATCH)
    priorities = Launch(
        "priorities",
        len(chunks),
        THREADS // _PRIORITY_THREADS,
        _PRIORITY_LOADS + batches,
        8 * sum(chunks),
    )
    norm_bytes = 4 * workload.numel if critical_gradients else 0
    step_bytes = moved.total * workload.numel - norm_bytes
    step = Launch("pass", sum(chunks), resident, _PASS_LOADS + blocks, step_bytes)
    if critical_gradients:
        most = THREADS // _PROGRAM_THREADS
        yield Launch("norms", sum(chunks), most, _NORM_LOADS + blocks, norm_bytes)
        yield from (priorities, step)
    else:
        yield from (step, priorities)


def _launches(provider: Provider, workload: Workload) -> Iterator[Launch]:
    """Return a step's launches; a graph's replay has the same ones."""
    if provider.name.startswith("AdamW"):
        return _adamw(workload)
    scaled = any(dtype in provider.name for dtype in ("int8", "int4"))
    state = "float32" if " C=" in provider.name else "scaled" if scaled else "rounded"
    assert provider.bytes is not None
    return _fused(workload, provider.bytes(True), state, provider.name.startswith("AdamCG"))


def predictions() -> list[Prediction]:
    """Return those of every workload of a GPU, the baseline's first."""
    others = [p for p in providers("cuda") if not p.name.endswith(_NOT_PREDICTED)]
    return [
        Prediction(workload.name, provider.name, list(_launches(provider, workload)))
        for workload in workloads("cuda")
        for provider in (BASELINE, *others)
    ]


def _measured(results: dict[str, Any] | None) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the seconds, and the ratio to the baseline's, that a results file has."""
    of: dict[tuple[str, str], tuple[float, float]] = {}
    for case in results["cases"] if results else ():
        name = case["workload"]
        of.setdefault((name, BASELINE.name), (case["baseline_seconds"], 1.0))
        if case["regime"] in (REPLACING.name, NO_BUFFER.name):
            ratio = case["ratio_to_fused_adamw"]["median"]
            of[name, case["provider"]] = (case["seconds"], ratio)
    return of


def table(results: dict[str, Any] | None = None) -> str:
    """Return the predictions, with what a results file measured of them."""
    measured = _measured(results)
    rows, baseline = [], 1.0
    for prediction in predictions():
        if prediction.provider == BASELINE.name:
            baseline = prediction.seconds
        seconds, ratio = measured.get((prediction.workload, prediction.provider), (None, None))
        rows.append(
            [
                f"{prediction.workload}, {prediction.provider}",
                str(len(prediction.launches)),
                f"{max(launch.waves for launch in prediction.launches):.1f}",
                prediction.limit,
                f"{prediction.seconds * 1e6:,.0f}",
                "" if seconds is None else f"{seconds * 1e6:,.0f}",
                f"{prediction.seconds / baseline:.2f}",
                "" if ratio is None else f"{ratio:.2f}",
            ]
        )
    header = ["step", "launches", "waves", "limited by", "µs", "measured µs", "ratio"]
    return markdown.table([*header, "measured ratio"], rows)


def assumptions() -> str:
    """Return what is assumed of the machine."""
    peak, gap, load = PEAK_BYTES_PER_SECOND / 1e12, GAP_SECONDS * 1e6, LOAD_SECONDS * 1e6
    return (
        f"Assumed of an H200: {peak} TB/s at the peak, of which a copy reaches {COPY_SHARE:.0%}; "
        f"{MULTIPROCESSORS} multiprocessors of {REGISTERS:,} registers; {gap:g} µs before each "
        f"launch; {load:g} µs a load that another one waits for. `bench/speed/predict.py` says "
        "where each is from. Ratios are to `torch.optim.AdamW(fused=True)`."
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.predict")
    parser.add_argument("--results", type=Path, help="what bench.speed wrote on a GPU")
    parser.add_argument("--page", type=Path, help="page whose table to replace")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results else None
    text = f"{assumptions()}\n\n{table(results)}"
    if arguments.page:
        markdown.replace_section(arguments.page, "predictions", text)
    else:
        print(text)


if __name__ == "__main__":
    main()
