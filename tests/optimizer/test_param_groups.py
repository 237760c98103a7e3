"""Param groups with and without weight decay."""

import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused import AdamWCM, param_groups_weight_decay


class _Model(nn.Module):
    """A parameter of each kind; the head shares the embedding's weight, the adapter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.bags = nn.EmbeddingBag(5, 4)
        self.position = nn.Parameter(torch.zeros(3, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.bilinear = nn.Bilinear(2, 2, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.adapter = nn.Linear(4, 4)
        self.adapter.requires_grad_(False)


NO_DECAY = {"scale", "convolution.bias", "norm.weight", "norm.bias", "bilinear.bias"}
EMBEDDINGS = {"embedding.weight", "bags.weight"}


def _names(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[set[str], float]]:
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    return [({names[p] for p in group["params"]}, group["weight_decay"]) for group in groups]


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("listed", [(), ("position",), ["bilinear.*", "nothing"], {"p*", "head.*"}])
def test_groups(listed: Any, decay_embeddings: bool) -> None:
    """Each trained parameter is in one group, once, by its dimensions, its name and its module."""
    model = _Model()
    groups = param_groups_weight_decay(model, 0.3, listed, decay_embeddings=decay_embeddings)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    expected = NO_DECAY | {name for name in trained for p in listed if fnmatch.fnmatch(name, p)}
    if not decay_embeddings:
        expected |= EMBEDDINGS
    assert _names(model, groups) == [(expected, 0.0), (trained - expected, 0.3)]
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_timms_call() -> None:
    """The arguments are timm's, by position and by name."""
    model = _Model()
    by_position = param_groups_weight_decay(model, 0.3, ["position"])
    by_name = param_groups_weight_decay(
        model=model, weight_decay=0.3, no_weight_decay_list=["position"]
    )
    assert _names(model, by_position) == _names(model, by_name)


def test_an_iterator_of_names() -> None:
    """It counts for every parameter.

    Older tests pass collections: an iterator was used up by the first parameter.
    """
    model = _Model()
    names = ["position", "bags.weight"]
    groups = param_groups_weight_decay(model, 0.3, iter(names))
    assert _names(model, groups) == _names(model, param_groups_weight_decay(model, 0.3, names))


def test_empty_groups_are_left_out() -> None:
    """A model of norms has no group with weight decay, a frozen one no group at all."""
    norm = nn.LayerNorm(4)
    assert _names(norm, param_groups_weight_decay(norm)) == [({"weight", "bias"}, 0.0)]
    assert param_groups_weight_decay(norm.requires_grad_(False)) == []


def test_only_one_group_decays() -> None:
    """With gradients of zero a step moves what has weight decay, and nothing else."""
    model = _Model()
    optimizer = AdamWCM(param_groups_weight_decay(model, 0.3), lr=0.1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for name, param in model.named_parameters():
        stays = name in NO_DECAY or not param.requires_grad
        torch.testing.assert_close(param.detach(), before[name] * (1.0 if stays else 0.97))


def test_errors() -> None:
    """What is no module, and a name where names belong, are refused."""
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        param_groups_weight_decay([nn.Linear(2, 2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"no_weight_decay_list must be a .*got the string 'bias'"):
        param_groups_weight_decay(nn.Linear(2, 2), 0.1, "bias")
    with pytest.raises(TypeError, match=r"must have names, got an item of type Parameter"):
        param_groups_weight_decay(nn.Linear(2, 2), 0.1, [nn.Parameter(torch.ones(1))])  # type: ignore[list-item]
