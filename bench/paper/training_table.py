"""The tables of trained models, and their section of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.demo.report import align, mean_and_spread
from bench.paper.contenders import VARIED, Hyperparameters
from bench.paper.sweep import Config, Run
from bench.paper.tasks import TASKS


def as_text(config: Config) -> str:
    """Return learning rate and capacity, and what else differs from the defaults."""
    chosen, defaults = config.hyperparameters, Hyperparameters(config.hyperparameters.lr)
    names = [
        name
        for name in VARIED[config.system]
        if name in ("lr", "capacity") or getattr(chosen, name) != getattr(defaults, name)
    ]
    labels = {"capacity": "C", "priority_decay": "lambda"}
    return ", ".join(f"{labels.get(name, name)} {getattr(chosen, name):g}" for name in names)


def by_setting(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return the runs of each system and setting, ordered by seed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        groups.setdefault((run.config.system, as_text(run.config)), []).append(run)
    order = {(run.config.system, as_text(run.config)): i for i, run in enumerate(reversed(runs))}
    return dict(sorted(groups.items(), key=lambda item: -order[item[0]]))


def results_table(runs: Sequence[Run], searched: Mapping[str, Sequence[Run]]) -> str:
    """Return the table of results: mean and standard deviation over the seeds.

    Args:
        runs: Of one task.
        searched: The search's runs, by system; those that have none were not searched.
    """
    unit = "perplexity" if TASKS[runs[0].config.task].text else "accuracy %"
    rows = [
        (
            *("system", "setting", "runs: search + seeds"),
            *(f"best {unit}", "after epoch", f"last {unit}", "last val loss"),
            *("state B/param", "s/run"),
        )
    ]
    for (system, setting), group in by_setting(runs).items():
        counts = f"{len(searched.get(system, ()))} + {len(group)}"
        seconds = sum(run.seconds for run in group) / len(group)
        rows.append(
            (
                *(system, setting, counts, *_scores(group)),
                *(f"{group[0].state_bytes:.1f}", f"{seconds:.0f}"),
            )
        )
    return align(rows)


def _scores(group: Sequence[Run]) -> tuple[str, str, str, str]:
    diverged = sum(run.diverged for run in group)
    if diverged:
        return (f"diverged in {diverged}", "", "", "")
    return (
        mean_and_spread([run.scores[run.best_epoch - 1] for run in group], 2),
        f"{sum(run.best_epoch for run in group) / len(group):.1f}",
        mean_and_spread([run.scores[-1] for run in group], 2),
        mean_and_spread([run.val_losses[-1] for run in group], 4),
    )


def section(folder: Path, link: str) -> str:
    """Return the report's section on trained models, in Markdown.

    Args:
        folder: The folder ``--out`` of `bench.paper.train`.
        link: The folder as the report refers to it.
    """
    parts = [
        f"""\
### {table.parent.name}, {table.stem}

```
{table.read_text().rstrip()}
```

![{table.parent.name}, {table.stem}]({link}/{table.parent.name}/{table.stem}.png)
"""
        for task in TASKS
        for table in sorted((folder / task).glob("*.txt"))
    ]
    return "\n".join(parts) or "Not run."
