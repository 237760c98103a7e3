"""CSV files and ``REPORT.md``."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import describe
from bench.machine import versions as machine_versions
from bench.paper import experiments
from bench.paper.claims import claims, not_run
from bench.paper.experiments import (
    ACKLEY,
    CAPACITY,
    DECAY,
    ESCAPES,
    LANDSCAPES,
    LINE_SHARPNESS,
    LINE_STARTS,
    OURS,
    PAPER,
    SHARPNESS,
    UNIT,
    Outcome,
    at_flat,
    at_zero,
)
from bench.paper.paper_numbers import FIGURE_5, TABLE_2
from bench.paper.results import Results
from bench.paper.statistics import (
    CONTRADICTED,
    HOLDS,
    NOT_RUN,
    RULE,
    UNDECIDED,
    Claim,
    Interval,
    mean_interval,
    verdicts,
)
from bench.paper.systems import SYSTEMS
from bench.paper.training_claims import training_claims
from bench.paper.training_table import section

TRAINING = "training"

Row = Sequence[object]
Table = tuple[Row, list[Row]]
Judged = list[tuple[Claim, str, str]]


def save_all(results: Results, figures: Sequence[str], folder: Path) -> None:
    """Write a CSV for each table, and ``REPORT.md`` with the claims, the tables and the figures."""
    found = [*claims(results), *_claims_of_runs(folder)]
    found = sorted([*found, *not_run(found)], key=_order)
    judged = [(c, *v) for c, v in zip(found, verdicts(found), strict=True)]
    tables = {
        "claims": _claims(judged),
        "outcomes": _outcomes(results),
        "ackley": _ackley(results),
        "escapes": _escapes(results),
        "capacity_escapes": _capacity_escapes(results),
        "lines": _lines(results),
        "admission": _admission(results),
        "update_rms": _update_rms(results),
        "first_updates": _first_updates(results),
    }
    for name, (header, rows) in tables.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([header, *rows])
    (folder / "REPORT.md").write_text(_report(results, judged, tables, figures, folder))


def _order(claim: Claim) -> tuple[bool, bool, int]:
    """Return where a claim stands: figures, tables, then what is not in the paper."""
    number = re.search(r"\d+", claim.id)
    return number is None, claim.id.startswith("T"), int(number[0]) if number else 0


def _claims_of_runs(folder: Path) -> list[Claim]:
    """Return the claims on trained models, of the runs that the folder has."""
    return list(training_claims(folder / TRAINING))


def _claims(judged: Judged) -> Table:
    header = (
        *("id", "setting", "starts", "claim", "measure", "paper", "ours", "low", "high", "p"),
        *("samples", "verdict", "after Holm", "needs"),
    )
    rows: list[Row] = []
    for claim, raw, corrected in judged:
        numbers: Row = ("", "", "", "", "")
        if claim.estimate is not None:
            interval, p = claim.estimate.interval, claim.estimate.p
            ends = (f"{x:.6g}" for x in (interval.value, interval.low, interval.high))
            numbers = (*ends, "" if p is None else f"{p:.2g}", claim.estimate.count)
        named = (claim.id, claim.setting, claim.starts, claim.text, claim.measure, claim.paper)
        rows.append((*named, *numbers, raw, corrected, claim.needs))
    return header, rows


def _outcomes(results: Results) -> Table:
    header = ("surface", "starts", "setting", "system", "C", "λ", "lr", "loss", "sharpness")
    return header, [
        (*where, *key, outcome.setting.lr, *_loss_and_sharpness(outcome))
        for where, scan in results.scans.items()
        for key, outcome in scan.items()
    ]


def _ackley(results: Results) -> Table:
    header = (
        *("starts", "setting", "system", "lr", "β1", "β2", "C", "λ", "ρ"),
        *("loss", "distance to (0, 0)", "distance from the start"),
    )
    rows: list[Row] = []
    for starts, found in results.ackley.items():
        for (name, system), outcome in found.items():
            s = outcome.setting
            buffer = (s.capacity, s.priority_decay) if s.has_buffer else ("−", "−")
            varied = (s.lr, *s.betas, *buffer, s.rho if s.has_sam else "−")
            measured = (outcome.losses, outcome.distance, outcome.moved)
            rows.append((starts, name, system, *varied, *map(mean_interval, measured)))
    return header, rows


def _escapes(results: Results) -> Table:
    header = ("setting", "system", "lr", *(f"s = {s:g}" for s in SHARPNESS))
    # The settings one after the other.
    names = list(dict.fromkeys(name for name, _ in results.escapes))
    found = sorted(results.escapes.items(), key=lambda item: names.index(item[0][0]))
    return header, [
        (name, system, setting.lr, *at_flat(ends).sum(1).tolist())
        for (name, system), (setting, ends) in found
    ]


def _capacity_escapes(results: Results) -> Table:
    header = ("D", "system", "C", "λ", "criterion", *(f"s = {s:g}" for s in SHARPNESS))
    criteria = {"within 0.1 of 0": at_zero, "nearer to 0": at_flat}
    return header, [
        (dimension, system, capacity, decay, name, *at(ends).sum(1).tolist())
        for (dimension, system, capacity, decay), ends in results.capacity_escapes.items()
        for name, at in criteria.items()
    ]


def _lines(results: Results) -> Table:
    header = (
        *("system", "C", "λ"),
        *(f"s = {s:g}, x0 = {x:g}" for s in LINE_SHARPNESS for x in LINE_STARTS),
    )
    return header, [
        (*key, *(f"{x:.3f}" for x in path[-1].flatten().tolist()))
        for key, path in results.lines.items()
    ]


def _admission(results: Results) -> Table:
    keys = list(results.admission)
    decays = list(dict.fromkeys(decay for _, _, decay in keys))
    return ("surface", "C", *(f"λ = {decay:g}" for decay in decays)), [
        (surface, c, *(f"{results.admission[surface, c, decay]:.2f}" for decay in decays))
        for surface, c in dict.fromkeys((surface, c) for surface, c, _ in keys)
    ]


def _update_rms(results: Results) -> Table:
    return ("surface", *SYSTEMS), [
        (surface, *(f"{results.update_rms[surface, system]:.2f}" for system in SYSTEMS))
        for surface in dict.fromkeys(surface for surface, _ in results.update_rms)
    ]


def _first_updates(results: Results) -> Table:
    rows: list[Row] = []
    for system, found in results.first_buffers.items():
        lengths = torch.stack(found.updates).square().mean((1, 2)).sqrt() / experiments.LR
        rows.append((system, *(f"{length:.2f}" for length in lengths.tolist())))
    return ("system", *(f"step {i}" for i in range(1, experiments.BUFFER_STEPS + 1))), rows


def _loss_and_sharpness(outcome: Outcome) -> tuple[Interval, Interval]:
    return mean_interval(outcome.losses), mean_interval(outcome.sharpness)


def _markdown(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    # A bar inside a cell would end it.
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _summary(judged: Judged) -> str:
    """Return a table with a line for each claim id: its verdicts, counted."""
    kinds = (HOLDS, CONTRADICTED, UNDECIDED)
    rows: list[Row] = []
    for part in dict.fromkeys(claim.id for claim, _, _ in judged):
        own = [row for row in judged if row[0].id == part]
        papers = [row for row in own if row[0].setting.startswith(PAPER)]
        others = [row for row in own if row not in papers]
        if all(raw == NOT_RUN for _, raw, _ in papers) and papers:
            cells = [NOT_RUN, NOT_RUN]
        else:
            cells = [
                _counted(found, kinds) for found in ([r[1] for r in papers], [r[2] for r in papers])
            ]
        rows.append((part, *cells, _counted([row[1] for row in others], kinds)))
    header = ("id", "paper's setting", "the same after Holm", "other settings")
    return _markdown((header, rows))


def _counted(found: Sequence[str], kinds: Iterable[str]) -> str:
    return ", ".join(f"{found.count(k)} {k}" for k in kinds if k in found) or "−"


def _cell(row: tuple[Claim, str, str]) -> str:
    """Return a verdict; in the paper's setting with its numbers."""
    claim, raw, corrected = row
    verdict = f"**{raw}**" + ("*" if corrected != raw else "")
    return f"{claim.estimate} {verdict}" if claim.setting.startswith(PAPER) else verdict


def _claim_tables(judged: Judged) -> str:
    """Return a section for each claim id, with a table for each surface; a box is a column."""
    sections = []
    for part in dict.fromkeys(claim.id for claim, _, _ in judged):
        own = [row for row in judged if row[0].id == part]
        texts = [f"### {part}"]
        texts += [f"{c.text}: not run, {c.needs}." for c, _, _ in own if c.needs]
        measured = [row for row in own if not row[0].needs]
        groups: dict[str, Judged] = {}
        for row in measured:
            surface = row[0].text.partition(":")[0] if row[0].starts else ""
            groups.setdefault(surface, []).append(row)
        sections.append("\n\n".join([*texts, *(_markdown(_by_box(g)) for g in groups.values())]))
    return "\n\n".join(sections)


def _by_box(judged: Judged) -> Table:
    """Return rows with a column for each box of starts, the narrowest first."""
    found = {claim.starts for claim, _, _ in judged}
    columns = [place.starts for place in (*ACKLEY, UNIT) if place.starts in found] or [""]
    cells: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for row in judged:
        c = row[0]
        cells.setdefault((c.text, c.measure, c.setting, c.paper), {})[c.starts] = _cell(row)
    names = [f"ours, {name}" if name else "ours" for name in columns]
    header = ("claim", "measure (the paper: > 0)", "setting", "paper", *names)
    return header, [
        (*key, *(by_box.get(name, "") for name in columns)) for key, by_box in cells.items()
    ]


def _paper_tables(results: Results) -> str:
    """Return Fig. 5's table and Table 2, the paper's numbers beside ours from every box."""
    texts = []
    for surface in ("Goldstein-Price", "Levy"):
        boxes = [place.starts for place in LANDSCAPES if place.name == surface]
        keys = [(system, CAPACITY, DECAY) for system in SYSTEMS]
        if surface == "Levy":
            keys += [key for key in TABLE_2 if key[1:] != (CAPACITY, DECAY)]
        theirs = {(s, CAPACITY, DECAY): n for (name, s), n in FIGURE_5.items() if name == surface}
        theirs |= TABLE_2 if surface == "Levy" else {}
        for setting in (experiments.MORE_STARTS, experiments.PACKAGE):
            rows: list[Row] = []
            for key in keys:
                paper = theirs.get(key)
                found = (results.scans[surface, box][(setting, *key)] for box in boxes)
                rows.append(
                    (
                        *key,
                        f"{paper.loss} / {paper.sharpness}" if paper else "−",
                        *map(_pair, found),
                    )
                )
            header = ("system", "C", "λ", "paper", *boxes)
            texts.append(f"{surface}, {setting}: loss / sharpness.\n\n{_markdown((header, rows))}")
    return "\n\n".join(texts)


def _pair(outcome: Outcome) -> str:
    return f"{outcome.losses.mean():.2f} / {outcome.sharpness.mean():.1f}"


def _scan_sentence(judged: Judged, surface: str, part: str, name: str) -> str:
    """Return in words from which boxes ours beats all others in the paper's setting."""
    by_box: dict[str, list[str]] = {}
    for claim, raw, _ in judged:
        wanted = (part, f"paper, {experiments.MORE_STARTS}", surface)
        if (claim.id, claim.setting, claim.text.partition(":")[0]) == wanted:
            by_box.setdefault(claim.starts, []).append(raw)
    kinds = {
        "has": [box for box, found in by_box.items() if set(found) == {HOLDS}],
        "does not have": [box for box, found in by_box.items() if CONTRADICTED in found],
    }
    said = [
        f"{verb} the lowest {name} from starts in {', '.join(boxes)}"
        for verb, boxes in kinds.items()
        if boxes
    ]
    return f"{surface}: {OURS} " + (", and ".join(said) or f"ties in {name} from every box") + "."


def _scan_sentences(judged: Judged) -> str:
    return " ".join(
        _scan_sentence(judged, surface, part, name)
        for surface in ("Goldstein-Price", "Levy")
        for part, name in (("F5-loss", "loss"), ("F5-sharp", "sharpness"))
    )


def _settings() -> str:
    boxes = ", ".join(f"±{box}" for box in experiments.BOXES)
    rates = ", ".join(f"{lr:g}" for lr in experiments.WIDE_RATES)
    return f"""\
Betas (0.9, 0.99), ρ = 0.05, eps = 1e-8 inside of the root, {experiments.STEPS} steps in float64,
learning rate {experiments.FLAT_LR} on the flat/sharp pair and {experiments.LR} elsewhere, a tenth
of it from step 250 on. C = {CAPACITY} and λ = {DECAY} for Fig. 4 and Fig. 5's table, else C = 5 and
λ = 0.7.

- The paper does not say where runs on Goldstein-Price and Levy start. That decides the verdicts, so
  uniform starts in {boxes} were fixed before the first run, and the unit square for
  Goldstein-Price in Picheny et al.'s coordinates. Each has its own verdict. The setting "paper" has
  the paper's {experiments.SEEDS} seeds, the first of the {experiments.STARTS} starts of all others.
- Fig. 3 takes the best of Table 5's whole grid on {experiments.ACKLEY_SEEDS} other starts, by the
  mean final loss; "no search" is learning rate {experiments.LR}, C = 5, λ = 0.7.
- Fig. 1, 11, 13 and 14 show starts that the text does not name: here {experiments.STARTS} (Fig. 13:
  four).
- "{experiments.BEST}": the rate of lowest mean loss (escapes: of most escapes) on
  {experiments.SEARCH_STARTS} other starts, for each system. Table 5 has no rate above 0.1, so
  "{experiments.WIDE}" is the same of {rates}.
- "{experiments.PACKAGE}": `cm_fused.compat` (mean over the filled slots, eps
  outside of the root, critical momenta's first step only stores). The paper names that package.
- Sharpness is the largest eigenvalue of the exact Hessian at the last point.
- Equation 10's brackets are misprinted: here (log(A·B) − 8.693)/2.427. The paper's losses on it,
  0.81 to 3.14, are above all its local minima: compare the order.
- Equation 12 is as printed.
- An escape is a whole run that ends nearer to 0 than to 1 in every coordinate, of {ESCAPES} runs
  with starts uniform in [−5, 5]^D."""


def _minima() -> str:
    points = torch.tensor([[0.0, -1.0], [-0.6, -0.4], [1.8, 0.2], [1.2, 0.8]], dtype=torch.float64)
    surface = experiments.GOLDSTEIN_PRICE[0].surface
    found: Iterable[tuple[Tensor, Tensor, Tensor]] = zip(
        points, *experiments.loss_and_sharpness(surface, points), strict=True
    )
    return "; ".join(
        f"({x[0]:g}, {x[1]:g}): {loss:.3f}, {sharpness:.3g}" for x, loss, sharpness in found
    )


def _machine() -> str:
    machine, versions = describe("cpu"), machine_versions()
    return (
        f"{machine['model']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"cm_fused {versions['cm_fused']} at {versions['commit']}"
    )


def _tables_of(results: Results, tables: dict[str, Table]) -> str:
    return f"""\
## Fig. 5's table and Table 2, the paper's numbers beside ours

{_paper_tables(results)}

Minima of Goldstein-Price in x, y, with loss and sharpness: {_minima()}. In the unit square the
sharpness is 16 times that.

## Ackley (F3, F13)

{_markdown(tables["ackley"])}

## Escapes in ten dimensions (F4), of {ESCAPES} runs

{_markdown(tables["escapes"])}

## Escapes against C (F12), of {ESCAPES} runs

{_markdown(tables["capacity_escapes"])}

## Ends in one dimension (F6, F17, F18)

{_markdown(tables["lines"])}

## What the buffer does

Share of {experiments.STEPS} steps in which {OURS} admits its momentum:

{_markdown(tables["admission"])}

RMS of an element's update in learning rates, steps 100 to 250, C = 5, λ = 0.7:

{_markdown(tables["update_rms"])}

The same of the first steps on Ackley:

{_markdown(tables["first_updates"])}"""


def _report(
    results: Results,
    judged: Judged,
    tables: dict[str, Table],
    figures: Sequence[str],
    folder: Path,
) -> str:
    pictures = "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in figures)
    tested = sum(1 for claim, _, _ in judged if claim.estimate and claim.estimate.p is not None)
    return f"""\
# The paper's claims

Written by `make paper` on {_machine()}. Every number on the toy surfaces was computed by that run;
those of trained models are read from the files of their own runs. Claim ids name the paper's figure
(F) or table (T).

## Summary

How many rows of each claim have which verdict.

{_summary(judged)}

{_scan_sentences(judged)}

{RULE} {tested} rows have a p.

## Settings

{_settings()}

## Claims

A star: the verdict does not survive Holm's correction. `claims.csv` has the numbers of all settings
and the p values.

{_claim_tables(judged)}

{_tables_of(results, tables)}

## Trained models (section 5)

{section(folder / TRAINING, TRAINING)}

## Figures

{pictures}
"""
