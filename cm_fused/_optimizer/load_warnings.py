"""What a load warns of: state and options that a state dict brings from another optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cm_fused._optimizer.state_dict import AS_VALUES, KIND
from cm_fused._state.table import DTYPE_OPTIONS, as_dtype
from cm_fused._warnings import warn

# Options of Adam that a load warns of: those whose best values differ for an update with critical
# momenta, and those that would change a run unnoticed.
ADAM_OPTIONS = (
    *("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad"),
    *("maximize", "capturable"),
)


def warn_of_conversion(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """Warn of groups whose state was saved in another precision than theirs."""
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        # A checkpoint of torch.optim has no buffer.
        names = DTYPE_OPTIONS if "capacity" in saved else ("moment_dtype",)
        for name in names:
            # Saved by its name, in older state dicts by itself.
            own, other = (_dtype_of(options.get(name)) for options in (group, saved))
            if own != other:
                warn(
                    f"the state of group {i} was saved with {name}={other} and is converted to "
                    f"this optimizer's {name}={own}"
                )


def _dtype_of(option: Any) -> Any:
    name = option.removesuffix(AS_VALUES) if isinstance(option, str) else option
    return as_dtype(name) or torch.float32


def warn_of_other_slots(critical_gradients: bool, state_dict: Mapping[str, Any]) -> None:
    """Warn of slots that were saved by the other kind of optimizer."""
    stored, wanted = "critical gradients", "critical momenta"
    if critical_gradients:
        stored, wanted = wanted, stored
    kinds = {group.get(KIND, critical_gradients) for group in state_dict["param_groups"]}
    if kinds == {critical_gradients} or not _has_slots(state_dict):
        return
    warn(
        f"the state dict has slots of {stored}, and this optimizer takes them for {wanted}. To "
        "begin with an empty buffer, delete 'critical_buffer' and 'priorities' from each "
        "parameter's entry of state_dict['state'] before it is loaded"
    )


def _has_slots(state_dict: Mapping[str, Any]) -> bool:
    states = (state for state in state_dict["state"].values() if isinstance(state, Mapping))
    return any("critical_buffer" in state for state in states)


def warn_of_another_kind(
    groups: list[dict[str, Any]], loaded: list[dict[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Warn of the options that a state dict of another kind of optimizer brings.

    Those of torch.optim have neither a capacity nor buffers. `loaded` are the groups with the
    options of the state dict.
    """
    saved_groups = state_dict["param_groups"]
    if any("capacity" in saved for saved in saved_groups) or _has_slots(state_dict):
        return
    taken = [
        f"group {i}: {changes}"
        for i, (group, new, saved) in enumerate(zip(groups, loaded, saved_groups, strict=True))
        if (changes := _changes(group, new, saved))
    ]
    if taken:
        warn(
            "the state dict is of another optimizer and brings options that were chosen for its "
            f"update, not for this one's ({'; '.join(taken)}). To keep this optimizer's own, "
            "delete them from the groups of state_dict['param_groups'] before it is loaded, or set "
            "them in optimizer.param_groups afterwards. With adjust_lr_fn='match_rms_adamw' a "
            "learning rate and weight decay of AdamW carry over"
        )


def _changes(group: dict[str, Any], new: dict[str, Any], saved: Mapping[str, Any]) -> str:
    """Return which of Adam's options change and do not carry over, with their values."""
    carry_over = ("lr", "weight_decay") if new["adjust_lr_fn"] is not None else ()
    return ", ".join(
        f"{name}={_number(new[name])!r} instead of {_number(group[name])!r}"
        for name in ADAM_OPTIONS
        if name not in carry_over and name in saved and _number(new[name]) != _number(group[name])
    )


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
