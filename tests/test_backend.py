"""Which backend serves: the default, its fallback, explicit requests, and what users see of it."""

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cm_fused
from cm_fused import AdamCM
from cm_fused._critical_adam import CriticalAdam
from cm_fused.ops import cpu
from tests.training import BACKENDS, CLASSES, KINDS, new_optimizer, params_of, train

PACKAGE = Path(cm_fused.__file__).parent

# What a script without the extension steps.
STEP = """
def optimizer_after(steps, **options):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 6)), torch.nn.Parameter(torch.ones(2, 3))]
    optimizer = AdamCM(params, **options)
    for t in range(steps):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + t % 3)
        optimizer.step()
    return optimizer
"""
SCRIPT_HEAD = f"import warnings, sys, torch\nfrom cm_fused import AdamCM\n{STEP}"


@pytest.fixture(scope="module")
def pure_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it is installed where there is no compiler."""
    root = tmp_path_factory.mktemp("pure")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, root / "cm_fused", ignore=ignored)
    return root


def _run(
    script: str, root: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with the package of `root`; it must end well unless it says otherwise."""
    source = SCRIPT_HEAD + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _output(script: str, root: Path = PACKAGE.parent, **environment: str) -> str:
    result = _run(script, root, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# With the extension


@pytest.mark.parametrize("cls", CLASSES)
def test_default_on_the_cpu_is_the_extension(cls: type[CriticalAdam]) -> None:
    """Without a request CPU parameters are stepped by the C++ backend, without a warning."""
    assert cpu.unavailable_reason is None
    optimizer = new_optimizer(cls, capacity=5)
    train(optimizer, range(2))
    assert "Active backends: cpu on cpu" in repr(optimizer)
    assert "critical_sum" in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_repr_shows_the_active_backend(cls: type[CriticalAdam], backend: str) -> None:
    """The repr says which backend steps, also after it changed, and torch's part is kept."""
    optimizer = new_optimizer(cls, backend=backend)
    text = repr(optimizer)
    assert text.startswith(f"{cls.__name__} (\nParameter Group 0\n")
    assert "priority_decay: 0.7" in text
    assert text.endswith(f"Active backends: {backend} on cpu\n)")
    other = BACKENDS[1 - BACKENDS.index(backend)]
    optimizer.param_groups[1]["backend"] = other
    assert repr(optimizer).endswith(f"Active backends: {backend} on cpu, {other} on cpu\n)")


def test_explicit_backend_is_the_one_that_steps() -> None:
    """The eager backend keeps none of the C++ backend's state, and the other way round."""
    for backend, keeps in (("eager", False), ("cpu", True)):
        optimizer = new_optimizer(AdamCM, backend=backend, capacity=5)
        train(optimizer, range(2))
        state = optimizer.state[params_of(optimizer)[0]]
        assert ("critical_sum" in state, "pending_slot" in state) == (keeps, keeps)


def test_other_devices_fall_back_with_a_warning() -> None:
    """Parameters of a device without a fused backend are served by the reference, which is said."""
    output = _output("""
        param = torch.nn.Parameter(torch.empty(2, device="meta"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(repr(AdamCM([param])).splitlines()[-2])
            repr(AdamCM([param]))
        print(*(f"{w.category.__name__}: {w.message}" for w in caught), sep="\\n")
    """).splitlines()
    assert output[0] == "Active backends: eager on meta"
    assert len(output) == 2
    assert output[1].startswith("UserWarning: cm_fused steps with the slow eager backend")
    assert "meta" in output[1]


# Without it


def test_without_extension_the_default_is_eager_with_one_warning(pure_package: Path) -> None:
    """The fallback works and is said once per process, with the way to get the fast backend."""
    output = _output(
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            first = optimizer_after(3)
            second = optimizer_after(3)
            second.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
            second.state_dict()
            print(repr(first).splitlines()[-2])
        print(len(caught), caught[0].category.__name__)
        print(caught[0].message)
        """,
        pure_package,
    ).splitlines()
    assert output[0] == "Active backends: eager on cpu"
    assert output[1] == "1 UserWarning"
    message = "\n".join(output[2:])
    assert "slow eager backend" in message
    assert "was not built" in message
    assert "pip install" in message
    assert "CM_FUSED_BUILD=cpu" in message


def test_without_extension_results_are_the_references(pure_package: Path) -> None:
    """The fallback is the eager backend, to the bit, and an explicit "eager" does not warn."""
    script = """
        warnings.simplefilter({filter!r})
        optimizer = optimizer_after(9, {options})
        print([p.tolist() for group in optimizer.param_groups for p in group["params"]])
    """
    fallback = _output(script.format(filter="ignore", options=""), pure_package)
    explicit = _output(script.format(filter="error", options="backend='eager'"), pure_package)
    here = _output(script.format(filter="error", options="backend='eager'"))
    assert fallback == explicit == here


def test_warning_points_at_the_users_line(pure_package: Path) -> None:
    """The warning's place is the user's call of step(), not a line of this package or of torch."""
    result = _run(
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer_after(1)
        print(caught[0].filename)
        """,
        pure_package,
    )
    assert result.stdout.strip() == "<string>", result.stderr


@pytest.mark.parametrize("when", ["construction", "group", "step"])
def test_without_extension_an_explicit_request_raises(pure_package: Path, when: str) -> None:
    """backend="cpu" is never served by another backend: the error gives the reason."""
    action = {
        "construction": "optimizer_after(1, backend='cpu')",
        "group": (
            "optimizer_after(1).add_param_group("
            "{'params': [torch.nn.Parameter(torch.ones(1))], 'backend': 'cpu'})"
        ),
        "step": "o = optimizer_after(1); o.param_groups[0]['backend'] = 'cpu'; o.step()",
    }[when]
    result = _run(f"\nwarnings.simplefilter('ignore')\n{action}\n", pure_package)
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: backend='cpu' is not available: ")
    assert "was not built" in error


def test_extension_that_does_not_load_is_a_reason(pure_package: Path, tmp_path: Path) -> None:
    """A broken library does not break the import: its error is the reason of the fallback."""
    shutil.copytree(pure_package / "cm_fused", tmp_path / "cm_fused")
    (tmp_path / "cm_fused" / "_C.abi3.so").write_bytes(b"not a library")
    output = _output(
        """
        from cm_fused.ops import cpu
        print(cpu.unavailable_reason)
        warnings.simplefilter("ignore")
        print(repr(optimizer_after(2)).splitlines()[-2])
        """,
        tmp_path,
    )
    assert output.startswith("the C++ extension does not load: ")
    assert output.strip().endswith("Active backends: eager on cpu")


@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize("cls", KINDS)
def test_pickle_of_the_extension_loads_without_it(
    pure_package: Path, tmp_path: Path, cls: type[CriticalAdam], steps: int
) -> None:
    """An optimizer pickled beside the extension trains on in a process that has none."""
    optimizer = new_optimizer(cls)
    train(optimizer, range(steps))
    file = tmp_path / "optimizer.pickle"
    file.write_bytes(pickle.dumps(optimizer))
    output = _output(
        f"""
        import pickle
        warnings.simplefilter("ignore")
        optimizer = pickle.load(open({str(file)!r}, "rb"))
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state_dict()["state"]
        print(sorted(state[0]), int(state[0]["step"]))
        """,
        pure_package,
    )
    keys = ["critical_buffer", "exp_avg", "exp_avg_sq", "priorities", "step"]
    assert output.strip() == f"{keys} {steps + 1}"


def test_checkpoint_of_the_extension_loads_without_it(pure_package: Path, tmp_path: Path) -> None:
    """A state dict with a running sum trains on where no backend keeps one."""
    optimizer = new_optimizer(AdamCM, shapes=((6,), (2, 3)))
    train(optimizer, range(6))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    output = _output(
        f"""
        warnings.simplefilter("ignore")
        optimizer = optimizer_after(0)
        optimizer.load_state_dict(torch.load({str(tmp_path / "optimizer.pt")!r}))
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step()
        print(sorted(optimizer.state_dict()["state"][0]))
        """,
        pure_package,
    )
    keys = ["critical_buffer", "exp_avg", "exp_avg_sq", "priorities", "step"]
    assert output.strip() == str(keys)


# CM_FUSED_CPU_CAPABILITY


def test_bad_capability_is_a_clear_error() -> None:
    """An unknown instruction set is an error that names the variable, the choices and the value."""
    result = _run("optimizer_after(1)", CM_FUSED_CPU_CAPABILITY="avx1024")
    assert result.returncode == 1
    assert "RuntimeError: " in result.stderr
    expected = r"CM_FUSED_CPU_CAPABILITY must name an instruction set of this machine"
    assert expected in result.stderr
    assert "default, avx2 or avx512" in result.stderr
    assert "got avx1024" in result.stderr


def test_bad_capability_changes_nothing() -> None:
    """The first step fails before it changes a parameter, and so does the second."""
    output = _output(
        """
        optimizer = optimizer_after(0)
        (first, second) = optimizer.param_groups[0]["params"]
        for param in (first, second):
            param.grad = torch.ones_like(param)
        for _ in range(2):
            try:
                optimizer.step()
            except RuntimeError as error:
                print("CM_FUSED_CPU_CAPABILITY" in str(error))
        print(torch.equal(first, torch.linspace(-1, 1, 6)), torch.equal(second, torch.ones(2, 3)))
        """,
        CM_FUSED_CPU_CAPABILITY="",
    )
    assert output.split() == ["True"] * 4


def test_default_capability_serves_every_machine() -> None:
    """The baseline can be asked for by name, and gives the bits that the best one gives."""
    script = """
        from cm_fused.ops import cpu
        optimizer = optimizer_after(9)
        print([p.tolist() for group in optimizer.param_groups for p in group["params"]])
        print(cpu.capability())
    """
    best = _output(script).splitlines()
    baseline = _output(script, CM_FUSED_CPU_CAPABILITY="default").splitlines()
    assert baseline[0] == best[0]
    assert baseline[1] == "default"
