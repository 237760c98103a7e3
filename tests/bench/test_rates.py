"""The bench of learning rates: what its tables say, and that a run trains."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.rates import __main__ as rates
from bench.rates import report
from bench.rates.setups import ADAMW, LEARNING_RATES, MATCHED, PLAIN, SETTINGS, SYSTEMS, TASKS
from bench.rates.train import Job, held_out_loss

TASK = "digits MLP"


def made_up(best: dict[str, float]) -> dict[Job, float]:
    """Return losses that are lowest, 1, at each system's best rate, of three seeds."""
    return {
        Job(TASK, system, lr, seed): 1 + abs(math.log2(lr / best[system])) + 0.01 * (seed - 1)
        for system in SYSTEMS
        for lr in LEARNING_RATES
        for seed in range(3)
    }


def test_best_rates_and_distances() -> None:
    """The table has the best rates, and the loss at AdamW's in AdamW's standard deviations."""
    slow, fast = LEARNING_RATES[2], LEARNING_RATES[4]
    losses = made_up({ADAMW: fast, PLAIN: slow, MATCHED: fast})
    assert report.best_rate(losses, TASK, PLAIN) == slow
    row = report.rates_table(losses, [TASK]).splitlines()[2]
    assert row == (
        "| digits MLP | 0.004 | 1.000 ± 0.010 | 0.001 | 1.000 ± 0.010 | 3.000 (+200.0) "
        "| 0.004 | 1.000 ± 0.010 | 1.000 (+0.0) |"
    )


def test_a_rate_at_which_a_seed_diverged_is_not_the_best() -> None:
    """A loss that is not a number counts for its rate, whatever the other seeds reached."""
    losses = made_up(dict.fromkeys(SYSTEMS, LEARNING_RATES[4]))
    losses[Job(TASK, ADAMW, LEARNING_RATES[4], 1)] = math.nan
    assert report.best_rate(losses, TASK, ADAMW) in (LEARNING_RATES[3], LEARNING_RATES[5])


@pytest.mark.parametrize("system", [*SYSTEMS, *SETTINGS])
def test_a_run_trains(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system lowers the loss from that of guessing, 2.3 nats, and again the same way."""
    monkeypatch.setitem(TASKS, TASK, replace(TASKS[TASK], steps=40))
    job = Job(TASK, system, 1.6e-2, 0)
    loss = held_out_loss(job)
    assert loss < 1.5
    assert held_out_loss(job) == loss


def test_runs_are_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file has is read; what is missing is trained and added, the settings' runs too."""
    monkeypatch.setattr(rates, "LEARNING_RATES", LEARNING_RATES[:2])
    monkeypatch.setattr(report, "LEARNING_RATES", LEARNING_RATES[:2])
    trained: list[Job] = []

    def loss_of(job: Job) -> float:
        trained.append(job)
        return 1 + job.lr + 0.01 * job.seed

    monkeypatch.setattr(rates, "held_out_loss", loss_of)
    known = Job(TASK, ADAMW, LEARNING_RATES[0], 1)
    runs = tmp_path / "results" / "runs.jsonl"
    runs.parent.mkdir()
    runs.write_text(json.dumps({**asdict(known), "loss": 7.0}) + "\n")
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in ("rates", "settings"))
    )
    arguments = ["--tasks", TASK, "--seeds", "2", "--runs", str(runs), "--page", str(page)]
    rates.main(arguments)
    assert known not in trained
    assert len(trained) == len({*trained}) == 3 * 2 * 2 + 3 * 2 * 2 - 1
    assert "| digits MLP | 0.0005 | 1.006 ± 0.007 | 0.00025 |" in page.read_text()
    trained.clear()
    rates.main(arguments)
    assert not trained
    assert "AdamWCM, match_rms_adamw: best lr" in capsys.readouterr().out
