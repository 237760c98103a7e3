"""The drop-in for the research package: its recorded trajectories, without its defects."""

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_fused import AdamCM
from cm_fused.compat import cmoptimizer
from tests.support.cmoptimizer_runs import (
    CHECKPOINT_AT,
    CLASSES,
    RUNS,
    STEPS,
    gradient,
    make_params,
    run,
)
from tests.support.training import BACKENDS, assert_same

DATA = Path(__file__).parents[1] / "data" / "cmoptimizer"
TRAJECTORIES = json.loads((DATA / "trajectories.json").read_text())
of_each_class = pytest.mark.parametrize("cls", CLASSES)


def _on(backend: str, cls: str) -> Any:
    """Return a class whose steps are a backend's."""

    def make(params: Any, **options: Any) -> Any:
        return getattr(cmoptimizer, cls)([{"params": params, "backend": backend}], **options)

    return make


@pytest.mark.sampled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RUNS)
@of_each_class
def test_trajectory(cls: str, name: str, backend: str) -> None:
    """Over 100 steps the parameters are the research package's, to float32 rounding."""
    ours, *_ = run(_on(backend, cls), name)
    for step, expected in TRAJECTORIES[f"{cls} {name}"].items():
        for mine, theirs in zip(ours[step], expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6, err_msg=f"step {step}")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@of_each_class
def test_checkpoint_of_the_package(cls: str, backend: str) -> None:
    """A file that it saved after ten steps is read without it, and goes on as it did."""
    saved = cmoptimizer.read_checkpoint(DATA / f"{cls}.pt")

    def load(params: list[Tensor], optimizer: Any) -> None:
        for param, value in zip(params, saved["params"], strict=True):
            param.copy_(value)
        optimizer.load_state_dict(cmoptimizer.convert_state_dict(saved["optimizer"]))

    ours, *_ = run(_on(backend, cls), "defaults", first=CHECKPOINT_AT, load=load)
    assert set(ours) == {"20", "50", "100"}
    for step, params in ours.items():
        expected = TRAJECTORIES[f"{cls} defaults"][step]
        for mine, theirs in zip(params, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6, err_msg=f"step {step}")


def test_checkpoint_loads_into_the_papers_form() -> None:
    """Moments, slots and keys come over; the rules stay AdamCM's, and learning goes on."""
    saved = cmoptimizer.read_checkpoint(DATA / "Adam_CM.pt")["optimizer"]
    params = make_params()
    optimizer = AdamCM(params)
    optimizer.load_state_dict(cmoptimizer.convert_state_dict(saved))
    group, state = optimizer.param_groups[0], optimizer.state[params[0]]
    assert (group["lr"], group["buffer_mean"], group["eps_inside_sqrt"]) == (0.01, "capacity", True)
    assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"])
    assert torch.equal(state["priorities"], saved["state"][0]["critical gradients"]._heap_key)
    for i, param in enumerate(params):
        param.grad = gradient(11, i, param)
    optimizer.step()


def test_what_the_package_lost_is_an_error() -> None:
    """A state dict without buffers, as its own loading leaves it, is refused and says why."""
    saved = cmoptimizer.read_checkpoint(DATA / "Adam_CM.pt")["optimizer"]
    saved["state"][1]["critical gradients"] = {}
    with pytest.raises(ValueError, match="parameter 1 must have 'critical gradients'"):
        cmoptimizer.convert_state_dict(saved)


@of_each_class
def test_constructor_is_the_packages(cls: str) -> None:
    """The arguments, their order and their defaults."""
    parameters = inspect.signature(getattr(cmoptimizer, cls)).parameters
    assert {name: p.default for name, p in list(parameters.items())[1:]} == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "decay": 0.7,
        "kappa": 1.0,
        "topC": 5 if cls == "Adam_CM" else 10,
        "weight_decay": 0,
        "amsgrad": False,
        "critical_test": 0.0,
        "synced": True,
        "buffer_dtype": None,
    }


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@of_each_class
def test_without_a_buffer(cls: str, backend: str) -> None:
    """kappa=0 is torch's AdamW, or Adam."""
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    torch_class = torch.optim.AdamW if cls == "Adam_CM" else torch.optim.Adam
    params, twins = make_params(), make_params()
    optimizers = _on(backend, cls)(params, kappa=0, **options), torch_class(twins, **options)
    for t in range(20):
        for i, pair in enumerate(zip(params, twins, strict=True)):
            for param in pair:
                param.grad = gradient(t, i, param)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
@of_each_class
def test_torchs_default_device_changes_nothing(cls: str, backend: str, kappa: float) -> None:
    """What a step makes of its own is made where the parameters are.

    A step without a buffer made its norm elsewhere; `test_contract.py` has the paper's classes.
    """
    after = []
    for default in ("cpu", "meta"):
        params = make_params()
        optimizer = _on(backend, cls)(params, kappa=kappa)
        gradients = [[gradient(t, i, p) for i, p in enumerate(params)] for t in range(8)]
        with torch.device(default):
            for grads in gradients:
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
        after.append(params)
    assert_same(after[0], after[1])


@pytest.mark.parametrize("critical_test", [0.0, 0.5])
@pytest.mark.parametrize("at", [1, 2, 4, 9])
@of_each_class
def test_resumption(cls: str, at: int, critical_test: float) -> None:
    """A run that was saved and loaded goes on with the same bits; so do copies."""
    make = getattr(cmoptimizer, cls)
    params = make_params()
    optimizer = make(params, lr=0.01, topC=3, critical_test=critical_test)
    others: list[Any] = []
    for t in range(15):
        if t == at:
            saved = [param.clone() for param in params]
            loaded = make(saved, lr=0.5, topC=3)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            both = params, optimizer
            others = [(saved, loaded), copy.deepcopy(both), pickle.loads(pickle.dumps(both))]
        for those, each in [(params, optimizer), *others]:
            for i, param in enumerate(those):
                param.grad = gradient(t, i, param)
            each.step()
    for those, each in others:
        assert_same(those, params)
        assert_same(each.state_dict()["state"], optimizer.state_dict()["state"])


def _numpy_keys() -> Any:
    state: Any = np.random.get_state()
    return state[1].copy()


@of_each_class
def test_chance_is_its_own(cls: str) -> None:
    """critical_test draws from no global generator, and the same numbers in every run."""
    generators = _numpy_keys(), torch.get_rng_state()
    runs = []
    for chance in (0.5, 0.5, 0.0, 1.0):
        params = make_params()
        optimizer = getattr(cmoptimizer, cls)(params, lr=0.01, topC=2, critical_test=chance)
        for t in range(30):
            for i, param in enumerate(params):
                param.grad = gradient(t, i, param)
            optimizer.step()
        runs.append(params[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])
    assert np.array_equal(_numpy_keys(), generators[0])
    assert torch.equal(torch.get_rng_state(), generators[1])


@pytest.mark.parametrize(
    "options",
    [
        {"topC": 0},
        {"topC": 2.5},
        {"decay": -0.5},
        {"decay": 1.5},
        {"kappa": -1.0},
        {"kappa": float("nan")},
        {"critical_test": 2},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (0.9, 1.0)},
    ],
    ids=str,
)
@of_each_class
def test_bad_hyperparameters_raise(cls: str, options: dict[str, Any]) -> None:
    """What the package takes, or means to refuse, is an error at construction and in a group."""
    make = getattr(cmoptimizer, cls)
    with pytest.raises(ValueError, match="must be"):
        make([torch.ones(2)], **options)
    optimizer = make([torch.ones(2)])
    with pytest.raises(ValueError, match="must be"):
        optimizer.add_param_group({"params": [torch.ones(2)], **options})
    assert len(optimizer.param_groups) == 1


@of_each_class
def test_groups_have_options_of_their_own(cls: str) -> None:
    """A group is what an optimizer with its options is."""
    make = getattr(cmoptimizer, cls)
    options: list[dict[str, Any]] = [{"topC": 2, "synced": False}, {"decay": 0.2, "lr": 0.05}]
    params, alone = [make_params() for _ in options], [make_params() for _ in options]
    together = make(
        [{"params": group, **each} for group, each in zip(params, options, strict=True)], lr=0.01
    )
    optimizers = [
        make(group, **{"lr": 0.01, **each}) for group, each in zip(alone, options, strict=True)
    ]
    for t in range(10):
        for group in (*params, *alone):
            for i, param in enumerate(group):
                param.grad = gradient(t, i, param)
        for optimizer in (together, *optimizers):
            optimizer.step()
    assert_same(params, alone)


def test_recorded_runs_do_something() -> None:
    """The recorded parameters are not all alike, and none is not a number."""
    finals = {name: trajectory[str(STEPS)][0] for name, trajectory in TRAJECTORIES.items()}
    assert all(np.isfinite(values).all() for values in finals.values())
    assert len({tuple(values) for values in finals.values()}) == len(finals)
