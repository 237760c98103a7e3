"""The paper's models, its settings, and sweeps that are interrupted and go on."""

import itertools
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.paper import models
from bench.paper import train as command
from bench.paper.contenders import PAPERS, SYSTEMS, VARIED, Hyperparameters
from bench.paper.datasets import Data, from_words
from bench.paper.measures import Measure
from bench.paper.paper_numbers import TABLES_6_TO_8
from bench.paper.presets import learning_rates
from bench.paper.sweep import Config, Run, finished, run_all, to_line
from bench.paper.tasks import TASKS, Task
from bench.paper.trainer import evaluate, train
from bench.paper.training_claims import training_claims
from bench.paper.training_table import results_table, section

pytestmark = pytest.mark.slow

_WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
_CONFIG = Config("tiny", "Adam", Hyperparameters(3e-2), seed=0, epochs=3, drops=(2,))


def _text(_: Path = Path()) -> Data:
    text = ["<unk>", *(_WORDS * 60)]
    return from_words(text, text[:200], {word: i for i, word in enumerate(["<unk>", *_WORDS])})


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that takes a second: what follows each of eight letters."""
    model = partial(models.LanguageModel, width=8)
    monkeypatch.setitem(TASKS, "tiny", Task(_text, model, 4, 3, (2,), text=True))


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


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains(system: str) -> None:
    """The held-out loss falls, and every epoch is recorded."""
    lr = 1.0 if system.startswith("SGD") else 3e-2
    run = train(replace(_CONFIG, system=system, hyperparameters=Hyperparameters(lr), epochs=6))
    assert len(run.val_losses) == len(run.scores) == len(run.measures) == 6
    assert run.val_losses[-1] < run.val_losses[0] - 0.3


def test_runs_of_a_seed_share_weights_and_batches() -> None:
    """With a learning rate of next to nothing all systems stay together; another seed does not."""
    still = replace(_CONFIG, hyperparameters=Hyperparameters(1e-12))
    adam, cm = train(still), train(replace(still, system="Adam+SAM+CM"))
    assert adam.val_losses == pytest.approx(cm.val_losses, rel=1e-3)
    assert adam.val_losses != pytest.approx(train(replace(still, seed=1)).val_losses, rel=1e-3)


def test_learning_rate_drops_after_an_epoch() -> None:
    """Runs part with the first epoch after a drop, in which a step is a tenth as long."""
    dropped, plain = train(_CONFIG), train(replace(_CONFIG, drops=()))
    assert dropped.val_losses[:2] == plain.val_losses[:2]
    lengths = [run.measures[2].distance - run.measures[1].distance for run in (dropped, plain)]
    assert 0 < lengths[0] < lengths[1] / 3


def test_measures() -> None:
    """The distance is of every run, the buffer of those that have one, sharpness when asked for."""
    adam, cm = (
        train(replace(_CONFIG, system=system, sharpness_every=2)).measures
        for system in ("Adam", "Adam+SAM+CM")
    )
    assert [reading.epoch for reading in adam] == [1, 2, 3]
    assert all(reading.distance > 0 and reading.variance is None for reading in adam)
    assert [reading.sharpness is None for reading in cm] == [True, False, False]
    for reading in cm:
        assert reading.variance is not None
        assert reading.relative_variance is not None
        assert reading.agreement is not None
        assert 0 < reading.relative_variance < 1
        assert -1 <= reading.agreement <= 1


def test_readings_change_nothing() -> None:
    """A run with sharpness has the losses of the one without."""
    config = replace(_CONFIG, system="Adam+CM")
    assert train(replace(config, sharpness_every=1)).val_losses == train(config).val_losses


def test_amp_trains() -> None:
    """Under autocast the model computes in bfloat16: near the float32 run, not equal to it."""
    plain, amp = train(_CONFIG), train(replace(_CONFIG, amp=True))
    assert amp.val_losses == pytest.approx(plain.val_losses, rel=0.1)
    assert amp.val_losses != plain.val_losses


def test_divergence_is_recorded(tmp_path: Path) -> None:
    """A run that blows up ends, is never the best, and has a line that reads back."""
    wild = train(replace(_CONFIG, hyperparameters=Hyperparameters(1e30), epochs=5))
    assert wild.diverged
    assert command.best([wild, train(_CONFIG)]) == _CONFIG
    assert "diverged in 1" in results_table([wild], {})
    path = tmp_path / "runs.jsonl"
    path.write_text(to_line(wild))
    assert finished(path) == {wild.config: wild}


@pytest.mark.parametrize("system", SYSTEMS)
def test_stopped_run_goes_on(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after two epochs has the results of one that is not."""
    config = replace(_CONFIG, system=system, sharpness_every=1)
    whole = train(config)
    with monkeypatch.context() as patch:
        patch.setattr("bench.paper.trainer.evaluate", _stops_after(2))
        with pytest.raises(RuntimeError, match="the power went"):
            train(config, tmp_path, every=0.0)
    assert len(list(tmp_path.iterdir())) == 1
    # One epoch is left.
    monkeypatch.setattr("bench.paper.trainer.evaluate", _stops_after(1))
    assert train(config, tmp_path) == whole
    assert not list(tmp_path.iterdir())


def _stops_after(calls: int) -> Callable[..., tuple[float, float]]:
    counter = itertools.count(1)

    def evaluate_or_stop(*arguments: object) -> tuple[float, float]:
        if next(counter) > calls:
            raise RuntimeError("the power went")
        return evaluate(*arguments)  # type: ignore[arg-type]

    return evaluate_or_stop


def _fake(config: Config) -> Run:
    if config.seed == 7:
        raise RuntimeError("the power went")
    return Run(config, [2.0], [2.0 + config.seed], [9.0], [], 8.0, 0.0)


def test_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    """What is in a file is not run again, half a line is; what another file has is copied."""
    configs = [replace(_CONFIG, seed=seed) for seed in range(4)]
    cut, other = tmp_path / "cut.jsonl", tmp_path / "other.jsonl"
    lines = [to_line(replace(_fake(config), state_bytes=9.0)) for config in configs]
    cut.write_text(lines[0] + lines[1][:50])
    other.write_text(lines[2])
    runs = run_all(configs, cut, 1, _fake, [other])
    assert [run.config for run in runs] == configs
    assert [run.state_bytes for run in runs] == [9.0, 8.0, 9.0, 8.0]
    assert finished(cut) == {run.config: run for run in runs}


def test_failed_run_keeps_the_others(tmp_path: Path) -> None:
    """An exception ends the sweep; what had finished stays."""
    path = tmp_path / "runs.jsonl"
    configs = [replace(_CONFIG, seed=seed) for seed in (0, 7)]
    with pytest.raises(RuntimeError, match="the power went"):
        run_all(configs, path, 1, _fake)
    assert list(finished(path)) == configs[:1]


def test_damaged_results(tmp_path: Path) -> None:
    """A bad line that is not the last is no interrupted write."""
    path = tmp_path / "runs.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"runs.jsonl must be one run a line, line 1 is not"):
        finished(path)


def _penn(folder: Path) -> list[str]:
    for part in ("train", "valid"):
        (folder / f"ptb.{part}.txt").write_text("a b <unk> c\n" * 60)
    return ["lstm-ptb", "--data", str(folder), "--epochs", "2", "--seeds", "2", "--drops", "1"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Search, seeds, table and curves; the same again runs nothing; presets share runs."""
    out = tmp_path / "out"
    arguments = [*_penn(tmp_path), "--lr", "0.003", "1e-5", "1e-6", "--out", str(out)]
    search = [*arguments, "--systems", "Adam", "Adam+CM"]
    command.main(search)
    files = {path.name: path.read_bytes() for path in (out / "lstm-ptb").glob("*.*")}
    assert set(files) == {"grid.jsonl", "search.jsonl", "search.txt", "search.png"}
    table = files["search.txt"].decode()
    assert table.count("3 + 2") == 2
    assert "Adam+CM: the best lr, 0.003, lies on the edge of the grid." in table
    assert "python -m bench.paper.train lstm-ptb --data" in table
    assert "8 training examples, 8 held out, 5 tokens" in table
    assert files["search.png"].startswith(b"\x89PNG")
    assert len(files["grid.jsonl"].splitlines()) == 6
    command.main(search)
    assert files["search.jsonl"] == (out / "lstm-ptb/search.jsonl").read_bytes()
    command.main([*arguments, "--preset", "paper-default", "--systems", "Adam"])
    default = (out / "lstm-ptb/paper-default.jsonl").read_bytes()
    # All systems of a seed stand together.
    assert default == b"".join(files["search.jsonl"].splitlines(keepends=True)[::2])
    capsys.readouterr()


def test_every_system_has_the_same_budget(tmp_path: Path) -> None:
    """A search of Table 5 takes as many points of every system's grid as the smallest has."""
    arguments = [*_penn(tmp_path), "--table-5", "--systems", *PAPERS]
    parsed = command._parse_arguments(arguments)
    grids = command.search_configs(parsed, PAPERS)
    assert [len(grid) for grid in grids.values()] == [36] * 5
    assert len({config for grid in grids.values() for config in grid}) == 180
    for between, count in ((False, 4), (True, 7)):
        rates = [learning_rates(system, between) for system in SYSTEMS]
        assert {len(set(of_one)) for of_one in rates} == {count}


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.tuned_like])
def test_tuned_settings_are_the_papers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset has every number of Tables 6 to 8 for its task, and nothing else but defaults."""
    monkeypatch.setattr(command, "load_data", lambda *_: None)
    parsed = command._parse_arguments([name, "--preset", "paper-tuned", "--data", "."])
    settings = command.chosen_settings(parsed, {})
    assert tuple(setting.system for setting in settings) == PAPERS
    like = TASKS[name].tuned_like
    assert like is not None
    for setting in settings:
        printed = TABLES_6_TO_8[(*like, setting.system)]._asdict()
        has = {key for key, value in printed.items() if value is not None}
        assert has == set(VARIED[setting.system])
        assert setting.hyperparameters == Hyperparameters(**{key: printed[key] for key in has})


@pytest.mark.parametrize(("name", "beta2"), [("wrn-cifar10", 0.999), ("lstm-ptb", 0.99)])
def test_default_settings_are_the_papers(
    name: str, beta2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a search of its own every system has the defaults and the best rate of Adam's."""
    monkeypatch.setattr(command, "load_data", lambda *_: None)
    parsed = command._parse_arguments([name, "--preset", "paper-default", "--data", "."])
    assert parsed.systems == list(PAPERS)
    (config, *others) = command.search_configs(parsed, ["Adam"])["Adam"]
    assert len(others) == 3
    ones = [1.0] * config.epochs
    adam = [Run(config, ones, ones, ones, [], 8.0, 0.0)]
    settings = command.chosen_settings(parsed, {"Adam": adam})
    expected = Hyperparameters(config.hyperparameters.lr, 0.9, beta2, 5, 0.7, 0.05)
    assert {setting.hyperparameters for setting in settings} == {expected}


@pytest.mark.parametrize(
    ("name", "epochs", "drops", "beta2"),
    [
        ("lstm-ptb", 40, (25,), 0.99),
        ("wrn-cifar100", 100, (50,), 0.999),
        ("resnet34-cifar10", 100, (50,), 0.999),
        ("efficientnet-folder", 90, (30, 60), 0.99),
    ],
)
def test_schedules_are_the_papers(
    name: str, epochs: int, drops: tuple[int, ...], beta2: float
) -> None:
    """Section 5's epochs and drops, and what holds without a grid search."""
    task = TASKS[name]
    assert (task.epochs, task.drops, task.beta2) == (epochs, drops, beta2)
    assert task.fixed == ((1e-4, 1e-4) if name == "efficientnet-folder" else None)
    assert astuple(Hyperparameters(1.0))[1:6] == (0.9, 0.99, 5, 0.7, 0.05)


def test_every_system_has_a_grid() -> None:
    """A system varies what its name says that it has."""
    assert VARIED.keys() == SYSTEMS.keys()
    assert VARIED["AdamW+CM"] == (
        *("lr", "beta1", "beta2", "capacity", "priority_decay", "weight_decay"),
    )
    assert VARIED["Adam+SAM"] == ("lr", "beta1", "beta2", "rho")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wrn-cifar10"], "wrn-cifar10 needs --data"),
        (["unknown"], "invalid choice: 'unknown'"),
        (
            ["efficientnet-folder", "--data", ".", "--preset", "paper-tuned"],
            "the paper has no tuned settings for efficientnet-folder",
        ),
    ],
)
def test_command_line_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is named before anything is trained."""
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def _scored(system: str, seed: int, scores: list[float], **setting: int) -> Run:
    config = replace(_CONFIG, system=system, seed=seed, epochs=4, drops=(2,))
    hyperparameters = replace(config.hyperparameters, **setting)
    config = replace(config, hyperparameters=hyperparameters)
    # A capacity of C has a sharpness of 100 / C, and gradients twice the momenta's variance.
    capacity = hyperparameters.capacity
    reading = Measure(4, 3.0 * capacity, 100 / capacity, 2.0 if "CG" in system else 1.0, 0.5, 0.1)
    return Run(config, scores, scores, scores, [reading], 8.0, 1.0)


def _write(folder: Path, preset: str, runs: list[Run]) -> None:
    (folder / "tiny").mkdir(exist_ok=True)
    # Claims do not depend on the order of the lines.
    text = "".join(to_line(run) for run in reversed(runs))
    (folder / "tiny" / f"{preset}.jsonl").write_text(text)


def test_language_claims(tmp_path: Path) -> None:
    """Runs are paired by seed; the paper's prediction is a positive difference."""
    runs = [
        _scored(system, seed, [score + seed for score in scores])
        for system, scores in (
            ("Adam", [9.0, 8.0, 7.0, 6.0]),
            ("Adam+CG", [9.0, 8.0, 5.0, 5.5]),
            ("Adam+CM", [6.0, 3.0, 4.0, 4.5]),
            ("AdEMAMix", [6.0, 3.0, 2.0, 1.0]),
        )
        for seed in range(3)
    ]
    _write(tmp_path, "paper-tuned", runs)
    found = {(claim.id, claim.text): claim.estimate for claim in training_claims(tmp_path)}
    values = {key: estimate.interval.value for key, estimate in found.items() if estimate}
    assert values["F7-a", "Adam+CM has a lower perplexity than Adam"] == pytest.approx(3.0)
    # Adam reaches its best of 6 after four epochs, Adam+CM after one.
    assert values["F7-a", "Adam+CM converges faster than Adam"] == pytest.approx(3.0)
    assert values["F7-a", "Adam+CM has its lowest perplexity by epoch 18"] == pytest.approx(16.5)
    text = "Adam+CG has a lower perplexity than Adam"
    assert values["F7-b", text] == pytest.approx(1.0)
    text = "Adam+CG gets lower after the learning rate falls"
    assert values["F7-b", text] == pytest.approx(3.0)
    rises = [100 * (4.5 + seed) / (3 + seed) - 100 for seed in range(3)]
    text = "Adam+CM overfits after it converged"
    assert values["F7-c", text] == pytest.approx(sum(rises) / 3)
    assert values["not in the paper", "Adam+CM is better than AdEMAMix"] == pytest.approx(-2.0)
    # No row has a system that did not run.
    assert not any("SAM" in text for _, text in found)


def test_image_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy is better the higher it is; readings are compared by their logarithms."""
    monkeypatch.setitem(TASKS, "tiny", replace(TASKS["tiny"], text=False))
    runs = [
        _scored(system, seed, scores, capacity=capacity)
        for system, scores, capacity in (
            ("Adam", [50.0, 60.0, 70.0, 60.0], 10),
            ("Adam+CG", [40.0, 50.0, 70.0, 60.0], 1),
            ("Adam+CM", [50.0, 80.0, 90.0, 60.0], 100),
        )
        for seed in range(3)
    ]
    _write(tmp_path, "search", runs)
    _write(tmp_path, "capacities", [run for run in runs if run.config.system == "Adam+CM"] + [
        _scored("Adam+CM", seed, [1.0] * 4, capacity=10) for seed in range(3)
    ])  # fmt: skip
    found = {(claim.id, claim.text, claim.measure): claim.estimate
             for claim in training_claims(tmp_path)}  # fmt: skip
    values = {(key[0], key[1]): e.interval.value for key, e in found.items() if e}
    assert values["T1-c", "Adam+CM has a higher accuracy than Adam"] == pytest.approx(20.0)
    assert values["F8L", "Adam+CM converges faster than Adam"] == pytest.approx(1.0)
    text = "Adam+CM has a lower sharpness in training than Adam"
    assert values["F10a", text] == pytest.approx(1.0)
    text = "Adam+CM's parameters travel farther than Adam+CG's"
    assert values["F10b", text] == pytest.approx(297.0)
    variances = [e.interval.value for key, e in found.items() if key[0] == "F10c" and e]
    assert variances == pytest.approx([0.30103, 0.0])
    assert values["F8R", "Adam+CM ends flatter with C = 100 than with C = 10"] == pytest.approx(1.0)


def test_diverged_runs_decide_nothing(tmp_path: Path) -> None:
    """A claim on a system that diverged in a seed has no estimate, and says so."""
    runs = [_scored(system, seed, [9.0] * 4) for system in PAPERS for seed in range(2)]
    wild = replace(runs[0], scores=[9.0], val_losses=[9.0], train_losses=[9.0])
    _write(tmp_path, "search", [wild, *runs[1:]])
    claims = [claim for claim in training_claims(tmp_path) if claim.text.endswith(" than Adam")]
    assert claims
    assert all(claim.estimate is None and claim.needs == "a run diverged" for claim in claims)


def test_report_has_every_table(tmp_path: Path) -> None:
    """A table stands with its picture."""
    assert section(tmp_path, "training") == "Not run."
    folder = tmp_path / "lstm-ptb"
    folder.mkdir()
    (folder / "paper-tuned.txt").write_text("the table\n")
    text = section(tmp_path, "training")
    assert "### lstm-ptb, paper-tuned" in text
    assert "```\nthe table\n```" in text
    assert "(training/lstm-ptb/paper-tuned.png)" in text
