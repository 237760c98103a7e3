"""The picture of what a `Recorder` wrote."""

from pathlib import Path

import pytest
import torch

from cm_fused import AdamCM
from cm_fused.diagnostics import Recorder
from cm_fused.diagnostics.__main__ import main, read_curves


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Record four steps of a model with two parameters."""
    model = torch.nn.Linear(3, 2)
    optimizer = AdamCM(model.parameters())
    path = tmp_path / "buffer.csv"
    with Recorder(optimizer, path, every=2, names=model.named_parameters()):
        for _ in range(4):
            optimizer.zero_grad()
            torch.autograd.backward(model(torch.ones(3)).square().sum())
            optimizer.step()
    return path


def test_curves(recorded: Path) -> None:
    """Every quantity has the recorded steps of the parameters that are asked for."""
    curves = read_curves(recorded, ["all", "weight"])
    steps, values = curves["filled"]["weight"]
    assert steps == [2, 4]
    assert values[0] == 2.0
    assert {*curves["variance"]} == {"all", "weight"}


def test_a_file_that_was_cut_off(recorded: Path) -> None:
    """What a run that was killed wrote is drawn, up to its last complete row.

    Older tests read complete files: a row of "all" without its last values raised a TypeError.
    """
    text = recorded.read_text()
    cut = text[: text.rindex("all") + 6]
    recorded.write_text(cut + "\n" + text.splitlines()[-1] + ",1.0")
    curves = read_curves(recorded, ["all", "weight"])
    assert curves["filled"]["all"][0] == [2]
    assert curves["filled"]["weight"][0] == [2, 4]


def test_picture(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is written beside the CSV file, or where it is asked for."""
    pytest.importorskip("matplotlib")
    main([str(recorded)])
    assert recorded.with_suffix(".png").stat().st_size > 10_000
    other = recorded.with_name("other.png")
    main([str(recorded), "--parameters", "weight", "bias", "--out", str(other)])
    assert other.exists()
    assert f"Written to {other}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("a,b\n1,2\n", ["all"], "path must be a Recorder's CSV file"),
        ("step,parameter,filled\n1,all,2.0\n", ["bais"], "has no parameter 'bais', it has all"),
        ("step,parameter,filled\n", ["all"], "has no parameter 'all', it has no complete row"),
        (None, ["all"], "No such file"),
    ],
)
def test_errors(
    text: str | None,
    names: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that is not a Recorder's, or lacks a parameter, is told with its name."""
    path = tmp_path / "some.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        main([str(path), "--parameters", *names])
    assert message in capsys.readouterr().err
    assert not path.with_suffix(".png").exists()
