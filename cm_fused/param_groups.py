"""Param groups with and without weight decay."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn


def param_groups_weight_decay(
    model: nn.Module,
    weight_decay: float = 1e-2,
    no_weight_decay_list: Iterable[str] = (),
    *,
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Return a model's parameters in two groups, of which one has no weight decay.

    Biases and the parameters of norms get no weight decay: all parameters of at most one dimension,
    and those whose names end in ".bias". Frozen parameters are in neither group. Every optimizer
    takes these groups. A group without parameters is left out.

    With `priority_scope="group"` each group has a norm of its own, over its own gradients, as all
    param groups do. Call it before a wrapper that flattens parameters.

    Source: the name and the first three arguments are those of timm's `param_groups_weight_decay`.

    Args:
        model: Its parameters are not changed.
        weight_decay: That of the other parameters.
        no_weight_decay_list: Names of more parameters without weight decay, as
            `model.named_parameters()` has them, or patterns such as "head.*". A shared parameter
            has only its first name there.
        decay_embeddings: Whether the weights of `torch.nn.Embedding` and `EmbeddingBag` get weight
            decay, also where another module shares them.

    Raises:
        TypeError: `model` is not a module, or `no_weight_decay_list` is a single string or has
            something else than names.

    Example:
        >>> import torch
        >>> from cm_fused import AdamWCM, param_groups_weight_decay
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        >>> optimizer = AdamWCM(param_groups_weight_decay(model, 0.1))
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(3, 0.0), (1, 0.1)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(no_weight_decay_list, str):
        raise TypeError(
            "no_weight_decay_list must be a collection of names, got the string "
            f"{no_weight_decay_list!r}; put it into a list"
        )
    no_weight_decay_list = list(no_weight_decay_list)  # an iterator can be read only once
    for item in no_weight_decay_list:
        if not isinstance(item, str):
            raise TypeError(
                f"no_weight_decay_list must have names, got an item of type {type(item).__name__}"
            )
    embeddings = set() if decay_embeddings else _embedding_ids(model)
    no_decay: list[Tensor] = []
    decay: list[Tensor] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            excluded = id(param) in embeddings or _is_excluded(name, param, no_weight_decay_list)
            (no_decay if excluded else decay).append(param)
    groups: list[dict[str, Any]] = [
        {"params": no_decay, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _is_excluded(name: str, param: Tensor, patterns: Sequence[str]) -> bool:
    """Return whether a parameter has no weight decay by its dimensions or by its name."""
    return (
        param.ndim <= 1
        or name.endswith(".bias")
        or any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _embedding_ids(model: nn.Module) -> set[int]:
    """Return the ids of the weights of a model's embeddings."""
    return {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
