"""State dicts of every precision: flattened, whole, broadcast, offloaded."""

import copy
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cm_fused import AdamCM
from cm_fused._state.making import dequantized, unscaled
from tests.support.sharded.common import (
    CUT_ANYWHERE,
    OPTIONS,
    SCALED,
    STEPS,
    Twins,
    assert_equal,
    case,
    fsdp,
    gathered,
    make_mesh,
    train,
)
from tests.support.sharded.saving import (
    HALF,
    HALF_CODE,
    HALF_MOMENT_CODE,
    SAVED,
    both,
    check_goes_on,
    check_rounded_once,
    check_same,
    keep_half_and_end,
    make_wide_model,
    set_both,
)

# Flattened state dicts: options, and the dtype of the parameters.
FLATTENED: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "float32": ({}, torch.float32),
    "amsgrad": ({"amsgrad": True, "skip_nonfinite": True, "max_grad_norm": 1.0}, torch.float32),
    "bfloat16 slots": ({"buffer_dtype": torch.bfloat16}, torch.float32),
    "kahan": ({"low_precision_update": "kahan"}, torch.bfloat16),
    "split": ({"low_precision_update": "split"}, torch.bfloat16),
    "stochastic": ({"low_precision_update": "stochastic", "seed": 5}, torch.bfloat16),
    **{name: (options, torch.float32) for name, options in SCALED.items()},
}


def _flattenable(name: str, mesh: DeviceMesh, form: str = "fsdp") -> tuple[Any, Any]:
    options, dtype = FLATTENED[name]
    model = make_wide_model().to(dtype)
    if form == "fsdp":
        model = fsdp(mesh, model)
    elif form == "ddp":
        model = DistributedDataParallel(model)
    return model, AdamCM(model.parameters(), **{**OPTIONS, **options})


def _save_flattened(model: Any, optimizer: Any, path: Path, **how: Any) -> None:
    state = both(model, optimizer, flatten_optimizer_state_dict=True)
    save_checkpoint(state, checkpoint_id=path, **how)


def _load_flattened(model: Any, optimizer: Any, path: Path) -> None:
    state = both(model, optimizer, flatten_optimizer_state_dict=True)
    load_checkpoint(state, checkpoint_id=path)
    set_both(model, optimizer, state, flatten_optimizer_state_dict=True)


def _check_goes_on_flattened(name: str, path: Path) -> None:
    """Check that what others saved flattened goes on on these processes."""
    kept = torch.load(path.with_suffix(".pt"), weights_only=True)
    model, optimizer = _flattenable(name, make_mesh())
    _load_flattened(model, optimizer, path)
    check_rounded_once(both(model, optimizer, full_state_dict=True), kept["half"])
    check_goes_on(model, optimizer, kept, dist.get_world_size(), FLATTENED[name][1])


@case(2, 1)
def flattened(folder: Path) -> None:
    """A flattened checkpoint goes on with the same bits, sharded and not, in every precision.

    Older tests saved by groups alone: torch reads flattened state dicts by the loader's own keys.
    """
    several = dist.get_world_size() > 1
    cases = [(name, "fsdp" if several else "plain") for name in FLATTENED]
    # DDP's is a plain one with names of its own: of one precision here, of all where there is time.
    _check_flattened(folder, [*cases, *[("all", "ddp")] * several])


@case(2)
def flattened_in_ddp(folder: Path) -> None:
    """So does one of DDP."""
    _check_flattened(folder, [(name, "ddp") for name in FLATTENED if name != "all"])


def _check_flattened(folder: Path, cases: Iterable[tuple[str, str]]) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for name, form in cases:
        dtype, path = FLATTENED[name][1], folder / f"flattened {name} {form}"
        model, optimizer = _flattenable(name, make_mesh(), form)
        train(model, optimizer, range(HALF), world, rank, dtype)
        _save_flattened(model, optimizer, path)
        end = keep_half_and_end(model, optimizer, path.with_suffix(".pt"), world, dtype)
        other, resumed = _flattenable(name, make_mesh(), form)
        train(other, resumed, range(1), world, rank, dtype)
        _load_flattened(other, resumed, path)
        train(other, resumed, range(HALF, STEPS), world, rank, dtype)
        check_same(both(other, resumed, full_state_dict=True), end, name)


@case(1)
def flattened_on_fewer(folder: Path) -> None:
    """What two processes saved flattened goes on on one."""
    for name in FLATTENED:
        _check_goes_on_flattened(name, folder / f"flattened {name} fsdp")


@case(4)
def flattened_on_more(folder: Path) -> None:
    """What two processes saved flattened goes on on four."""
    half = DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",))
    for name, (_, dtype) in FLATTENED.items():
        path, rank = folder / f"flattened {name} of two", dist.get_rank()
        if rank < 2:
            model, optimizer = _flattenable(name, half)
            train(model, optimizer, range(HALF), 2, rank, dtype)
            _save_flattened(model, optimizer, path, process_group=half.get_group())
            keep_half_and_end(model, optimizer, path.with_suffix(".pt"), 2, dtype)
        dist.barrier()
        _check_goes_on_flattened(name, path)


def _full_tensors_are_contiguous(mesh: DeviceMesh) -> bool:
    """Return whether this torch gathers a tensor that is cut along its second dimension whole."""
    cut = distribute_tensor(torch.zeros(3, mesh.size() + 1), mesh, [Shard(1)])
    return bool(cut.full_tensor().is_contiguous())


@case(2)
def every_way_to_set_a_state_dict(_: Path) -> None:
    """Whole, broadcast and offloaded state dicts go on with the same bits, by groups.

    Each precision in one way; torch's ways know nothing of precisions.
    """
    _check_ways_to_set(zip(FLATTENED, itertools.cycle(_ways_to_set()), strict=False))


@case(2)
def every_way_to_set_every_state_dict(_: Path) -> None:
    """So they do in every precision."""
    _check_ways_to_set(itertools.product(FLATTENED, _ways_to_set()))


def _ways_to_set() -> list[dict[str, bool]]:
    ways: list[dict[str, bool]] = [{"cpu_offload": True}, {"full_state_dict": True}]
    # What torch 2.11 gathers of slots that are cut unevenly has gaps, and it broadcasts the gaps.
    if _full_tensors_are_contiguous(make_mesh()):
        broadcast = {"full_state_dict": True, "broadcast_from_rank0": True}
        ways += [broadcast, {**broadcast, "cpu_offload": True}]
    return ways


def _check_ways_to_set(cases: Iterable[tuple[str, dict[str, bool]]]) -> None:
    rank = dist.get_rank()
    for name, way in cases:
        dtype = FLATTENED[name][1]
        model, optimizer = _flattenable(name, make_mesh())
        train(model, optimizer, range(HALF), 2, rank, dtype)
        how = {key: value for key, value in way.items() if key != "broadcast_from_rank0"}
        state: Any = copy.deepcopy(both(model, optimizer, **how))
        if way.get("broadcast_from_rank0") and rank > 0:
            state = {"model": {}, "optimizer": {}}
        train(model, optimizer, range(HALF, STEPS), 2, rank, dtype)
        other, resumed = _flattenable(name, make_mesh())
        set_both(other, resumed, state, **way)
        train(other, resumed, range(HALF, STEPS), 2, rank, dtype)
        for param, twin in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(param.full_tensor(), twin.full_tensor()), (name, way)


@case(2)
def load_whole_without_help(_: Path) -> None:
    """load_state_dict itself takes whole tensors, or codes and scales, for DTensors and back."""
    for name in ("plain", "all"):
        twins, fresh = (
            Twins(AdamCM, make_mesh(), [Shard(0)], CUT_ANYWHERE, **SAVED[name]) for _ in range(2)
        )
        for t in range(3):
            twins.step(t)
        fresh.optimizer.load_state_dict(twins.expected.state_dict())
        fresh.expected.load_state_dict(twins.optimizer.state_dict())
        if name == "plain":
            fresh.check_state()
        for new, old, params, others in (
            (fresh.optimizer, twins.expected, fresh.sharded, twins.whole),
            (fresh.expected, twins.optimizer, fresh.whole, twins.sharded),
        ):
            for param, other in zip(params, others, strict=True):
                _check_loaded(new.state[param], old.state[other], scaled=name != "plain")
        fresh.step(3)


def _check_loaded(state: dict[str, Tensor], source: dict[str, Tensor], *, scaled: bool) -> None:
    for key in ("exp_avg", "exp_avg_sq", "critical_buffer"):
        mine, saved = (gathered(dequantized(unscaled(each), key)) for each in (state, source))
        half_codes = HALF_MOMENT_CODE if "exp_avg" in key else HALF_CODE
        bound = half_codes["torch.int8"] * scaled
        assert (mine - saved).abs().max() <= bound * saved.abs().max(), key


class _Mixed(nn.Module):
    """A DTensor parameter and a plain one."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.sharded = nn.Parameter(distribute_tensor(torch.ones(8, 40), mesh, [Shard(0)]))
        self.plain = nn.Parameter(torch.ones(7))


def _mixed(**options: Any) -> tuple[_Mixed, AdamCM]:
    model = _Mixed(make_mesh())
    optimizer = AdamCM(model.parameters(), priority_scope="tensor", **{**OPTIONS, **options})
    for scale in (0.1, 0.3):
        for param in model.parameters():
            param.grad = torch.full_like(param, scale)
        optimizer.step()
    return model, optimizer


@case(1)
def codes_beside_values(folder: Path) -> None:
    """Codes of a group that has DTensors too are not taken for values, nor are values for codes.

    One DTensor made the file's whole group one of values. And values that earlier checkouts saved,
    under the name of the codes' dtype, were refused: both checks were tested by groups of one form.
    """
    eight = {"moment_dtype": "int8"}
    model, optimizer = _mixed(**eight)
    _save_flattened(model, optimizer, folder / "mixed")
    with pytest.raises(ValueError, match="copies codes without their scales"):
        _load_flattened(*_mixed(), folder / "mixed")
    other, resumed = _mixed(**eight)
    _load_flattened(other, resumed, folder / "mixed")
    assert_equal(resumed.state_dict(), optimizer.state_dict())

    eight["buffer_dtype"] = "int8"
    of_sharded = AdamCM([model.sharded], priority_scope="tensor", **{**OPTIONS, **eight})
    of_sharded.step()
    state, values = of_sharded.state_dict(), of_sharded.state_dict()
    assert state["param_groups"][0]["moment_dtype"] == "torch.int8 as values"
    values["param_groups"][0].update(moment_dtype="torch.int8", buffer_dtype="torch.int8")
    of_sharded.load_state_dict(values)
    assert_equal(of_sharded.state_dict(), state)
