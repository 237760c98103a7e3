"""Checks of options. Every message names the option.

Those of parameters and gradients are in `cm_fused._optimizer.tensor_checks`.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cm_fused._backends.select import NAMES
from cm_fused._distributed import partitioner
from cm_fused._state.table import DTYPE_OPTIONS, as_dtype
from cm_fused.rounding import INT4

BUFFER_DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.int8, INT4),
)
MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_CHOICES: dict[str, tuple[object, ...]] = {
    "priority_scope": ("group", "tensor"),
    "buffer_mean": ("capacity", "size"),
    "backend": (None, *NAMES),
    "buffer_dtype": (None, *BUFFER_DTYPES),
    "moment_dtype": (None, *MOMENT_DTYPES),
    "low_precision_update": ("nearest", "stochastic", "kahan", "split"),
    "adjust_lr_fn": (None, "match_rms_adamw"),
}
# Unlike `skip_nonfinite` and `amp_scaling` they may also be 0 or 1.
FLAGS = ("amsgrad", "capturable", "eps_inside_sqrt", "maximize", "decoupled_weight_decay")
_Rule = tuple[str, Callable[[float], bool]]
# By comparisons, which torch.compile can trace.
_FINITE: _Rule = ("finite", lambda x: abs(x) < math.inf)
NOT_NEGATIVE: _Rule = ("finite and >= 0", lambda x: 0 <= x < math.inf)
IN_UNIT_INTERVAL: _Rule = ("in [0, 1]", lambda x: 0 <= x <= 1)
_NUMBERS: dict[str, _Rule] = dict.fromkeys(("lr", "eps", "weight_decay"), NOT_NEGATIVE)
_NUMBERS["priority_decay"] = IN_UNIT_INTERVAL
# A scheduler may have made lr and weight decay negative.
_IN_TRAINING = {**_NUMBERS, "lr": _FINITE, "weight_decay": _FINITE}
# The rules of the numbers that do not change at every step, as lr does.
_SET_BY_HAND = {name: rule for name, rule in _IN_TRAINING.items() if name != "lr"}
# The numbers that `check_numbers` checks; betas are where they are read.
CHECKED_NUMBERS = (*_SET_BY_HAND, "max_grad_norm", "seed")


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as groups have them: Python's numbers, dtypes, betas as a tuple.

    Configuration files and schedulers give NumPy's scalars, names of dtypes, lists, arrays and
    OmegaConf's lists.
    """
    plain = dict(zip(options, _python_numbers(options.values()), strict=True))
    for name in plain.keys() & DTYPE_OPTIONS:
        plain[name] = as_dtype(plain[name])
    betas = plain.get("betas")
    if not isinstance(betas, (str, bytes, Mapping, Set)):
        with contextlib.suppress(TypeError):  # a single number, say, which the check refuses
            plain["betas"] = tuple(_python_numbers(betas))  # type: ignore[arg-type]
    return plain


def _python_numbers(values: Iterable[Any]) -> list[Any]:
    """Return values with Python's numbers for NumPy's scalars; NumPy is not imported for it."""
    return [
        value.item()
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
        else value
        for value in values
    ]


def check_options(options: Mapping[str, Any], *, in_training: bool = False) -> None:
    """Check hyperparameters as `plain_options` returns them; ValueError where one is out of range.

    A scheduler may make a run's learning rate and weight decay negative, and its checkpoint must
    load: `in_training` lets them pass.
    """
    lr, betas = options["lr"], options["betas"]
    _check_one_element(lr)
    _require(isinstance(betas, tuple) and len(betas) == 2, "betas must be a pair of floats", betas)
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, "in [0, 1)", lambda x: 0 <= x < 1)
    _check_numbers(options, _IN_TRAINING if in_training else _NUMBERS)
    check_capacity(options["capacity"])
    for name in _CHOICES:
        _check_choice(name, options[name])
    _check_implementation(options)
    for name in FLAGS:
        _check_flag(name, options[name])
    _check_skip(options["skip_nonfinite"])
    amp_scaling = options["amp_scaling"]
    _require(isinstance(amp_scaling, bool), "amp_scaling must be a bool", amp_scaling)
    _check_skipped_steps(options.get("skipped_steps", 0))


def _check_numbers(options: Mapping[str, Any], rules: Mapping[str, _Rule]) -> None:
    """Check the numbers that have a rule, the clipping norm and the seed."""
    for name, (rule, holds) in rules.items():
        check_number(name, options[name], rule, holds)
    max_grad_norm = options["max_grad_norm"]
    if max_grad_norm is not None:
        rule = "None or finite and > 0"
        check_number("max_grad_norm", max_grad_norm, rule, lambda x: 0 < x < math.inf)
    seed = options["seed"]
    _require(_is_int(seed) and 0 <= seed < 2**63, "seed must be an int in [0, 2^63)", seed)


def check_numbers(options: Mapping[str, Any]) -> None:
    """Check the numbers that a step reads, except lr, which may have changed by hand."""
    values = _python_numbers([options[name] for name in CHECKED_NUMBERS])
    _check_numbers(dict(zip(CHECKED_NUMBERS, values, strict=True)), _SET_BY_HAND)


def check_lrs(lrs: Iterable[object]) -> None:
    """Check learning rates that have changed; those in tensors may be on a device, and pass."""
    for lr in lrs:
        # In the order of what is fast: a scheduler changes them at every step.
        if type(lr) is float and math.isfinite(lr):
            continue
        _check_one_element(lr)
        if isinstance(lr, Tensor):
            continue
        (number,) = _python_numbers([lr])
        check_number("lr", number, *_FINITE)


def _check_one_element(lr: object) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {tuple(lr.shape)!r}")


def check_choices(options: Mapping[str, Any]) -> None:
    """Check the capacity and named choices that a step reads, which may have changed by hand."""
    check_capacity(options["capacity"])
    for name in _CHOICES:
        value = options[name]
        _check_choice(name, as_dtype(value) if name in DTYPE_OPTIONS else value)


def check_flags(options: Mapping[str, Any]) -> None:
    """Check that `FLAGS` are flags, as NumPy's are too, and that `skip_nonfinite` is a bool."""
    for name, value in zip(FLAGS, _python_numbers([options[name] for name in FLAGS]), strict=True):
        _check_flag(name, value)
    _check_skip(*_python_numbers([options["skip_nonfinite"]]))


def _check_choice(name: str, value: object) -> None:
    choices = _CHOICES[name]
    if value not in choices:
        names = ", ".join(map(repr, choices))
        also = ", or a name such as 'bfloat16'" if name in DTYPE_OPTIONS else ""
        raise ValueError(f"{name} must be one of {names}{also}, got {value!r}")


def _check_flag(name: str, value: object) -> None:
    is_flag = isinstance(value, int) and value in (0, 1)
    _require(is_flag, f"{name} must be True or False", value)


def _check_skip(skip_nonfinite: object) -> None:
    _require(isinstance(skip_nonfinite, bool), "skip_nonfinite must be a bool", skip_nonfinite)


def _check_skipped_steps(count: object) -> None:
    """Check the count that a saved group has: an int, or a tensor that may be on a device."""
    if isinstance(count, Tensor):
        is_count = count.numel() == 1 and count.dtype in (torch.int64, torch.int32)
    else:
        is_count = _is_int(count) and count >= 0
    _require(is_count, "skipped_steps must be an int >= 0 or a tensor of one", count)


def _check_implementation(options: Mapping[str, Any]) -> None:
    """Check the options by which torch's optimizers choose an implementation."""
    _require(
        options["foreach"] is None or options["foreach"] is False,
        "foreach must be None or False: the fused backends step all tensors in one pass, with "
        "fused=True or by default",
        options["foreach"],
    )
    _require(
        options["fused"] is None or options["fused"] is True,
        "fused must be None or True: None takes the best backend there is, and backend='eager' the "
        "one that is not fused",
        options["fused"],
    )
    _require(
        not options["fused"] or options["backend"] != "eager",
        "backend must be None, 'cpu' or 'triton' with fused=True",
        options["backend"],
    )


def check_capacity(capacity: object) -> None:
    """Check a number of slots."""
    _require(_is_int(capacity) and capacity >= 0, "capacity must be an int >= 0", capacity)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def check_amp_scaling(value: bool, default: bool) -> None:
    """Check that a group does not change an option of the whole optimizer."""
    rule = f"amp_scaling must be the same for all param groups, {default}"
    _require(value == default, rule, value)


def check_partitioner(options: Mapping[str, Any]) -> None:
    """Check that a group needs no norm over parameters that its optimizer does not get."""
    name = partitioner()
    if name is None:
        return
    if name == "ShardedOptimizer":
        raise ValueError(
            "params must be whole parameters, got the local shards of ShardedOptimizer, whose "
            "norms are not the parameters'; shard with fully_shard or parallelize_module"
        )
    scope = options["priority_scope"]
    _require(
        scope == "tensor",
        f"priority_scope must be 'tensor' under {name}, whose optimizers do not have all gradients "
        "of a group; pass priority_scope='tensor', or give all parameters to one optimizer "
        "(fully_shard shards them)",
        scope,
    )
    for option, off in (("max_grad_norm", None), ("skip_nonfinite", False)):
        _require(
            options[option] == off,
            f"{option} must be {off} under {name}, whose optimizers do not have all gradients; use "
            "torch.nn.utils.clip_grad_norm_",
            options[option],
        )


def _require(condition: bool, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {value!r}")


def check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    """Check that an argument is a number for which a rule holds."""
    number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
    if not (number and holds(float(value))):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def check_captured_lrs(groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that no learning rate can change which a graph would keep as it is captured."""
    for i, group in enumerate(groups):
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type == "cpu":
            raise RuntimeError(
                f"a captured step needs a tensor lr on the parameters' device, got that of group "
                f"{i} on cpu, whose changes no replay would see; move it there, or pass a number"
            )
