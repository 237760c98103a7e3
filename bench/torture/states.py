"""What an optimizer has of each parameter, seen without a change to it."""

import torch
from torch import Tensor

from bench.torture.finding import require
from cm_fused import reference
from cm_fused._optimizer.base import CriticalAdam

View = dict[str, Tensor]


def views(optimizer: CriticalAdam, params: list[Tensor]) -> list[View]:
    """Return copies of each parameter and its state, complex ones as pairs.

    A commit that is pending is made in the copies alone: `state_dict()` would make it in the
    optimizer, and the one that a step makes by itself would never be seen.
    """
    return [_view(param, optimizer.state.get(param, {})) for param in params]


def _view(param: Tensor, state: dict[str, Tensor]) -> View:
    view = {key: _real_copy(value) for key, value in state.items()}
    pending = view.pop("pending_slot", None)
    if pending is not None:
        reference.commit_(
            view["exp_avg"],
            view["critical_buffer"],
            view.get("critical_sum"),
            pending,
            view.get("critical_scales"),
            view.get("exp_avg_scales"),
        )
    largest = view.get("max_exp_avg_sq")
    if largest is not None and not largest.any():
        # Loading makes what amsgrad, turned on since, would have made at the next step.
        del view["max_exp_avg_sq"]
    return {"param": _real_copy(param.detach()), **view}


def _real_copy(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).clone()


def require_same_bits(
    actual: list[View], expected: list[View], what: str, *, may_be_others: bool = False
) -> None:
    """Raise unless every tensor has the same bits.

    Args:
        actual: What is compared.
        expected: What it is to be.
        what: For the message.
        may_be_others: State may have been made, and derived state, another backend's, dropped.
    """
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        require(
            may_be_others or one.keys() == other.keys(),
            f"{what}: parameter {i} has {sorted(one)}, should have {sorted(other)}",
        )
        for key, value in other.items():
            if may_be_others and key == "critical_sum":
                continue
            if not _same_bits(one[key], value):
                raise AssertionError(
                    f"{what}: {key} of parameter {i} is {one[key]}, should be {value}"
                )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def require_close(
    actual: list[View], expected: list[View], rtol: float, size: float, key_rtol: float
) -> None:
    """Raise unless the state is that of the reference, to the roundings of another order.

    Args:
        actual: What is compared; of a running sum, whether it is that of the slots.
        expected: What it is to be.
        rtol: Of `size`; of a square, its square; of a parameter, its largest value and 1.
        size: The largest gradient so far: a moment keeps its roundings.
        key_rtol: Of keys.
    """
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        expected_view = dict(other)
        if "critical_sum" in one:
            expected_view["critical_sum"] = other["critical_buffer"].sum(0)
        require(
            one.keys() == expected_view.keys(),
            f"parameter {i} has {sorted(one)}, should have {sorted(expected_view)}",
        )
        bounds = {
            "step": 0.0,
            "priorities": 0.0,
            "param": rtol * (1.0 + _largest(other["param"])),
            "exp_avg_sq": rtol * size * size,
            "max_exp_avg_sq": rtol * size * size,
        }
        for key, value in expected_view.items():
            atol = bounds.get(key, rtol * size)
            near = torch.isclose(one[key], value, key_rtol if key == "priorities" else 0.0, atol)
            if not near.all():
                raise AssertionError(f"{key} of parameter {i} is {one[key]}, should be {value}")


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
