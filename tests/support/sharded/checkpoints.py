"""Checkpoints of torch.distributed.checkpoint (DCP): on other numbers of processes, and whole."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.tensor import DTensor

from cm_fused import AdamCM
from tests.support.sharded.common import OPTIONS, STEPS, case, compare, fsdp, make_mesh, train
from tests.support.sharded.saving import (
    HALF,
    SAVED,
    both,
    check_goes_on,
    check_rounded_once,
    check_same,
    keep_half_and_end,
    make_wide_model,
    set_both,
)


def _scaled(name: str, *, sharded: bool = True) -> tuple[Any, Any]:
    model = fsdp(make_mesh(), make_wide_model()) if sharded else make_wide_model()
    return model, AdamCM(model.parameters(), **{**OPTIONS, **SAVED[name]})


@case(4)
def save(folder: Path) -> None:
    """Half of a training, saved sharded and whole, which changes nothing, and how it went on."""
    for name in SAVED:
        model, optimizer = _scaled(name)
        train(model, optimizer, range(HALF), 4, dist.get_rank())
        save_checkpoint(both(model, optimizer), checkpoint_id=folder / name)
        keep_half_and_end(model, optimizer, folder / f"{name}.pt", 4)
        if name == "plain":
            twin, expected = _scaled(name, sharded=False)
            train(twin, expected, range(STEPS))
            compare(model, twin)


@case(4, 2, 1)
def resume(folder: Path) -> None:
    """A sharded checkpoint goes on on any number of processes, on as many with the same bits."""
    world = dist.get_world_size()
    for name in SAVED:
        kept = torch.load(folder / f"{name}.pt", weights_only=True)
        model, optimizer = _scaled(name)
        state = both(model, optimizer)
        load_checkpoint(state, checkpoint_id=folder / name)
        set_both(model, optimizer, state)
        loaded = copy.deepcopy(both(model, optimizer, full_state_dict=True))
        if world != 4:
            check_rounded_once(loaded, kept["half"])
            check_goes_on(model, optimizer, kept, world, close=name == "plain")
            continue
        train(model, optimizer, range(HALF, STEPS), world, dist.get_rank())
        end = both(model, optimizer, full_state_dict=True)
        check_same(loaded, kept["half"], name)
        check_same(end, kept["end"], name)


@case(2, 1)
def resume_whole(folder: Path) -> None:
    """A whole state dict, with values in place of codes, goes on, sharded and not."""
    world = dist.get_world_size()
    for name in SAVED:
        kept = torch.load(folder / f"{name}.pt", weights_only=True)
        model, optimizer = _scaled(name, sharded=world > 1)
        set_both(model, optimizer, copy.deepcopy(kept["half"]), full_state_dict=True)
        if world > 1:
            check_rounded_once(both(model, optimizer, full_state_dict=True), kept["half"])
        check_goes_on(model, optimizer, kept, world, close=name == "plain")


@case(1)
def codes_are_not_taken_for_values(folder: Path) -> None:
    """A sharded checkpoint of plain tensors has codes: DCP, which casts, must not load them."""
    model, optimizer = _scaled("slots", sharded=False)
    train(model, optimizer, range(2))
    for pair in ((model, optimizer), _scaled("slots")):
        save_checkpoint(both(*pair), checkpoint_id=folder / "codes")
        for sharded in (True, False):
            if sharded == isinstance(next(pair[0].parameters()), DTensor):
                continue
            state = both(*_scaled("slots", sharded=sharded))
            with pytest.raises(CheckpointException, match="Size mismatch"):
                load_checkpoint(state, checkpoint_id=folder / "codes")
