"""What fails in a step leaves parameters and state as they were.

A fault is an error in place of the n-th call of an operator, allocations included, for every n.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cm_fused import AdamCG, AdamCM, AdamWCM, enable_gradient_release
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.support.cases import needs_cpu_backend
from tests.support.faults import OPTIONS, Make, after, assert_alike

STEP_OPERATORS = ("cm_fused::step_registered_",)


class InjectedError(RuntimeError):
    """What the injected faults raise."""


class FaultAt(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails in place of the call of an operator that has this number; notes the names of all.

    Torch's own profiler range around a step is not one of them: it ends after the step. Nor is what
    a registered state that died is released by, whenever the collector comes.
    """

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "profiler" or func.name() == "cm_fused::release_state":
            return func(*args, **(kwargs or {}))
        self.names.append(func.name().split(".")[0])
        if len(self.names) - 1 == self.number:
            raise InjectedError(self.names[-1])
        return func(*args, **(kwargs or {}))


def inject_all_faults(
    make: Make, steps_before: int, num_groups: int, stride: int = 1, **options: Any
) -> list[str]:
    """Have the step fail at one operator after another, and be tried again; return their names."""
    before = after(make, steps_before, num_groups, **options)
    expected = after(make, steps_before, num_groups, **options)
    expected[1].step()
    number = 0
    while True:
        params, optimizer = after(make, steps_before, num_groups, **options)
        mode = FaultAt(number)
        try:
            with mode:
                optimizer.step()
        except InjectedError:
            assert_alike((params, optimizer), before)
            optimizer.step()
            assert_alike((params, optimizer), expected)
            number += stride
        else:
            assert number > 0
            return mode.names


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("make", [AdamCM, AdamCG, AdamWCM])
def test_a_fault_at_any_operator_changes_nothing(
    make: Make, options: dict[str, Any], steps_before: int, num_groups: int
) -> None:
    """The only operator that changes anything is the last one called, one for all groups.

    With one operator for each group, an error in place of the second left the first stepped: the
    older test looked no further than the first change.
    """
    names = inject_all_faults(make, steps_before, num_groups, backend="cpu", **options)
    assert names[-1] in STEP_OPERATORS
    assert not set(names[:-1]) & set(STEP_OPERATORS)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("make", [AdamCM, AdamCG])
def test_a_fault_at_any_operator_of_the_reference_is_taken_back(
    make: Make, options: dict[str, Any], steps_before: int
) -> None:
    """The reference changes things one by one, here in two groups; every eleventh is tried."""
    inject_all_faults(make, steps_before, 2, stride=11, backend="eager", **options)


def _of_the_reference(make: Make) -> Make:
    """Return what makes the same optimizer, its groups stepped by the reference."""

    def make_eager(groups: list[dict[str, Any]], **options: Any) -> CriticalAdam:
        return make([{**group, "backend": "eager"} for group in groups], **options)

    return make_eager


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("steps_before", [0, 1, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"critical_test": 0.5, "synced": False, "weight_decay": 0.1}, {"kappa": 0}],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("make", [Adam_CM, Adam_C])
@pytest.mark.slow
def test_a_fault_of_the_research_packages_optimizers_changes_nothing(
    make: Make, options: dict[str, Any], steps_before: int, backend: str
) -> None:
    """First steps and choices by chance, which come before the one operator, are taken back.

    No older test made `cm_fused.compat` fail: its steps were two operators for each group.
    """
    if backend == "eager":
        make = _of_the_reference(make)
    stride = 11 if backend == "eager" else 3
    inject_all_faults(make, steps_before, 2, stride=stride, topC=2, **options)


@needs_cpu_backend
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="another tool replaces the allocator")
@pytest.mark.slow
def test_memory_that_runs_out_within_the_operator_changes_nothing(tmp_path: Path) -> None:
    """At each of the C++ step's own allocations.

    The older tests fail operators in front of it; what the operator allocates they never failed.
    """
    library = tmp_path / "fail_at_new.so"
    source = Path(__file__).parents[1] / "support" / "fail_at_new.cpp"
    compile_ = ["g++", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(compile_, check=True)
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.allocation_faults", str(library)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 100


def test_a_fault_of_the_reference_comes_before_any_change_of_a_fused_backend() -> None:
    """A group that a fused backend steps, in front of one of the reference, is stepped after it."""

    def make(groups: list[dict[str, Any]], **options: Any) -> CriticalAdam:
        for group, backend in zip(groups, ("cpu", "eager"), strict=True):
            group["backend"] = backend
        return AdamCM(groups, **options)

    names = inject_all_faults(make, 2, 2, stride=2)
    assert names[-1] in STEP_OPERATORS
    assert not set(names[:-1]) & set(STEP_OPERATORS)


def test_a_fault_takes_back_the_count_of_skipped_steps() -> None:
    """The count is changed by an operator of its own, before the step."""
    for backend in ("cpu", "eager"):
        number, options = 0, {"backend": backend, "skip_nonfinite": True}
        while True:
            params, optimizer = after(AdamCM, 2, 1, **options)
            before = optimizer.param_groups[0]["skipped_steps"].clone()
            assert params[0].grad is not None
            params[0].grad[0, 0] = torch.inf
            try:
                with FaultAt(number):
                    optimizer.step()
            except InjectedError:
                assert torch.equal(optimizer.param_groups[0]["skipped_steps"], before)
                number += 1
            else:
                assert torch.equal(optimizer.param_groups[0]["skipped_steps"], before + 1)
                break


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("make", [AdamCM, AdamCG])
def test_a_fault_inside_backward_leaves_no_parameter_half_stepped(
    make: Make, backend: str, steps_before: int
) -> None:
    """With gradient release every parameter is as before its step or as after it.

    The older tests fail `step()`; the eager step of one parameter was not taken back.
    """

    def after_steps() -> tuple[torch.nn.Linear, CriticalAdam]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        options = {"priority_scope": "tensor", "backend": backend}
        optimizer = make(model.parameters(), lr=0.1, **options)
        enable_gradient_release(model, optimizer)
        for _ in range(steps_before):
            loss_of(model).backward()  # type: ignore[no-untyped-call]
        return model, optimizer

    def loss_of(model: torch.nn.Module) -> Tensor:
        return model(torch.ones(4, 3)).square().sum()  # type: ignore[no-any-return]

    def of_each(model: torch.nn.Module, optimizer: CriticalAdam) -> list[list[Any]]:
        states = optimizer.state_dict()["state"]
        return [
            [param.tolist(), {key: value.tolist() for key, value in states.get(i, {}).items()}]
            for i, param in enumerate(model.parameters())
        ]

    before, expected = of_each(*after_steps()), after_steps()
    loss_of(expected[0]).backward()  # type: ignore[no-untyped-call]
    stepped = of_each(*expected)
    number, taken_back = 0, 0
    while True:
        model, optimizer = after_steps()
        loss = loss_of(model)
        try:
            with FaultAt(number):
                loss.backward()  # type: ignore[no-untyped-call]
        except InjectedError:
            for now, *either in zip(of_each(model, optimizer), before, stepped, strict=True):
                assert now in either
                taken_back += now == either[0]
            number += 1
        else:
            break
    assert taken_back > number // 4


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="injects into interpreted kernels")
@pytest.mark.parametrize(("steps_before", "groups"), [(0, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("make", [AdamCM, AdamCG])
@pytest.mark.slow
def test_the_triton_step_makes_all_it_needs_before_its_first_change(
    make: Make,
    options: dict[str, Any],
    steps_before: int,
    groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between and after the launches nothing is allocated but in the priorities' operator."""
    from cm_fused._backends.triton import launch as triton

    launch = triton._Launcher._launch

    def launch_uncounted(launcher: Any, kernel: Any, *arguments: Any, **kwargs: Any) -> None:
        mode.names.append(kernel.__name__)
        # What interpreting a kernel calls is not of the step.
        with _disable_current_modes():
            launch(launcher, kernel, *arguments, **kwargs)

    mode = FaultAt(-1)
    monkeypatch.setattr(triton._Launcher, "_launch", launch_uncounted)
    options = {"backend": "triton", **options}
    _, optimizer = after(make, steps_before, groups, **options)
    mode.names.clear()
    with mode:
        optimizer.step()
    names = mode.names
    changing = ("critical_adam_kernel", "cm_fused::update_priorities_")
    first = next(i for i, name in enumerate(names) if name in changing)
    assert set(names[first:]) <= set(changing)
    before = after(make, steps_before, groups, **options)
    operators = [i for i in range(first) if "::" in names[i]]
    for number in operators[:: 1 if groups == 1 else 9]:
        params, optimizer = after(make, steps_before, groups, **options)
        mode = FaultAt(number)
        with pytest.raises(InjectedError), mode:
            optimizer.step()
        assert_alike((params, optimizer), before)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_closure_or_a_hook_before_the_step_that_raises_changes_nothing(backend: str) -> None:
    """What is called before the step is called before any change."""

    def fail(*_: Any) -> float:
        raise InjectedError

    params, optimizer = after(AdamCM, 2, 2, backend=backend)
    with pytest.raises(InjectedError):
        optimizer.step(fail)
    handle = optimizer.register_step_pre_hook(fail)  # type: ignore[arg-type]
    with pytest.raises(InjectedError):
        optimizer.step()
    handle.remove()
    assert_alike((params, optimizer), after(AdamCM, 2, 2, backend=backend))
