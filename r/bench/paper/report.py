"""CSV files and ``REPORT.md``."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import describe
from bench.machine import versions as machine_versions
from bench.paper import experiments
from bench.paper.claims import claims
from bench.paper.experiments import CAPACITIES, LEARNING_RATE, SHARPNESS, STEPS
from bench.paper.results import DIMENSIONS, Results
from bench.paper.statistics import RULE, Claim, Interval, mean_interval, proportion_interval
from bench.paper.training_claims import buffer_claims, training_claims

TRAINING = "training"
BUFFERS = "buffers"

Row = Sequence[object]
Table = tuple[Row, list[Row]]


def save_all(results: Results, figures: Sequence[str], folder: Path) -> None:
    """Write a CSV for each table, and ``REPORT.md`` with all of them and the figures."""
    tables = {
        "claims": _claims([*claims(results), *_claims_of_runs(folder)]),
        "escape_sharpness": _escape_sharpness(results),
        "escape_capacity": _escape_capacity(results),
        "escape_variants": _escape_variants(results),
        "best": _best(results),
        "minima": _minima(),
        "table_2": _table_2(results),
    }
    for name, (header, rows) in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([header, *rows])
    (folder / "REPORT.md").write_text(_report(tables, figures, folder))


def _claims_of_runs(folder: Path) -> list[Claim]:
    """Return the claims on trained models, of the runs that the folder has."""
    found: list[Claim] = []
    if (folder / TRAINING / "runs.jsonl").exists():
        found += training_claims(folder / TRAINING / "runs.jsonl")
    if (folder / BUFFERS).exists():
        found += buffer_claims(folder / BUFFERS)
    return found


def _claims(found: Iterable[Claim]) -> Table:
    header = ("where", "claim", "measure (the paper: > 0)", "ours [95 %]", "verdict")
    return header, [
        (claim.figure, claim.text, claim.measure, claim.difference, claim.verdict)
        for claim in found
    ]


def _escape_sharpness(results: Results) -> Table:
    header = ("D", "system", "s", "coordinates at the flat minimum", "runs wholly there")
    return header, [
        (dimension, system, f"{s:g}", mean_interval(shares), proportion_interval(shares == 1))
        for (system, dimension), by_sharpness in results.escape.items()
        for s, shares in zip(SHARPNESS, by_sharpness, strict=True)
    ]


def _escape_capacity(results: Results) -> Table:
    header = ("system", *(f"C = {capacity}" for capacity in CAPACITIES))
    systems = dict.fromkeys(system for system, _ in results.escape_capacity)
    return header, [
        (system, *(mean_interval(results.escape_capacity[system, c].mean(0)) for c in CAPACITIES))
        for system in systems
    ]


def _escape_variants(results: Results) -> Table:
    dimension = DIMENSIONS[0]
    base = {("as above", s): e for (s, d), e in results.escape.items() if d == dimension}
    variants = {**base, **results.escape_variants}
    systems = list(dict.fromkeys(system for _, system in variants))
    return ("setting", *systems), [
        (name, *(_share(variants.get((name, system))) for system in systems))
        for name in dict.fromkeys(name for name, _ in variants)
    ]


def _share(shares: Tensor | None) -> Interval | str:
    return "-" if shares is None else mean_interval(shares.mean(0))


def _best(results: Results) -> Table:
    header = ("surface", "system", "lr", "loss", "median loss", "sharpness", "median sharpness")
    return header, [
        (landscape, system, outcome.setting.lr, *_loss_and_sharpness(outcome))
        for (landscape, system), outcome in results.best.items()
    ]


def _table_2(results: Results) -> Table:
    header = (
        *("surface", "system", "C", "λ", "lr"),
        *("loss", "median loss", "sharpness", "median sharpness"),
    )
    return header, [
        (*key, outcome.setting.lr, *_loss_and_sharpness(outcome))
        for key, outcome in results.grid.items()
    ]


def _loss_and_sharpness(outcome: experiments.Outcome) -> Iterable[object]:
    for samples in (outcome.losses, outcome.sharpness):
        yield mean_interval(samples)
        yield f"{samples.median():.3g}"


def _markdown(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    # A bar inside a cell would end it.
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _minima() -> Table:
    landscape = experiments.GOLDSTEIN_PRICE
    points = torch.tensor(experiments.GOLDSTEIN_PRICE_MINIMA, dtype=torch.float64)
    found = zip(points, *experiments.loss_and_sharpness(landscape, points), strict=True)
    return ("x1", "x2", "loss", "sharpness"), [
        (*(f"{x:g}" for x in point), f"{loss:.3f}", f"{sharpness:.3g}")
        for point, loss, sharpness in found
    ]


def _settings() -> str:
    rates = ", ".join(f"{lr:g}" for lr in experiments.LEARNING_RATES)
    return (
        "Ours, where the paper's are not known to us: betas (0.9, 0.99), C = 5, λ = 0.7, ρ = 0.05, "
        f"{STEPS} steps, no schedule, float64. Escape: {experiments.STARTS} starts uniform in "
        f"[−5, 5]^D, lr {LEARNING_RATE}; a coordinate has escaped when it ends nearer to the flat "
        f"minimum than to the sharp one. Loss and sharpness: {experiments.SEEDS} uniform starts "
        "(Goldstein-Price: [0, 1]², and again in the original's coordinates; Levy: [−10, 10]²), "
        f"each system at the rate of lowest mean loss of {rates} on {experiments.SEEDS} other "
        "starts. Sharpness is the largest eigenvalue of the exact Hessian at the last point. "
        "Goldstein-Price is the standard log-scaled form, its constant outside the logarithm."
    )


def _machine() -> str:
    machine, versions = describe("cpu"), machine_versions()
    return f"{machine['model']}, {machine['cores']} cores, torch {versions['torch']}"


def _training(folder: Path) -> str:
    if not (folder / TRAINING / "table.txt").exists():
        return "Not run."
    table = (folder / TRAINING / "table.txt").read_text()
    return f"""\
`python -m bench.paper.train lstm-python wrn-digits --out bench/paper/results/{TRAINING}`: a
single-layer LSTM on the bytes of Python's standard library, and WRN-10-1 on scikit-learn's 8x8
digits. They are small stand-ins for the paper's runs (Penn Treebank, CIFAR, ImageNet), which its
data sets and a GPU would take; the same command trains those from `--data`.

```
{table.rstrip()}
```

![held-out loss]({TRAINING}/curves.png)

`python -m bench.paper.buffers`, the digits with a recorder of `cm_fused.diagnostics`: variance of
the buffer (Fig. 8, right) and cosine to the slot of highest priority (Fig. 10).

![variance]({BUFFERS}/variance.png)
![agreement]({BUFFERS}/agreement.png)"""


def _report(tables: dict[str, Table], figures: Sequence[str], folder: Path) -> str:
    verdicts = [str(row[-1]) for row in tables["claims"][1]]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in dict.fromkeys(verdicts))
    pictures = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in figures)
    dimension = DIMENSIONS[0]
    return f"""\
# The paper's claims

Written by `make paper`; on {_machine()}: every number on the toy surfaces was
computed by that run, those of trained models are read from the files of their own runs.

{RULE}

The paper's text was not at hand when this was written, so its own numbers do not stand beside ours,
and no claim can get the verdict *reproduced*, which would need the paper's number in the interval;
the claims are its claims in direction. Of {len(verdicts)}: {counts}.

## Settings

{_settings()}

## Claims

{_markdown(tables["claims"])}

## Escape from sharp minima (Fig. 4)

{_markdown(tables["escape_sharpness"])}

### Against capacity (Fig. 12), D = {dimension}, mean over sharpness

{_markdown(tables["escape_capacity"])}

### How much the open settings matter, D = {dimension}, mean over sharpness

{_markdown(tables["escape_variants"])}

## Loss and sharpness (Fig. 5's table)

{_markdown(tables["best"])}

The local minima of Goldstein-Price on [0, 1]², for comparison:

{_markdown(tables["minima"])}

## Against C and λ (Table 2)

{_markdown(tables["table_2"])}

## Trained models (section 5)

{_training(folder)}

## Figures

{pictures}
"""
