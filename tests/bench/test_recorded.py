"""The picture of a recorded run."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="pip install matplotlib, which draws")
from bench.recorded import QUANTITIES, main, read_series
from cm_fused import AdamCM
from cm_fused.diagnostics import ALL, Recorder


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Return what was recorded of four steps of two parameters."""
    path = tmp_path / "buffer.csv"
    weight, bias = torch.zeros(3, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
    names = (("weight", weight), ("bias", bias))
    optimizer = AdamCM([weight, bias], capacity=2)
    with Recorder(optimizer, path, every=2, names=names):
        for _ in range(4):
            for param in (weight, bias):
                param.grad = torch.randn_like(param)
            optimizer.step()
    return path


def test_series(recorded: Path) -> None:
    """A pair for each record of each parameter that was asked for."""
    series = read_series(recorded, "filled", [ALL, "bias"])
    assert series == {name: [(2.0, 2.0), (4.0, 2.0)] for name in (ALL, "bias")}


@pytest.mark.parametrize("count", [1, 3, len(QUANTITIES)])
def test_pictures(recorded: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The command draws any number of quantities, and says where to."""
    out = recorded.with_name(f"{count}.png")
    chosen = ["--quantities", *QUANTITIES[:count], "--parameters", ALL, "weight"]
    main([str(recorded), "--out", str(out), *chosen])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out


def test_the_file_decides_the_name(recorded: Path) -> None:
    """Without a name the picture stands beside the file."""
    main([str(recorded)])
    assert recorded.with_suffix(".png").exists()


def test_errors(recorded: Path, tmp_path: Path) -> None:
    """What the file does not have is named, with what it has."""
    with pytest.raises(ValueError, match=r"quantity must be one of filled, .*got 'loss'"):
        read_series(recorded, "loss", [ALL])
    with pytest.raises(ValueError, match="parameter must be one of weight, bias, all, got 'head'"):
        read_series(recorded, "filled", ["head"])
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty.csv must have a record"):
        read_series(empty, "filled", [ALL])
