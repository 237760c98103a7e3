"""The specializations of the Triton pass, and their compilation; needs no GPU.

What this bench takes from inside the package are the kernels, as launches compile them.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import internals
from bench.speed import bytes as byte_model
from bench.speed.bytes import Bytes
from cm_fused._backends.triton import kernels as triton_kernels
from cm_fused._backends.triton.variants import TRITON_DTYPES, launch_options, precision
from cm_fused.rounding import INT4, PACKED

WARP = 32
_POINTERS = {
    "table_ptr": "*i64",
    "chunks_ptr": "*i32",
    "chunk_sq_norms_ptr": "*fp64",
}


@dataclass(frozen=True)
class Variant:
    """One specialization of `critical_adam_kernel`; the attributes are its constexprs."""

    param_dtype: torch.dtype
    critical_gradients: bool
    amsgrad: bool
    summed_slots: int
    moment_dtype: torch.dtype | None = None
    slot_dtype: torch.dtype | None = None
    update: str = "nearest"
    grad_dtype: torch.dtype | None = None

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the arithmetic, and of state that no option rounds."""
        return torch.float64 if self.param_dtype is torch.float64 else torch.float32

    @property
    def name(self) -> str:
        """Its name in the table."""
        kind = "CG" if self.critical_gradients else "CM"
        buffers = {-1: "no buffer", 0: "running sum"}
        buffer = buffers.get(self.summed_slots, f"{self.summed_slots} slots")
        words = ["rounded"] if self.moment_dtype or self.slot_dtype else []
        words += [_short(self.param_dtype), kind, buffer]
        words += [f"{_short(self.grad_dtype)} gradients"] if self.grad_dtype else []
        words += [_short(self.slot_dtype)] if self.slot_dtype else []
        words += [f"{_short(self.moment_dtype)} moments"] if self.moment_dtype else []
        words += ["amsgrad"] if self.amsgrad else []
        return " ".join(words + ([self.update] if self.update != "nearest" else []))

    def precision(self) -> dict[str, Any]:
        """Return those of them that say how state and parameters are stored."""
        slots = PACKED if self.slot_dtype is INT4 else self.slot_dtype
        return precision(
            self.param_dtype,
            self.moment_dtype or self.state_dtype,
            slots or self.state_dtype,
            self.update,
        )

    def constexprs(self) -> dict[str, Any]:
        """Return the kernel's compile-time arguments."""
        return {
            "lr_ptr": None,
            "grad_factor_ptr": None,
            "found_inf_ptr": None,
            "PARAM_DTYPE": TRITON_DTYPES[self.param_dtype],
            "GRAD_DTYPE": TRITON_DTYPES[self.grad_dtype or self.param_dtype],
            "STATE_DTYPE": TRITON_DTYPES[self.state_dtype],
            **self.precision(),
            "CRITICAL_GRADIENTS": self.critical_gradients,
            "AMSGRAD": self.amsgrad,
            "SUMMED_SLOTS": self.summed_slots,
            "BY_FOURS": True,
            "PTX": True,
        }

    def model(self) -> Bytes:
        """Return what the byte model says the pass accesses where it replaces a slot."""
        return byte_model.triton_pass(
            self.amsgrad,
            self.summed_slots,
            param_bytes=self.param_dtype.itemsize,
            grad_bytes=(self.grad_dtype or self.param_dtype).itemsize,
            state_bytes=self.state_dtype.itemsize,
            moment_bytes=(self.moment_dtype or self.state_dtype).itemsize,
            slot_bytes=byte_model.slot_bytes(self.slot_dtype or self.state_dtype),
            rounding_bytes=2 if self.update in ("kahan", "split") else 0,
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_variants() -> list[Variant]:
    """Return variants with state of low precision at C = 5, and a running sum: every rounding."""
    int4, int8, half = INT4, torch.int8, torch.bfloat16
    states: list[tuple[torch.dtype | None, torch.dtype]]
    states = [(None, slot) for slot in (half, torch.float16, torch.float8_e4m3fn, int8, int4)]
    states += [(half, int8), (half, int4), (int8, int8)]
    of_float32 = [
        Variant(torch.float32, gradients, False, slots, moment, slot)
        for gradients in (False, True)
        for slots in (5, 0)
        for moment, slot in states
    ]
    of_halves = [
        Variant(dtype, False, False, 5, half, int8, update)
        for dtype in (torch.bfloat16, torch.float16)
        for update in ("nearest", "stochastic", "kahan")
    ]
    of_masters = [
        Variant(half, False, False, slots, moment, slot, "split")
        for slots, moment, slot in ((0, None, None), (5, half, int8))
    ]
    return of_float32 + of_halves + of_masters


def variants() -> list[Variant]:
    """Return every variant of unrounded state, with a number as learning rate, and rounded ones."""
    unrounded = [
        Variant(dtype, critical_gradients, amsgrad, slots)
        for dtype, critical_gradients, amsgrad in itertools.product(
            TRITON_DTYPES, (False, True), (False, True)
        )
        for slots in range(-1, internals.running_sum_min_capacity())
    ]
    lower_gradients = [
        Variant(torch.float32, critical_gradients, False, slots, grad_dtype=grad_dtype)
        for critical_gradients, slots, grad_dtype in itertools.product(
            (False, True), (-1, 0), (torch.bfloat16, torch.float16)
        )
    ]
    return unrounded + rounded_variants() + lower_gradients


def compile_variant(variant: Variant, arch: int) -> Any:
    """Compile a variant with the signature, alignment and options of a launch."""
    kernel = triton_kernels.critical_adam_kernel
    constexprs = variant.constexprs()
    signature = {
        param.name: "constexpr"
        if param.name in constexprs
        else _POINTERS.get(param.name) or param.annotation_type
        for param in kernel.params
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        # The only pointer whose alignment launches specialize on; torch allocates at 16 and more.
        attrs={(list(signature).index("table_ptr"),): [["tt.divisibility", 16]]},
    )
    options = launch_options(
        TRITON_DTYPES[variant.param_dtype],
        variant.precision()["MOMENT_DTYPE"],
        variant.precision()["SLOT_DTYPE"],
        variant.amsgrad,
        variant.summed_slots,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
