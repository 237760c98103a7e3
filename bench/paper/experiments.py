"""The experiments on the toy surfaces; each returns its numbers, none draws or writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.paper import surfaces
from bench.paper.paper_numbers import TABLE_2, TABLE_5
from bench.paper.systems import BUFFERED, SYSTEMS, Batch, Run, Setting, Surface, run
from cm_fused.diagnostics import ALL, Recorder

OURS = "Adam+CM"
PAIR = ("Adam+CG", OURS)
STEPS = 500
LR = 0.1
FLAT_LR = 0.05
# The escape plot and the table inside Fig. 5 have these; elsewhere C = 5 and λ = 0.7.
CAPACITY, DECAY = 20, 0.99
# The paper's seeds and runs; the other starts are a sensitivity.
SEEDS, ESCAPES, ACKLEY_SEEDS, FIGURE_STARTS = 20, 50, 10, 4
STARTS = 100
SEARCH_SEED, SEARCH_STARTS = 1000, 20
BOXES = (2, 5, 10, 15, 20, 30)
ACKLEY_BOX = 5
SHARPNESS = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0)
LINE_SHARPNESS = (5.0, 10.0, 100.0)
LINE_STARTS = (-2.0, 2.0, 3.0)
CAPACITIES = (1, 2, 5, 10, 20)
LINE_CAPACITIES = (5, 10, 20)
DECAYS = (0.7, 0.99)
CELLS = tuple(dict.fromkeys((capacity, decay) for _, capacity, decay in TABLE_2))
BUFFER_STEPS = 10
OPPOSITION_STEPS = 100

# Settings beside the paper's.
PAPER, MORE_STARTS = "paper", f"{STARTS} starts"
CONSTANT = "no schedule"
BEST = "best lr of Table 5"
# Table 5 has no rate above 0.1, which is the best of nearly all systems.
WIDE_RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
WIDE = "best lr of 0.02 to 1"
PACKAGE = "the research package's rules"
DEFAULT_BUFFER = "C = 5, λ = 0.7"


@dataclass(frozen=True)
class Landscape:
    """A surface of two dimensions and where runs on it start.

    Args:
        name: As in the paper's tables.
        surface: The function.
        minimum: Where its global minimum is.
        box: Runs start uniformly in [low, high]².
        scale: How many units of the surface one of these coordinates is.
    """

    name: str
    surface: Surface
    minimum: tuple[float, float]
    box: tuple[float, float]
    scale: float = 1.0

    @property
    def starts(self) -> str:
        """The box in words."""
        low, high = self.box
        return f"±{high:g}" if low == -high else f"[{low:g}, {high:g}]²"


def _unit_goldstein_price(x: Tensor) -> Tensor:
    return surfaces.goldstein_price(4 * x - 2)


GOLDSTEIN_PRICE = tuple(
    Landscape("Goldstein-Price", surfaces.goldstein_price, (0, -1), (-b, b)) for b in BOXES
)
# Picheny et al.'s coordinates: a learning rate and a curvature are other ones there.
UNIT = Landscape("Goldstein-Price", _unit_goldstein_price, (0.5, 0.25), (0, 1), 4.0)
LEVY = tuple(Landscape("Levy", surfaces.levy, (1, 1), (-b, b)) for b in BOXES)
LANDSCAPES = (*GOLDSTEIN_PRICE, UNIT, *LEVY)
ACKLEY = tuple(Landscape("Ackley", surfaces.ackley, (0, 0), (-b, b)) for b in BOXES)
USUAL_ACKLEY = ACKLEY[BOXES.index(ACKLEY_BOX)]
ACKLEY_ROSENBROCK = Landscape(
    "Ackley+Rosenbrock", surfaces.ackley_rosenbrock, (2.1, 3.9), (-ACKLEY_BOX, ACKLEY_BOX)
)


def uniform(shape: Sequence[int], box: tuple[float, float], seed: int) -> Tensor:
    """Return points uniform in a box, float64; torch's global generator is not touched."""
    generator = torch.Generator().manual_seed(seed)
    low, high = box
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Outcome:
    """The ends of the runs of a setting.

    Args:
        setting: The optimizer.
        losses: The final loss of each run, (N,).
        sharpness: The largest eigenvalue of the Hessian there, (N,).
        length: How far each run went in all, (N,).
        moved: From its start to its end, (N,).
        distance: From its end to the global minimum, (N,).
        curve: The mean loss after each step with a 95 % normal interval's half, (2, steps + 1).
    """

    setting: Setting
    losses: Tensor
    sharpness: Tensor
    length: Tensor
    moved: Tensor
    distance: Tensor
    curve: Tensor

    def first(self, count: int) -> "Outcome":
        """Return the outcome of the first starts; the curve stays that of all."""
        parts = ("losses", "sharpness", "length", "moved", "distance")
        return replace(self, **{part: getattr(self, part)[:count] for part in parts})


def outcomes(
    landscape: Landscape, settings: Sequence[Setting], count: int = STARTS, seed: int = 0
) -> dict[Setting, Outcome]:
    """Run settings, all from the same starts."""
    starts = uniform((count, 2), landscape.box, seed)
    runs = run(landscape.surface, starts, settings, STEPS)
    return {setting: _outcome(landscape, starts, setting, runs[setting]) for setting in settings}


def _outcome(landscape: Landscape, starts: Tensor, setting: Setting, found: Run) -> Outcome:
    losses, sharpness = loss_and_sharpness(landscape.surface, found.ends)
    minimum = torch.tensor(landscape.minimum, dtype=starts.dtype)
    half = 1.96 * found.losses.std(1) / len(starts) ** 0.5
    return Outcome(
        setting,
        losses,
        sharpness,
        found.length,
        torch.linalg.vector_norm(found.ends - starts, dim=-1),
        torch.linalg.vector_norm(found.ends - minimum, dim=-1),
        torch.stack([found.losses.mean(1), half]),
    )


def loss_and_sharpness(surface: Surface, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the surface's values and the Hessians' largest eigenvalues at points (N, D)."""
    points = points.detach().clone().requires_grad_()
    losses = surface(points)
    return losses.detach(), surfaces.sharpness(losses, points)


# By (setting in words, system, C, λ); those of Table 2 for critical gradients and momenta, CAPACITY
# and DECAY for all.
Scan = dict[tuple[str, str, int, float], Outcome]


def scan(landscape: Landscape) -> Scan:
    """Return the outcomes of Fig. 1, Fig. 5's table and Table 2 from one box of starts."""
    plain = {
        (system, *cell): Setting(system, LR, *cell)
        for system in SYSTEMS
        for cell in (CELLS if system in PAIR else [(CAPACITY, DECAY)])
    }
    settings = {}
    for key, setting in plain.items():
        settings[(MORE_STARTS, *key)] = setting
        settings[(PACKAGE, *key)] = replace(setting, package_rules=setting.has_buffer)
        if key[1:] == (CAPACITY, DECAY):
            settings[(CONSTANT, *key)] = replace(setting, drop=None)
            for name, rates in ((BEST, TABLE_5["lr"]), (WIDE, WIDE_RATES)):
                tried = [replace(setting, lr=lr) for lr in rates]
                settings[(name, *key)] = best_of(landscape, tried, SEARCH_STARTS)
    found = outcomes(landscape, list(settings.values()))
    return {key: found[setting] for key, setting in settings.items()}


def best_of(landscape: Landscape, settings: Sequence[Setting], count: int) -> Setting:
    """Return the setting of lowest mean loss on ``count`` starts of another seed."""
    found = outcomes(landscape, settings, count, SEARCH_SEED)
    return min(settings, key=lambda setting: found[setting].losses.mean().item())


def table_5_grid(system: str) -> list[Setting]:
    """Return every setting of Table 5's grid that a system has."""
    plain = Setting(system, LR)
    rows = product(
        TABLE_5["lr"],
        TABLE_5["capacity"] if plain.has_buffer else [5],
        TABLE_5["priority_decay"] if plain.has_buffer else [0.7],
        TABLE_5["rho"] if plain.has_sam else [0.05],
        product(TABLE_5["beta1"], TABLE_5["beta2"]),
    )
    return [Setting(system, lr, int(c), decay, rho, b) for lr, c, decay, rho, b in rows]


def ackley(landscape: Landscape) -> dict[tuple[str, str], Outcome]:
    """Return the outcomes of Fig. 3 and 13 from one box of starts, by (setting in words, system).

    Table 5's grid is searched from the usual box.
    """
    plain = [Setting(system, LR) for system in SYSTEMS]
    variants = {DEFAULT_BUFFER: plain}
    if landscape is USUAL_ACKLEY:
        variants[PAPER] = [best_of(landscape, table_5_grid(s), ACKLEY_SEEDS) for s in SYSTEMS]
        variants[CONSTANT] = [replace(setting, drop=None) for setting in plain]
        variants[PACKAGE] = [replace(s, package_rules=s.has_buffer) for s in plain]
        variants[WIDE] = [
            best_of(landscape, [replace(s, lr=lr) for lr in WIDE_RATES], SEARCH_STARTS)
            for s in plain
        ]
    found = outcomes(landscape, [s for settings in variants.values() for s in settings])
    return {(name, s.system): found[s] for name, settings in variants.items() for s in settings}


# The setting and where each run ended, (sharpness, start, D), by (setting in words, system).
Escapes = dict[tuple[str, str], tuple[Setting, Tensor]]


def flat_sharp_ends(
    settings: Sequence[Setting],
    dimension: int,
    count: int = ESCAPES,
    seed: int = 0,
    steps: int = STEPS,
) -> dict[Setting, Tensor]:
    """Return where runs on the flat/sharp pair end, each (len(SHARPNESS), count, dimension).

    Every sharpness has the same starts, uniform in [−5, 5]^D.
    """
    starts = uniform((count, dimension), (-5, 5), seed)
    s = torch.tensor(SHARPNESS, dtype=starts.dtype).repeat_interleave(count)
    surface = partial(surfaces.flat_sharp, sharpness=s)
    runs = run(surface, starts.repeat(len(SHARPNESS), 1), settings, steps)
    return {k: r.ends.view(len(SHARPNESS), count, dimension) for k, r in runs.items()}


def at_flat(ends: Tensor) -> Tensor:
    """Return which runs are wholly in the flat minimum's valley: nearer to 0 everywhere."""
    return (ends < 0.5).all(-1)


def at_zero(ends: Tensor) -> Tensor:
    """Return which runs are wholly within 0.1 of the flat minimum."""
    return (ends.abs() < 0.1).all(-1)


def escapes() -> Escapes:
    """Return where the runs of Fig. 4 end, in ten dimensions."""
    settings: dict[tuple[str, str], Setting] = {}
    for system in SYSTEMS:
        paper, small = Setting(system, FLAT_LR, CAPACITY, DECAY), Setting(system, FLAT_LR)
        settings[PAPER, system] = paper
        settings[CONSTANT, system] = replace(paper, drop=None)
        settings[DEFAULT_BUFFER, system] = small
        settings[PACKAGE, system] = replace(paper, package_rules=paper.has_buffer)
        for name, setting, rates in (
            (BEST, paper, TABLE_5["lr"]),
            (WIDE, paper, WIDE_RATES),
            (f"{DEFAULT_BUFFER}, {WIDE}", small, WIDE_RATES),
        ):
            tried = [replace(setting, lr=lr) for lr in rates]
            found = flat_sharp_ends(tried, 10, SEARCH_STARTS, SEARCH_SEED)
            settings[name, system] = max(tried, key=lambda s: at_flat(found[s]).sum().item())
    ends = flat_sharp_ends(list(settings.values()), 10)
    return {key: (setting, ends[setting]) for key, setting in settings.items()}


# By (D, system, C, λ).
CapacityEscapes = dict[tuple[int, str, int, float], Tensor]


def capacity_escapes() -> CapacityEscapes:
    """Return where the runs of Fig. 12 end; each (sharpness, start, D)."""
    found = {}
    for dimension in (1, 10):
        settings = [
            Setting(system, FLAT_LR, capacity, decay)
            for system in PAIR
            for capacity in CAPACITIES
            for decay in DECAYS
        ]
        plain = [Setting(system, FLAT_LR, 10) for system in ("Adam", "Adam+SAM")]
        both = [Setting("Adam+SAM+CM", FLAT_LR, 10, decay) for decay in DECAYS]
        for s, ends in flat_sharp_ends([*settings, *plain, *both], dimension).items():
            found[dimension, s.system, s.capacity, s.priority_decay] = ends
    return found


# Paths in one dimension, (steps + 1, sharpness, start), by (system, C, λ).
Lines = dict[tuple[str, int, float], Tensor]


def lines() -> Lines:
    """Return the paths of Fig. 6, 17 and 18."""
    settings = [
        Setting(system, FLAT_LR, capacity, decay)
        for system in SYSTEMS
        for capacity in (LINE_CAPACITIES if system in BUFFERED else LINE_CAPACITIES[:1])
        for decay in (DECAYS if system in BUFFERED else DECAYS[:1])
    ]
    s = torch.tensor(LINE_SHARPNESS, dtype=torch.float64).repeat_interleave(len(LINE_STARTS))
    starts = torch.tensor(LINE_STARTS * len(LINE_SHARPNESS), dtype=torch.float64)[:, None]
    runs = run(partial(surfaces.flat_sharp, sharpness=s), starts, settings, STEPS, with_path=True)
    shape = (-1, len(LINE_SHARPNESS), len(LINE_STARTS))
    return {
        (k.system, k.capacity, k.priority_decay): found.path.reshape(shape)
        for k, found in runs.items()
    }


@dataclass(frozen=True)
class Buffers:
    """The contents of a system's buffers in some consecutive steps.

    Args:
        slots: The filled ones after each step, each (N, filled, D).
        items: The new gradient (of critical momenta: momentum) of each step, each (N, D).
        updates: What each step added to the points, each (N, D).
    """

    slots: list[Tensor]
    items: list[Tensor]
    updates: list[Tensor]

    def cancellation(self) -> Tensor:
        """Return `cancellation` after the steps that left two slots or more, (steps, N)."""
        return torch.stack([cancellation(slots) for slots in self.slots if slots.shape[1] > 1])

    def cosine(self) -> Tensor:
        """Return the cosine of each new item and the mean of the slots it met, (steps − 1, N)."""
        pairs = zip(self.slots, self.items[1:], strict=False)
        return torch.stack([torch.cosine_similarity(s.mean(1), item) for s, item in pairs])

    def update_length(self) -> Tensor:
        """Return the length of each update, (steps, N)."""
        lengths: Tensor = torch.linalg.vector_norm(torch.stack(self.updates), dim=-1)
        return lengths


def cancellation(slots: Tensor) -> Tensor:
    """Return 1 − |mean of the slots| / mean of the |slots|, (N,): 0 parallel, 1 sum to nothing.

    Args:
        slots: (N, filled, D).
    """
    lengths: Tensor = torch.linalg.vector_norm(slots, dim=-1)
    length_of_mean: Tensor = torch.linalg.vector_norm(slots.mean(1), dim=-1)
    return 1 - length_of_mean / lengths.mean(1)


def buffers(
    surface: Surface, setting: Setting, starts: Tensor, steps: int, after: int = 0
) -> Buffers:
    """Return the buffers of the steps ``after`` + 1 to ``after`` + ``steps``.

    Args:
        surface: What is minimized.
        setting: A system with a buffer.
        starts: (N, D).
        steps: How many to look at, >= 1.
        after: Steps before them.
    """
    batch, found = Batch(surface, starts, [setting]), Buffers([], [], [])
    for _ in range(after):
        batch.step()
    for step in range(after + 1, after + steps + 1):
        before = batch.points.detach()[0].clone()
        batch.step()
        # A state dict has every flush made; the fused steps defer them.
        states = batch.optimizer.state_dict()["state"]
        slots = torch.stack([states[i]["critical_buffer"] for i in range(len(starts))])
        momenta = torch.stack([states[i]["exp_avg"] for i in range(len(starts))])
        found.slots.append(slots[:, : min(step, setting.capacity)].clone())
        gradients = batch.gradients[0].clone()
        found.items.append(gradients if setting.system == "Adam+CG" else momenta)
        found.updates.append(batch.points.detach()[0] - before)
    return found


def first_buffers() -> dict[str, Buffers]:
    """Return the buffers of Fig. 2: Ackley, the first ten steps, from ``STARTS`` starts."""
    starts = uniform((STARTS, 2), (-ACKLEY_BOX, ACKLEY_BOX), 0)
    return {
        system: buffers(surfaces.ackley, Setting(system, LR), starts, BUFFER_STEPS)
        for system in PAIR
    }


@dataclass(frozen=True)
class Opposition:
    """Fig. 11 from ``STARTS`` starts: eq. 12, C = 5.

    Args:
        opposed: How many slots of critical gradients have another one within 26° of their opposite,
            after each of the steps 5 to ``OPPOSITION_STEPS``, (steps, start).
        outcomes: Where the runs ended, by system.
    """

    opposed: Tensor
    outcomes: Mapping[str, Outcome]


def opposition() -> Opposition:
    """Return Fig. 11's numbers."""
    landscape = ACKLEY_ROSENBROCK
    starts = uniform((STARTS, 2), landscape.box, 0)
    found = buffers(landscape.surface, Setting("Adam+CG", LR), starts, OPPOSITION_STEPS)
    opposed = torch.stack([opposed_slots(slots) for slots in found.slots[4:]])
    ends = outcomes(landscape, [Setting(system, LR) for system in SYSTEMS])
    return Opposition(opposed, {s.system: outcome for s, outcome in ends.items()})


def opposed_slots(slots: Tensor) -> Tensor:
    """Return how many slots (N, C, D) have another one of cosine below −0.9, (N,) floating."""
    unit = torch.nn.functional.normalize(slots, dim=-1)
    has_opposite: Tensor = ((unit @ unit.mT) < -0.9).any(-1)
    return has_opposite.sum(-1).to(slots.dtype)


# The share of steps that admit, and the RMS of an update in learning rates.
ADMISSION_DECAYS = (0.7, 0.9, 0.99, 1.0)


def _noise(x: Tensor) -> Tensor:
    """Return a plane of random slope: gradients are white noise."""
    return (x * torch.randn_like(x)).sum(-1)


_UPDATE_SURFACES: dict[str, tuple[Surface, int]] = {
    "Ackley": (surfaces.ackley, 2),
    "flat/sharp, s = 20": (partial(surfaces.flat_sharp, sharpness=20.0), 10),
    "white noise": (_noise, 10),
}


def admission() -> dict[tuple[str, int, float], float]:
    """Return the share of 500 steps in which Adam+CM admits, by (surface, C, λ)."""
    found = {}
    for name, (surface, dimension) in _UPDATE_SURFACES.items():
        starts = uniform((FIGURE_STARTS, dimension), (-5, 5), 0)
        for capacity, decay in product(LINE_CAPACITIES[::2], ADMISSION_DECAYS):
            torch.manual_seed(0)
            batch = Batch(surface, starts, [Setting(OURS, FLAT_LR, capacity, decay)])
            with Recorder(batch.optimizer, every=STEPS) as recorder:
                for _ in range(STEPS):
                    batch.step()
            rates = [row["admission_rate"] for key, row in recorder.last.items() if key != ALL]
            found[name, capacity, decay] = sum(rates) / len(rates)
    return found


def update_rms() -> dict[tuple[str, str], float]:
    """Return the RMS of an element's update over lr, steps 100 to 250, by (surface, system)."""
    found = {}
    for name, (surface, dimension) in _UPDATE_SURFACES.items():
        starts = uniform((ACKLEY_SEEDS, dimension), (-5, 5), 0)
        for system in SYSTEMS:
            torch.manual_seed(0)
            setting = Setting(system, FLAT_LR)
            path = run(surface, starts, [setting], 250, with_path=True)[setting].path
            found[name, system] = path[100:].diff(dim=0).square().mean().sqrt().item() / FLAT_LR
    return found


def paths(landscape: Landscape, starts: Tensor) -> dict[str, Tensor]:
    """Return each system's paths at the paper's defaults, (STEPS + 1, N, 2)."""
    settings = [Setting(system, LR) for system in SYSTEMS]
    runs = run(landscape.surface, starts, settings, STEPS, with_path=True)
    return {setting.system: found.path for setting, found in runs.items()}
