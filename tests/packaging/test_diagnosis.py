"""`python -m cm_fused` says what is at work, and notices a backend that computes something else."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from cm_fused import __main__ as diagnosis
from cm_fused import _install
from cm_fused._backends import cpu, library
from tests.support.cases import needs_cpu_backend, needs_triton


@needs_cpu_backend
def test_what_it_prints() -> None:
    """Versions, libraries, each backend and why one is not there; the exit status is 0."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "cm_fused"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    for part in (
        f"torch {torch.__version__}",
        "C++ library: loaded, ",
        "CUDA library: ",
        "CUDA devices: none, ",
        "eager on cpu: the reference",
        "cpu on cpu: agrees with the reference",
        "triton on cpu: backend='triton' is not available: ",
    ):
        assert part in run.stdout, run.stdout


@needs_cpu_backend
@needs_triton
@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_wrong_backend_is_noticed(
    difference: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A parameter that is off, or not a number, is shown, and the exit status is 1."""
    run = diagnosis._run

    def off(kind: Any, backend: str, device: torch.device) -> Any:
        params = run(kind, backend, device)
        if backend == "cpu":
            params[1][2] += difference
        return params

    monkeypatch.setattr(diagnosis, "_run", off)
    assert diagnosis.main([]) == 1
    printed = capsys.readouterr().out
    assert "cpu on cpu: WRONG: AdamCM is " in printed
    assert printed.count("WRONG") == 1


@needs_cpu_backend
def test_a_backend_that_raises_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error is a line of the diagnosis, not its end."""
    run = diagnosis._run

    def fail(kind: Any, backend: str, device: torch.device) -> Any:
        if backend == "cpu":
            raise RuntimeError("no such kernel")
        return run(kind, backend, device)

    monkeypatch.setattr(diagnosis, "_run", fail)
    assert diagnosis.main([]) == 1
    assert "WRONG: AdamCM raises RuntimeError: no such kernel" in capsys.readouterr().out


@needs_cpu_backend
def test_a_backend_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status says whether it is there; `--json` says the same to a program."""
    monkeypatch.setattr(diagnosis, "_self_test", lambda name, device: None)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        assert diagnosis.main(["--json", "triton"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["problems"] == ["triton is not available on any device"]
    assert diagnosis.main(["--json", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["versions"]["torch"].startswith(torch.__version__)
    assert {"backend": "cpu", "available": True, "correct": True}.items() <= found["backends"][
        1
    ].items()
    with pytest.raises(SystemExit):
        diagnosis.main(["gpu"])
    assert "BACKEND must be one of eager, cpu, triton, got gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "wanted", "status"),
    [
        ("c++ was not found", [], 1),
        ("c++ was not found", ["cpu"], 1),
        ("CM_FUSED_BUILD=none", [], 0),
        ("CM_FUSED_BUILD=none", ["cpu"], 1),
    ],
)
def test_a_library_that_was_not_built(
    reason: str,
    wanted: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slow steps on a CPU are a problem, unless the build was told not to have fast ones.

    The remedy is said once. The older test named no backend: one that was left out on purpose and
    then asked for was a problem without a remedy.
    """
    said = f"the C++ extension was not built, because {reason}"
    monkeypatch.setattr(library, "unavailable_reason", said)
    monkeypatch.setattr(cpu, "unavailable_reason", said)
    monkeypatch.setattr(diagnosis, "_self_test", lambda name, device: None)
    assert diagnosis.main(wanted) == status
    printed = capsys.readouterr().out
    assert f"C++ library: {said}\n" in printed
    assert f"cpu on cpu: backend='cpu' is not available: {said}\n" in printed
    assert (f"PROBLEM: {said}. {_install.remedy()}\n" in printed) == bool(status)
    assert printed.count(_install.remedy()) == status


def test_a_clone_that_hides_what_is_installed(tmp_path: Path) -> None:
    """Python in a clone imports the clone, which has no library, whatever `pip install .` built."""
    site = tmp_path / "site"
    shutil.copytree(
        _install.PACKAGE,
        tmp_path / "clone" / "cm_fused",
        ignore=shutil.ignore_patterns("*.so", "_build.json"),
    )
    (site / "cm_fused").mkdir(parents=True)
    (site / "cm_fused" / "__init__.py").touch()
    (site / "cm_fused-0.1.0.dist-info").mkdir()
    (site / "cm_fused-0.1.0.dist-info" / "METADATA").write_text("Name: cm_fused\nVersion: 0.1.0\n")
    run = subprocess.run(
        [sys.executable, "-m", "cm_fused"],
        cwd=tmp_path / "clone",
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert (
        "PROBLEM: the C++ extension was not built. Python imports cm_fused from "
        f"{tmp_path / 'clone'}, which hides the one installed in {site}: start Python in another "
        "folder"
    ) in run.stdout


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ({"url": "file:///a/b%20c", "dir_info": {}}, "'/a/b c'"),
        ({"url": "file:///a/b", "dir_info": {"editable": True}}, "--editable /a/b"),
        ({}, "--no-binary cm_fused cm_fused==7.0"),
    ],
)
def test_command_that_installs_it_again(
    origin: dict[str, Any], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command names the place that pip says the package came from."""
    info = tmp_path / "cm_fused-7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: cm_fused\nVersion: 7.0\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_install, "PACKAGE", tmp_path / "cm_fused")
    assert _install.install_command() == (
        "CM_FUSED_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps " + source
    )


@pytest.mark.parametrize("is_installed", [True, False])
def test_command_for_a_checkout_whose_path_has_a_space(
    is_installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkout's path is one argument of pip, with metadata beside it or without.

    Older tests have a space only in the address that pip records; a checkout's was not quoted.
    """
    checkout = tmp_path / "a b"
    checkout.mkdir()
    (checkout / "setup.py").touch()
    distribution = Mock(version="7.0", **{"read_text.return_value": None})
    error = None if is_installed else metadata.PackageNotFoundError()
    found = Mock(return_value=distribution, side_effect=error)
    monkeypatch.setattr(metadata, "distribution", found)
    monkeypatch.setattr(_install, "PACKAGE", checkout / "cm_fused")
    assert shlex.split(_install.install_command())[-1] == str(checkout)
