"""The paper's models, and sweeps that are interrupted and go on."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.paper import buffers, models
from bench.paper.contenders import SYSTEMS, VARIED, Hyperparameters
from bench.paper.sweep import Config, Run, finished, run_all, to_line, train
from bench.paper.tasks import TASKS
from bench.paper.train import best, main, results_table
from bench.paper.training_claims import buffer_claims, training_claims

pytestmark = pytest.mark.slow

_CONFIG = Config("wrn-digits", "Adam", Hyperparameters(3e-3), seed=0, steps=6)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # The published sizes: 0.6 M (Zagoruyko and Komodakis, table 4) and ResNet-34's 21.8 M less
        # the 1000 classes and the 7x7 convolution that 32x32 images do not need.
        (models.wide_resnet(40, 1, 10), 563_930),
        (models.resnet34(10), 21_282_122),
        (models.LanguageModel(100, 20), 100 * 20 + 4 * 20 * (20 + 20 + 2) + 100 * 21),
    ],
)
def test_parameters(model: nn.Module, count: int) -> None:
    """A model has the size its definition gives."""
    assert models.parameters(model) == count


@pytest.mark.parametrize(
    "model", [models.wide_resnet(10, 2, 7), models.resnet34(7)], ids=["wrn", "resnet34"]
)
def test_image_models(model: nn.Module) -> None:
    """Images in, logits out, and every parameter has a gradient."""
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_language_model_reads_only_the_past() -> None:
    """A token changes no logit before it."""
    model = models.LanguageModel(11, 8)
    text = torch.randint(11, (1, 9))
    other = text.clone()
    other[0, 5] = (other[0, 5] + 1) % 11
    same = (model(text) == model(other)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 4


def test_wide_resnet_refuses_a_wrong_depth() -> None:
    """A depth between two sizes."""
    with pytest.raises(ValueError, match="depth must be 6n \\+ 4 with n >= 1, got 12"):
        models.wide_resnet(12, 1, 10)


def test_efficientnet() -> None:
    """From timm where it is installed, else an error that says so."""
    try:
        model = models.efficientnet_b0(5)
    except ModuleNotFoundError as error:
        assert "pip install timm" in str(error)  # noqa: PT017
    else:
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("task", [name for name in TASKS if not TASKS[name].needs_data])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains(task: str, system: str) -> None:
    """The held-out loss falls."""
    steps = 20 if TASKS[task].text else 60
    run = train(Config(task, system, Hyperparameters(3e-3), seed=0, steps=steps))
    assert run.eval_steps[-1] == steps
    assert run.val_losses[-1] < run.val_losses[0] - 0.3


def test_runs_of_a_seed_share_weights_and_batches() -> None:
    """With a learning rate of next to nothing all systems stay together; another seed does not."""
    still = replace(_CONFIG, hyperparameters=Hyperparameters(1e-12))
    adam, cm = train(still), train(replace(still, system="Adam+SAM+CM"))
    assert adam.val_losses[-1] == pytest.approx(cm.val_losses[-1], rel=1e-3)
    assert adam.val_losses[-1] != pytest.approx(train(replace(still, seed=1)).loss, rel=1e-3)


def test_amp_trains() -> None:
    """Under autocast the model computes in bfloat16: near the float32 run, not equal to it."""
    plain, amp = train(_CONFIG), train(replace(_CONFIG, amp=True))
    assert amp.loss == pytest.approx(plain.loss, rel=0.1)
    assert amp.loss != plain.loss


def test_divergence_is_recorded() -> None:
    """A run that blows up ends, and is never the best."""
    wild = train(replace(_CONFIG, hyperparameters=Hyperparameters(1e30)))
    assert wild.loss == float("inf")
    assert best([wild, train(_CONFIG)]) == _CONFIG
    assert "diverged in 1" in results_table([wild])


def test_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    """What is in the file is not run again, half a line is, and the results are the same."""
    configs = [replace(_CONFIG, seed=seed) for seed in range(3)]
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = run_all(configs, whole, workers=1)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    marked = lines[0].replace('"state_bytes": 8.', '"state_bytes": 9.')
    cut.write_text(marked + lines[1][:50])
    runs = run_all(configs, cut, workers=1)
    first = next(i for i, run in enumerate(runs) if run.state_bytes > 9)
    for i, (run, other) in enumerate(zip(runs, expected, strict=True)):
        # The first line's run was taken from the file, mark and all; the others ran.
        assert run == (replace(other, state_bytes=run.state_bytes) if i == first else other)
    assert len(cut.read_text().splitlines()) == 3
    assert finished(cut) == {run.config: run for run in runs}


def _fail(config: Config) -> Run:
    if config.seed == 1:
        raise RuntimeError("the power went")
    return Run(config, [1], [0.0], 0.0, 0.0)


def test_failed_run_keeps_the_others(tmp_path: Path) -> None:
    """An exception ends the sweep; what had finished stays."""
    path = tmp_path / "runs.jsonl"
    configs = [replace(_CONFIG, seed=seed) for seed in range(2)]
    with pytest.raises(RuntimeError, match="the power went"):
        run_all(configs, path, workers=1, train_one=_fail)
    assert list(finished(path)) == configs[:1]


def test_damaged_results(tmp_path: Path) -> None:
    """A bad line that is not the last is no interrupted write."""
    path = tmp_path / "runs.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"runs.jsonl must be one run a line, line 1 is not"):
        finished(path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Search, seeds, table and curves; the same again runs nothing."""
    arguments = [
        *("wrn-digits", "--systems", "Adam", "Adam+CM", "--lr", "0.003", "1e-6"),
        *("--capacity", "2", "7"),
        *("--steps", "6", "--seeds", "2", "--out", str(tmp_path)),
    ]
    main(arguments)
    table = (tmp_path / "table.txt").read_text()
    assert len([line for line in table.splitlines() if line.startswith("wrn-digits")]) == 2
    assert "±" in table
    # Adam has no buffer: its grid is two runs, that of Adam+CM four.
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 6
    assert "capacity" in table.splitlines()[3]
    assert "capacity" not in table.splitlines()[2]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = {name: (tmp_path / name).read_text() for name in ("search.jsonl", "runs.jsonl")}
    main(arguments)
    assert before == {name: (tmp_path / name).read_text() for name in before}
    capsys.readouterr()


def test_every_system_has_a_grid() -> None:
    """No system is forgotten, and each varied name exists."""
    names = {field.name for field in fields(Hyperparameters)}
    assert VARIED.keys() == SYSTEMS.keys()
    assert set().union(*VARIED.values()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["wrn-cifar10"], "wrn-cifar10 needs --data"), (["unknown"], "invalid choice: 'unknown'")],
)
def test_command_line_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is named before anything is trained."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_buffers_are_recorded_and_drawn(tmp_path: Path) -> None:
    """A CSV file for each run, a figure for each quantity, and the numbers read back."""
    buffers.main(["--out", str(tmp_path), "--seeds", "2", "--steps", "20"])
    paths = sorted(tmp_path.glob("Adam+CM-*.csv"))
    steps, agreement = buffers.series(paths, "agreement")
    assert steps.tolist() == [10, 20]
    assert agreement.shape == (2, 2)
    assert (agreement.abs() <= 1).all()
    claims = list(buffer_claims(tmp_path))
    assert [claim.figure for claim in claims] == ["Fig. 8, right", "Fig. 10"]
    gradients = buffers.series(sorted(tmp_path.glob("Adam+CG-*.csv")), "agreement")[1]
    expected = (agreement.mean(1) - gradients.mean(1)).mean().item()
    assert claims[1].difference.value == pytest.approx(expected)
    for quantity in buffers.QUANTITIES:
        assert (tmp_path / f"{quantity}.png").read_bytes().startswith(b"\x89PNG")


def test_training_claims(tmp_path: Path) -> None:
    """Losses are paired by seed whatever their order in the file; lower is what is claimed."""
    losses = {"Adam+CM": (1.0, 2.0, 3.0), "Adam+SAM+CM": (1.0, 1.0, 1.0)}
    runs = [
        Run(replace(_CONFIG, system=system, seed=seed), [1], [loss], 0.0, 0.0)
        for system in SYSTEMS
        for seed, loss in enumerate(losses.get(system, (2.1, 3.0, 4.1)))
    ]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(to_line(run) for run in reversed(runs)))
    claims = {claim.text: claim for claim in training_claims(path)}
    won = claims["wrn-digits: Adam+CM has a lower held-out loss than Adam"]
    assert won.difference.value == pytest.approx(3.2 / 3)
    assert won.verdict == "reproduced in direction"
    assert claims["wrn-digits: AdamW+CM has a lower held-out loss than Adam"].verdict != won.verdict
