"""The bits that optimizers compute, frozen: runs of every option, and hashes of what they leave.

Only the public classes are used, so that nothing here changes when the code behind them does.

    python -m tests.support.frozen --write     run every backend anew and store the hashes
    python -m tests.support.frozen --compare   say which cases cpu and triton leave with other bits

Data come from a generator's integers and powers of two: no machine rounds them. The eager backend
adds in the order of torch's vector instructions, so its hashes are stored for each instruction set
(write them where torch has AVX512), and hold for one version of torch, where its roots are rounded
correctly. The compiled and the interpreted step depend on none of these.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cm_fused import SAM, AdamCG, AdamCM, AdamWCG, AdamWCM
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM

STORED = Path(__file__).parents[1] / "data" / "frozen_bits.json"
CAPABILITIES = ("default", "avx2", "avx512")
CLASSES: dict[str, Any] = {
    "AdamCM": AdamCM,
    "AdamWCM": AdamWCM,
    "AdamCG": AdamCG,
    "AdamWCG": AdamWCG,
    "SAM": AdamCM,
    "Adam_CM": Adam_CM,
    "Adam_C": Adam_C,
}
# What is hashed apart. The running sum of the slots follows from them, and which capacities have
# one, and how it is rebuilt, may change.
PARTS = ("parameters", "state", "running sum")
Hashes = list[str]


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        cls: A name of `CLASSES`.
        name: What is not the default, for ids.
        options: The constructor's keywords.
        dtype: Of the parameters.
        large: With the shapes that need several chunks of any kernel.
        steps: How many there are; the gradients of `SCALES` repeat.
        special: "groups", "lr tensor", "lr schedule", "amp" or "resumed": what else is done.
    """

    cls: str
    name: str = "default"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    large: bool = False
    steps: int = 12
    special: str = ""

    def __str__(self) -> str:
        return f"{self.cls}-{self.name}-{str(self.dtype).removeprefix('torch.')}"


# Cases

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
_SLOTS = (None, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
_MOMENTS = (None, torch.bfloat16, torch.int8)
# Every option away from its default, on its own.
_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("default", {}),
    ("amsgrad", {"amsgrad": True}),
    *((f"capacity={c}", {"capacity": c}) for c in (1, 2, 3, 4, 7, 10, 11)),
    ("priority_decay=0", {"priority_decay": 0.0}),
    ("priority_decay=1", {"priority_decay": 1.0}),
    ("priority_scope=tensor", {"priority_scope": "tensor"}),
    ("buffer_mean=size", {"buffer_mean": "size"}),
    ("eps_inside_sqrt=False", {"eps_inside_sqrt": False}),
    ("maximize", {"maximize": True}),
    ("max_grad_norm", {"max_grad_norm": 1.5}),
    ("skip_nonfinite", {"skip_nonfinite": True}),
    ("max_grad_norm-skip_nonfinite", {"max_grad_norm": 1.5, "skip_nonfinite": True}),
)
_LOW = {"buffer_dtype": torch.int8, "moment_dtype": torch.int8, "low_precision_update": "kahan"}
_SPECIAL = ("groups", "lr tensor", "lr schedule", "amp", "resumed")


def _of_options() -> Iterator[Case]:
    for cls, (name, options) in product(("AdamCM", "AdamWCM", "AdamCG", "AdamWCG"), _OPTIONS):
        yield Case(cls, name, options)
    for cls, special in product(("AdamWCM", "AdamWCG"), _SPECIAL):
        yield Case(cls, special.replace(" ", "_"), special=special)
    for cls in ("AdamCM", "AdamWCG"):
        yield Case(cls, "large-low", {**_LOW, "seed": 9}, torch.bfloat16, large=True, steps=6)
        # Long enough for every chunk to rebuild its running sum.
        yield Case(cls, "long", large=True, steps=22)
        yield Case(cls, "groups-max_grad_norm", {"max_grad_norm": 1.5}, special="groups")
        yield Case(cls, "groups-tensor", {"priority_scope": "tensor"}, special="groups")


def _of_dtypes() -> Iterator[Case]:
    for cls, dtype in product(("AdamCM", "AdamWCM", "AdamCG", "AdamWCG"), _FLOATS[1:]):
        yield Case(cls, dtype=dtype)
    for cls, dtype in product(("AdamCM", "AdamWCG"), _FLOATS):
        yield Case(cls, "large", dtype=dtype, large=True, steps=6)
    for update, dtype in product(("stochastic", "kahan"), _FLOATS):
        for cls in ("AdamWCM", "AdamCG") if dtype.itemsize == 2 else ("AdamCM",):
            yield Case(cls, update, {"low_precision_update": update, "seed": 5}, dtype)


def _of_precisions() -> Iterator[Case]:
    for cls, slots, moments in product(("AdamWCM", "AdamCG"), _SLOTS, _MOMENTS):
        if slots is not None or moments is not None:
            yield _stored(cls, slots, moments, 5, torch.float32)
    for cls, slots, moments in (
        ("AdamCM", torch.bfloat16, torch.bfloat16),
        ("AdamCM", torch.int8, torch.int8),
        ("AdamWCG", torch.float8_e4m3fn, torch.int8),
    ):
        yield _stored(cls, slots, moments, 5, torch.bfloat16)
    # On both sides of the capacities from which a running sum is kept.
    ends = ((torch.bfloat16, 6), (torch.bfloat16, 7), (torch.int8, 10), (torch.int8, 11))
    for cls, (slots, capacity) in product(("AdamCM", "AdamCG"), ends):
        yield _stored(cls, slots, None, capacity, torch.float32)
    for cls, moments in product(("AdamWCM", "AdamCG"), (None, torch.bfloat16)):
        yield _stored(cls, "int4", moments, 5, torch.float32)
    yield _stored("AdamCM", "int4", torch.bfloat16, 5, torch.bfloat16)
    for cls in ("AdamCM", "AdamCG"):
        yield _stored(cls, "int4", None, 26, torch.float32)


def _stored(cls: str, slots: Any, moments: Any, capacity: int, dtype: torch.dtype) -> Case:
    names = (str(stored).removeprefix("torch.") for stored in (slots, moments))
    options = {"buffer_dtype": slots, "moment_dtype": moments, "capacity": capacity, "seed": 3}
    name = "slots={}-moments={}-capacity={}".format(*names, capacity)
    # With 5 slots this is enough to fill, tie and replace.
    return Case(cls, name, options, dtype, steps=9 if capacity == 5 else 12)


def _of_torch() -> Iterator[Case]:
    yield Case("SAM")
    yield Case("SAM", "adaptive")
    for cls in ("Adam_CM", "Adam_C"):
        yield Case(cls)
        yield Case(cls, "kappa=0", {"kappa": 0.0})
        yield Case(cls, "synced=False", {"synced": False})
        yield Case(cls, "critical_test", {"critical_test": 0.5, "topC": 3})
        yield Case(cls, "weight_decay-amsgrad", {"weight_decay": 0.125, "amsgrad": True})
        yield Case(cls, "topC=3", {"topC": 3, "decay": 1.0}, torch.bfloat16)


CASES = [*_of_options(), *_of_dtypes(), *_of_precisions(), *_of_torch()]


# Data

# Powers of two; None repeats the last step's gradients, so that keys tie. The buffer fills,
# replaces (at 8 and 16) and skips (at 1/16).
SCALES = (1.0, 0.5, 2.0, 0.25, 4.0, None, 0.0, 1.0, 8.0, 0.0625, 16.0, 1.0)
# The step, counted in `SCALES`, and the parameter whose gradient is None.
MISSING = {(3, 1), (3, 2), (5, 2), (10, 0)}
NONFINITE_STEP = 7
# The first has its last element in a block and a chunk of its own.
SMALL = ((257,), ())
LARGE = ((1,), (3, 5), (4096 + 3,), (16384 + 7,))


class Data:
    """The parameters and gradients of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._source = torch.Generator().manual_seed(7)
        self._last: list[Tensor] = []
        values = [self._values(shape) for shape in SMALL]
        # Its memory is in another order than its gradient's.
        values.append(self._values((2, 3, 4, 5)).to(memory_format=torch.channels_last))
        if case.large:
            values += [self._values(shape) for shape in LARGE]
            # In rows with gaps.
            values.append(self._values((6, 14))[:, ::2])
        self.params = [torch.nn.Parameter(value) for value in values]

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        """Return multiples of 2^-22 in [-2, 2), whose sums round in float32; among them -0."""
        parts = 2 if self.case.dtype.is_complex else 1
        drawn = torch.randint(-(2**23), 2**23, (*shape, parts), generator=self._source)
        values = drawn.to(torch.float32) / 2**22
        values.view(-1)[4::50] = -0.0
        if parts == 2:
            return torch.view_as_complex(values)
        return values.squeeze(-1).to(self.case.dtype)

    def gradients(self, step: int) -> list[Tensor | None]:
        """Return the gradients of a step; the steps come in order."""
        t = step % len(SCALES)
        scale = SCALES[t]
        if scale is not None:
            drawn = [self._values(tuple(param.shape)) * scale for param in self.params]
            if self.case.large:
                drawn[-1] = drawn[-1].t().contiguous().t()
            self._last = drawn
        # SAM would perturb every parameter by it.
        if t == NONFINITE_STEP and self.case.cls != "SAM":
            self._last[0][-1] = torch.inf
        return [None if (t, i) in MISSING else grad for i, grad in enumerate(self._last)]


# Runs


class Run:
    """A case on a backend."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case, self.backend = case, backend
        self.data = Data(case)
        self.optimizer = self._make()
        self.scaler: Any = None
        if case.special == "amp":
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
            self.scaler.scale(torch.ones(()))
        self.sam: Any = None
        if case.cls == "SAM":
            self.sam = SAM(self.optimizer, rho=0.25, adaptive=case.name == "adaptive")

    def _make(self) -> Any:
        case, params = self.case, self.data.params
        options = {"lr": 0.03125, **case.options}
        groups: list[dict[str, Any]] = [{"params": params, "backend": self.backend}]
        if case.special == "groups":
            changed = {"lr": 0.125, "betas": (0.75, 0.875), "capacity": 3, "weight_decay": 0.25}
            groups = [{"params": params[:1]}, {"params": params[1:], **changed}]
            groups = [{**group, "backend": self.backend} for group in groups]
        if case.special == "lr tensor":
            options["lr"] = torch.tensor(0.03125)
        if case.special == "amp":
            options["amp_scaling"] = True
        if case.cls not in ("Adam_CM", "Adam_C"):
            options.setdefault("weight_decay", 0.125)
        return CLASSES[case.cls](groups, **options)

    def hashes(self) -> Hashes:
        """Take all steps; return the hashes of `PARTS`."""
        for step in range(self.case.steps):
            self._step(step)
        saved = self.optimizer.state_dict()
        params = [(str(i), param) for i, param in enumerate(self.data.params)]
        state: list[tuple[str, Any]] = []
        sums: list[tuple[str, Any]] = []
        for i, values in sorted(saved["state"].items()):
            # Always -1 in a state dict that is new.
            for key in sorted(values.keys() - {"pending_slot"}):
                (sums if key == "critical_sum" else state).append((f"{i}.{key}", values[key]))
        state += [(f"group {i}", group) for i, group in enumerate(self._counts(saved))]
        return [_hash(part) for part in (params, state, sums)]

    @staticmethod
    def _counts(saved: dict[str, Any]) -> list[Any]:
        return [group.get("skipped_steps") for group in saved["param_groups"]]

    def _step(self, step: int) -> None:
        grads = self.data.gradients(step)
        if self.case.special == "lr schedule":
            self.optimizer.param_groups[0]["lr"] = 2.0 ** -(5 + step % 3)
        if self.case.special == "resumed" and step in (1, 7):
            saved = self.optimizer.state_dict()
            self.optimizer = self._make()
            self.optimizer.load_state_dict(saved)
        self._set(grads, 1.0 if self.scaler is None else self.scaler.get_scale())
        if self.sam is not None:
            self.sam.step(self._closure(grads))
        elif self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _set(self, grads: list[Tensor | None], scale: float = 1.0) -> None:
        for param, grad in zip(self.data.params, grads, strict=True):
            param.grad = grad if grad is None or scale == 1 else grad * scale

    def _closure(self, grads: list[Tensor | None]) -> Callable[[], float]:
        """Return a closure whose gradients depend on the parameters, as a loss's do."""

        def closure() -> float:
            at = [
                None if grad is None else grad + param.detach() / 4
                for param, grad in zip(self.data.params, grads, strict=True)
            ]
            self._set(at)
            return 0.0

        return closure


def _hash(tensors: list[tuple[str, Any]]) -> str:
    """Return a hash of names, dtypes, shapes and bits; all NaNs are one, "" is nothing's."""
    if not tensors:
        return ""
    total = hashlib.sha256()
    for name, tensor in tensors:
        if isinstance(tensor, Tensor):
            described = f"{name} {tensor.dtype} {tuple(tensor.shape)} "
            total.update(described.encode() + _bytes(tensor.detach()))
        else:
            total.update(f"{name} {tensor!r} ".encode())
    return total.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    real = real.to("cpu", copy=True).contiguous()
    if real.is_floating_point():
        # Which NaN an operation of two gives is each compiler's own choice.
        nan = torch.full((), torch.nan).to(real.dtype)
        real = torch.where(real.float().isnan(), nan, real)
    return real.reshape(-1).view(torch.uint8).numpy().tobytes()


def unavailable_reason(backend: str) -> str | None:
    """Return why this process cannot run a backend on the CPU's tensors as others do, or None."""
    try:
        AdamCM([torch.zeros(1, requires_grad=True)], backend=backend)
    except RuntimeError as error:
        return str(error)
    if backend == "eager" and not _has_exact_roots():
        return "torch's roots are not rounded correctly on this processor: MKL has others for each"
    return None


def _has_exact_roots() -> bool:
    """Return whether torch rounds float32 roots correctly. On a Xeon with AMX it does not."""
    values = torch.arange(1.0, 65537.0)
    return torch.equal(values.sqrt(), values.double().sqrt().float())


# What is stored


def stored() -> dict[str, Any]:
    """Return what `--write` stored: "torch" (its version) and "bits", by place and case."""
    loaded: dict[str, Any] = json.loads(STORED.read_text())
    return loaded


def place_of(backend: str) -> str:
    """Return where a backend's hashes are stored on this machine."""
    if backend != "eager":
        return backend
    # torch's "DEFAULT" is SSE on x86-64, NEON on arm64, and they add up in other orders.
    machine = "" if platform.machine() in ("x86_64", "AMD64") else f"{platform.machine()} "
    return f"eager {machine}{torch.backends.cpu.get_cpu_capability()}"


def _run_all(backend: str) -> dict[str, dict[str, Hashes]]:
    torch.set_num_threads(1)
    if backend == "triton":
        importlib.import_module("tests.support.interpreter").mend()
    return {place_of(backend): {str(case): Run(case, backend).hashes() for case in CASES}}


def _run_apart(backend: str, capability: str) -> dict[str, dict[str, Hashes]]:
    """Run a backend in a process of its own: instruction set and interpreter are chosen there."""
    chosen = {"ATEN_CPU_CAPABILITY": capability, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.frozen", "--run", backend],
        env={**os.environ, **chosen},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, dict[str, Hashes]] = json.loads(finished.stdout)
    return found


def _write() -> None:
    bits: dict[str, dict[str, Hashes]] = {}
    for capability in CAPABILITIES:
        bits.update(_run_apart("eager", capability))
    bits.update(_run_apart("cpu", CAPABILITIES[-1]))
    bits.update(_run_apart("triton", CAPABILITIES[-1]))
    places = ",\n".join(
        f' "{place}": {{\n{_lines(cases)}\n }}' for place, cases in sorted(bits.items())
    )
    STORED.write_text(
        f'{{"torch": "{torch.__version__.split("+")[0]}", "bits": {{\n{places}\n}}}}\n'
    )


def _lines(cases: dict[str, Hashes]) -> str:
    return ",\n".join(f'  "{name}": {json.dumps(hashes)}' for name, hashes in cases.items())


def _compare() -> None:
    bits = stored()["bits"]
    cpu, triton = bits["cpu"], bits["triton"]
    differing = [
        (name, [part for part, a, b in zip(PARTS, cpu[name], triton[name], strict=True) if a != b])
        for name in cpu
    ]
    same = [name for name, parts in differing if not set(parts) - {"running sum"}]
    print(f"cpu and triton: {len(same)} of {len(cpu)} cases have the same parameters and state")
    for name, parts in differing:
        if name not in same:
            print(f"  {name}: {', '.join(parts)}")


def main() -> None:
    """Do what the module's docstring says."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.frozen")
    parser.add_argument("--write", action="store_true", help="store the hashes anew")
    parser.add_argument("--compare", action="store_true", help="compare cpu and triton")
    parser.add_argument("--run", metavar="BACKEND", help="print a backend's hashes as JSON")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(_run_all(arguments.run)))
    if arguments.write:
        _write()
    if arguments.compare:
        _compare()


if __name__ == "__main__":
    main()
