"""Triton's interpreter, mended: kernels run on CPU tensors as they would on a device.

Imported before the kernels are. TRITON_INTERPRET=1 has to be set then, see `tests/conftest.py`.

Most of the time of an interpreted kernel is not numpy's: the interpreter makes the same types and
shapes again for every operation. What is quicker here has the same results and the same errors.
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_get_np_dtype = interpreter._get_np_dtype
_patch_lang = interpreter._patch_lang
_patched: list[Any] = []
_builtin_code = core.builtin(lambda: None).__code__
_init_block_type = core.block_type.__init__
_equal_dtypes = core.dtype.__eq__
_equal_tuples = core.tuple.__eq__
_unwrap_if_constexpr = core._unwrap_if_constexpr
_broadcast = semantic.TritonSemantic.broadcast_impl_value
_check_types = semantic.TritonSemantic.binary_op_type_checking_impl

_np_dtypes: dict[str, Any] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_constants: dict[tuple[Any, ...], Any] = {}
_TRUE = core.constexpr(True)
_PLAIN = {int, float, bool, type(None), tl.dtype, tl.tensor}


def _convert_float_as_devices_do(
    values: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any
) -> Any:
    """Round float32 to bfloat16 to nearest even, as every device does; theirs cuts it off."""
    if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
        return _convert_float(values, from_dtype, to_dtype, rounding_mode)
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy()


class _NothingToRestore:
    def restore(self) -> None:
        """Leave triton.language as it is: this process compiles nothing."""


def _patch_once(function: Any) -> Any:
    """Patch triton.language for this process; theirs does it for each launch and each call."""
    if not _patched:
        _patched.append(_patch_lang(_language))
        # Triton 3.6 converts an array of one element as a whole, which numpy no longer does.
        tl.tensor.__index__ = lambda self: self.handle.data.item()
    return _NothingToRestore()


def _language() -> tuple[Any, Any]:
    """Stand for a kernel whose globals name every module that is to be patched."""
    return tl, core


def _patch_attr(owner: Any, name: str, member: Any, *_: Any) -> None:
    """Let a builtin be called outside of compiled functions."""
    is_builtin = getattr(member, "__code__", None) is _builtin_code
    function = member.__wrapped__ if is_builtin else member

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **kwargs)

    setattr(owner, name, call)


def _cached_np_dtype(dtype: Any) -> Any:
    """Return the numpy dtype of a scalar or block type; theirs makes its table each time."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _get_np_dtype(dtype)
    return _np_dtypes[name]


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """Make a tensor; all of one shape share it."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensors if type.is_block() else _OF_SCALARS


def _init_block_type_once(self: Any, element_type: Any, shape: Any) -> None:
    """Make a type of blocks, or the same as an older one."""
    sizes = tuple(map(_unwrap, shape))
    space = element_type.address_space if element_type.is_ptr() else None
    key = (element_type.name, space, sizes)
    if key not in _block_types:
        _init_block_type(self, element_type, shape)
        self.of_tensors = _of_tensors(sizes)
        _block_types[key] = dict(self.__dict__)
    self.__dict__.update(_block_types[key])


@cache
def _of_tensors(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the shape of tensors and their number of elements."""
    shape = core.tuple([core.constexpr(size) for size in sizes])
    return shape, core.constexpr(math.prod(sizes))


_OF_SCALARS = _of_tensors(())


def _are_equal_dtypes(self: Any, other: Any) -> Any:
    return self is other or _equal_dtypes(self, other)


def _are_equal_tuples(self: Any, other: Any) -> Any:
    if self is other:
        return _TRUE
    if type(other) is list and all(type(each) is int for each in other):
        return core.constexpr(self.values == other)
    return _equal_tuples(self, other)


def _unwrap(value: Any) -> Any:
    """Return the value of a constexpr, and others as they are; of lists, of each item."""
    return value if type(value) in _PLAIN else _unwrap_if_constexpr(value)


def _broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(self, lhs, rhs)


def _check_other_types(self: Any, lhs: Any, rhs: Any, *rules: Any, **more: Any) -> Any:
    """Only broadcast two operands of one type; make a tensor of a number once.

    The first two rules are about pointers; by others, a quotient may be of another type.
    """
    if type(lhs) is type(rhs) is tl.tensor:
        same = lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr()
        if same and len(rules) < 3 and not more:
            return _broadcast_others(self, lhs, rhs)
    elif type(lhs) is tl.tensor:
        # -0.0 is another number than 0.0, and 1 than 1.0.
        key = (lhs.dtype.name, id(lhs.shape), type(rhs), repr(rhs), rules, *more.items())
        if key in _constants:
            return lhs, _constants[key]
        checked, constant = _check_types(self, lhs, rhs, *rules, **more)
        if checked is lhs:
            constant.handle.data.setflags(write=False)
            _constants[key] = constant
        return checked, constant
    return _check_types(self, lhs, rhs, *rules, **more)


def mend() -> None:
    """Correct and speed up the interpreter of this process."""
    interpreter._convert_float = _convert_float_as_devices_do
    interpreter._patch_lang = _patch_once
    interpreter._patch_attr = _patch_attr
    interpreter._get_np_dtype = _cached_np_dtype
    tl.tensor.__init__ = _init_tensor
    core.block_type.__init__ = _init_block_type_once
    core.dtype.__eq__ = _are_equal_dtypes
    core.tuple.__eq__ = _are_equal_tuples
    core._unwrap_if_constexpr = _unwrap
    semantic.TritonSemantic.broadcast_impl_value = _broadcast_others
    semantic.TritonSemantic.binary_op_type_checking_impl = _check_other_types
    # What it computes of an overflow is an assertion for debugging, which it then leaves out.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
