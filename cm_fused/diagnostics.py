"""What a critical buffer holds while training goes on, and how sharp the loss is.

Nothing here changes what an optimizer computes: training with it has the same bits as without. It
does wait for the device, and makes commits that the fused backends would make in the next step, as
`state_dict` does.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused import _state
from cm_fused._critical_adam import CriticalAdam
from cm_fused._sharding import whole_state
from cm_fused.sam import SAM

ALL = "all"


@dataclass(frozen=True)
class Reading:
    """What the buffers of some parameters hold after a step.

    A quantity that does not exist yet is NaN. Over several parameters norms are those of all their
    elements together, and the others are means weighted by the number of elements.

    Attributes:
        filled: Number of filled slots.
        variance: Population variance over the filled slots, mean over the elements (Fig. 8).
        agreement: Mean cosine between the slot of the highest key and each other filled slot, from
            two slots on (Fig. 10); a slot of zeros has none.
        momentum_norm: Norm of m, `exp_avg`.
        mean_norm: Norm of the buffer's mean as a step uses it, eq. (6).
        aggregate_norm: Norm of m + the mean, eq. (5), with the buffer after the last admission;
            critical momenta only, since critical gradients add the mean to a gradient.
    """

    filled: float
    variance: float
    agreement: float
    momentum_norm: float
    mean_norm: float
    aggregate_norm: float


def read(optimizer: Optimizer) -> dict[Tensor, Reading]:
    """Return what the buffer of every parameter that has one holds.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Not changed. The
            state of DTensors is gathered: every process must call this.

    Raises:
        TypeError: It is another optimizer.
    """
    base = _critical(optimizer)
    base._commit_pending()
    return {
        param: _reading(base, group, whole_state(base.state[param]))
        for group in base.param_groups
        for param in group["params"]
        if "critical_buffer" in base.state.get(param, {})
    }


def combine(readings: Mapping[Tensor, Reading]) -> Reading:
    """Return the reading of several parameters together; see `Reading`."""
    weights = [param.numel() for param in readings]
    combined = {}
    for field in fields(Reading):
        values = [getattr(reading, field.name) for reading in readings.values()]
        if field.name.endswith("norm"):
            combined[field.name] = sum(value**2 for value in values) ** 0.5
        else:
            combined[field.name] = _weighted_mean(values, weights)
    return Reading(**combined)


def _critical(optimizer: Optimizer) -> CriticalAdam:
    base = optimizer.optimizer if isinstance(optimizer, SAM) else optimizer
    if not isinstance(base, CriticalAdam):
        raise TypeError(
            "optimizer must have a critical buffer (AdamCM, AdamCG, their decoupled forms, or SAM "
            f"around one), got {type(base).__name__}"
        )
    return base


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return the mean of the values that exist; NaN if none does."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v == v and w]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else float("nan")


def _reading(base: CriticalAdam, group: Mapping[str, Any], state: Mapping[str, Any]) -> Reading:
    keys = state["priorities"]
    momentum = _flat(_state.dequantized(state, "exp_avg"), 0)
    slots = _flat(_state.dequantized(state, "critical_buffer"), 1)[keys > -torch.inf]
    filled = len(slots)
    divisor = group["capacity"] if group["buffer_mean"] == "capacity" else max(filled, 1)
    mean = slots.sum(0) / divisor
    nan = torch.tensor(float("nan"), device=keys.device)
    numbers = [
        slots.var(0, correction=0).mean() if filled and slots.shape[1] else nan,
        _agreement(slots, keys[keys > -torch.inf]) if filled > 1 else nan,
        torch.linalg.vector_norm(momentum),
        torch.linalg.vector_norm(mean),
        nan if base._critical_gradients else torch.linalg.vector_norm(momentum + mean),
    ]
    # One copy to the host, whatever the number of quantities.
    return Reading(float(filled), *torch.stack([number.float() for number in numbers]).tolist())


def _flat(tensor: Tensor, start: int) -> Tensor:
    """Return the elements as float32 or wider, complex ones as pairs, from one dimension on."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
    wide = real.to(torch.promote_types(real.dtype, torch.float32))
    return wide.flatten(start)


def _agreement(slots: Tensor, keys: Tensor) -> Tensor:
    top = int(keys.argmax())
    others = torch.cat([slots[:top], slots[top + 1 :]])
    cosines = (others @ slots[top]) / (
        torch.linalg.vector_norm(others, dim=1) * torch.linalg.vector_norm(slots[top])
    )
    mean: Tensor = cosines.nanmean()
    return mean


@dataclass(frozen=True)
class History:
    """What happened to some parameters up to a step.

    Attributes:
        mean_age: Steps since a filled slot was admitted, mean over the slots; 0 for the last step.
        max_age: The oldest one's.
        admission_rate: Share of the steps since the last record in which something was admitted.
        distance: L2 distance from where the parameters were when recording began.
    """

    mean_age: float
    max_age: float
    admission_rate: float
    distance: float


class _Track:
    """The history of one parameter."""

    def __init__(self, param: Tensor, keys: Tensor | None) -> None:
        self.start = param.detach().clone()
        # Slots filled before recording began count from its beginning.
        self.keys = keys
        self.ages = None if keys is None else torch.zeros(len(keys), dtype=torch.int64)
        self.admissions = 0
        self.steps = 0

    def update(self, keys: Tensor, decay: float) -> None:
        """Find what a step admitted, from the keys before and after it, both (C,) on the CPU."""
        if self.keys is None or self.ages is None or len(self.keys) != len(keys):
            self.keys = torch.full_like(keys, -torch.inf)
            self.ages = torch.zeros(len(keys), dtype=torch.int64)
        # Only the smallest key can go, the first of equal ones; an unfilled slot's is -inf.
        slot = int(self.keys.argmin())
        self.ages += 1
        self.steps += 1
        kept = self.keys[slot] * decay if self.keys[slot] > -torch.inf else self.keys[slot]
        # With a decay of 0 all keys are 0 after a step, and any gradient but zero is admitted.
        if keys[slot] != kept or (decay == 0 and kept > -torch.inf):
            self.ages[slot] = 0
            self.admissions += 1
        self.keys = keys.clone()

    def history(self, param: Tensor) -> History:
        """Return the history, and begin to count admissions anew."""
        nan = float("nan")
        mean_age = max_age = nan
        if self.keys is not None and self.ages is not None:
            ages = self.ages[self.keys > -torch.inf].double()
            if len(ages):
                mean_age, max_age = ages.mean().item(), ages.max().item()
        rate = self.admissions / self.steps if self.steps else nan
        self.admissions = self.steps = 0
        moved = torch.linalg.vector_norm(_flat(param.detach() - self.start, 0))
        return History(mean_age, max_age, rate, moved.item())


def _combine_histories(histories: Mapping[Tensor, History]) -> History:
    weights = [param.numel() for param in histories]
    every = list(histories.values())
    ages = [h.max_age for h in every if h.max_age == h.max_age]
    return History(
        _weighted_mean([h.mean_age for h in every], weights),
        max(ages, default=float("nan")),
        _weighted_mean([h.admission_rate for h in every], weights),
        sum(h.distance**2 for h in every) ** 0.5,
    )


class Recorder:
    """Records `Reading` and `History` of a live optimizer, to a CSV file and to TensorBoard.

    It follows every step through a step hook of the optimizer, and records every ``every`` steps:
    one row for each parameter that has a buffer, and one named "all". Each step waits for the
    device once; parameters are copied once, for the distance.

    Key ages are found by comparing keys before and after a step. With ``priority_decay=0`` keys say
    nothing, and every step with a gradient counts as an admission.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Its results do not
            change.
        path: The CSV file to write, or None.
        every: Steps between records, >= 1.
        names: Of the parameters, as `model.named_parameters()` gives them; else they are numbered.
        tensorboard: Folder for TensorBoard, or None.

    Raises:
        TypeError: The optimizer has no critical buffer.
        ValueError: ``every`` is not an int >= 1.
        ModuleNotFoundError: TensorBoard is asked for and not installed.

    Example:
        >>> import torch
        >>> from cm_fused import AdamCM
        >>> from cm_fused.diagnostics import Recorder
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdamCM(model.parameters())
        >>> with Recorder(optimizer, names=model.named_parameters()) as recorder:
        ...     model(torch.ones(2)).sum().backward()
        ...     optimizer.step()
        >>> recorder.last["all"]["filled"]
        1.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        path: str | Path | None = None,
        *,
        every: int = 1,
        names: Iterable[tuple[str, Tensor]] = (),
        tensorboard: str | Path | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an int >= 1, got {every!r}")
        self._optimizer = _critical(optimizer)
        self._every = every
        self._names = {param: name for name, param in names}
        self._writer = None if tensorboard is None else _summary_writer(tensorboard)
        # Open as long as the recorder is: a run is long, and may be cut off.
        self._file = None if path is None else Path(path).open("w", newline="")  # noqa: SIM115
        self._csv: csv.DictWriter[str] | None = None
        self._tracks = {
            param: _Track(param, self._keys(param))
            for group in self._optimizer.param_groups
            for param in group["params"]
        }
        self._numbers = {param: number for number, param in enumerate(self._tracks)}
        self._counts = {param: self._count(param) for param in self._tracks}
        self.step = 0
        self.last: dict[str, dict[str, float]] = {}
        self._hook = self._optimizer.register_step_post_hook(self._after_step)

    def _keys(self, param: Tensor) -> Tensor | None:
        keys = self._optimizer.state.get(param, {}).get("priorities")
        return None if keys is None else keys.detach().cpu().clone()

    def _count(self, param: Tensor) -> float:
        step = self._optimizer.state.get(param, {}).get("step", 0)
        return float(step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param not in self._tracks:
                    self._numbers[param] = len(self._tracks)
                    self._tracks[param] = _Track(param, None)
                keys, count = self._keys(param), self._count(param)
                # A parameter without a gradient took no part: its keys did not decay.
                if keys is not None and count != self._counts.get(param, 0.0):
                    self._tracks[param].update(keys, group["priority_decay"])
                self._counts[param] = count
        if self.step % self._every == 0:
            self.record()

    def record(self) -> dict[str, dict[str, float]]:
        """Record now; return the quantities of `Reading` and `History` by parameter name."""
        readings = read(self._optimizer)
        histories = {param: self._tracks[param].history(param) for param in readings}
        self.last = {
            self._name(param): {**asdict(readings[param]), **asdict(histories[param])}
            for param in readings
        }
        self.last[ALL] = {**asdict(combine(readings)), **asdict(_combine_histories(histories))}
        for name, quantities in self.last.items():
            self._write(name, quantities)
        if self._file is not None:
            self._file.flush()
        return self.last

    def _name(self, param: Tensor) -> str:
        return self._names.setdefault(param, str(self._numbers[param]))

    def _write(self, name: str, quantities: Mapping[str, float]) -> None:
        if self._file is not None:
            if self._csv is None:
                self._csv = csv.DictWriter(self._file, ["step", "parameter", *quantities])
                self._csv.writeheader()
            self._csv.writerow({"step": self.step, "parameter": name, **quantities})
        if self._writer is not None:
            for quantity, value in quantities.items():
                self._writer.add_scalar(f"{quantity}/{name}", value, self.step)

    def close(self) -> None:
        """Stop recording and close the files; more calls do nothing."""
        self._hook.remove()
        for output in (self._file, self._writer):
            if output is not None:
                output.close()
        self._file = self._writer = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard needs the package of that name: pip install tensorboard, or leave "
            "tensorboard=None and read the CSV file"
        ) from error
    return SummaryWriter(str(folder))


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of a Hessian.

    Attributes:
        eigenvalue: The largest one, with its sign.
        converged: Whether two estimates in a row differed by at most the tolerance.
        iterations: Hessian-vector products that were made.
    """

    eigenvalue: float
    converged: bool
    iterations: int


def sharpness(
    loss: Tensor,
    params: Iterable[Tensor],
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    seed: int = 0,
) -> Sharpness:
    """Return the largest eigenvalue of the Hessian of a loss, by power iteration.

    Power iteration finds the eigenvalue of largest magnitude; if that is negative, a second one, on
    the Hessian shifted by it, finds the largest. Estimates are Rayleigh quotients. The result
    does not depend on torch's global generators and leaves them alone; `.grad` is not touched.

    Source: Yao et al., "PyHessian: Neural Networks Through the Lens of the Hessian" (2020).

    Args:
        loss: A scalar with its graph, which is kept; not changed.
        params: Real tensors that the loss depends on; not changed.
        tolerance: Relative change of the estimate at which it stops, > 0.
        max_iterations: Hessian-vector products of each of the two, >= 1.
        seed: Of the vector that it starts from.

    Raises:
        ValueError: There are no parameters, or a number is out of its range.
    """
    params = list(params)
    if not params:
        raise ValueError("params must have at least one tensor, got none")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations!r}")
    slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    start = _random_unit(params, seed)

    def hessian_times(vectors: Sequence[Tensor]) -> list[Tensor]:
        dependent = [(s, v) for s, v in zip(slopes, vectors, strict=True) if s.requires_grad]
        if not dependent:  # the loss is linear
            return [torch.zeros_like(vector) for vector in vectors]
        of, along = zip(*dependent, strict=True)
        products = torch.autograd.grad(of, params, along, retain_graph=True, materialize_grads=True)
        return list(products)

    largest = _power_iteration(hessian_times, start, tolerance, max_iterations)
    if largest.eigenvalue >= 0:
        return largest
    shift = largest.eigenvalue

    def shifted(vectors: Sequence[Tensor]) -> list[Tensor]:
        products = hessian_times(vectors)
        torch._foreach_sub_(products, torch._foreach_mul(list(vectors), shift))
        return products

    above = _power_iteration(shifted, start, tolerance, max_iterations)
    return Sharpness(
        above.eigenvalue + shift,
        above.converged and largest.converged,
        above.iterations + largest.iterations,
    )


def _random_unit(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = [
        torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)
        for param in params
    ]
    return _normalized(vectors)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    products = [(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def _normalized(vectors: Sequence[Tensor]) -> list[Tensor]:
    norm = _dot(vectors, vectors).sqrt()
    return [(vector.double() / norm).to(vector.dtype) for vector in vectors]


def _power_iteration(
    apply: Callable[[Sequence[Tensor]], list[Tensor]],
    vectors: list[Tensor],
    tolerance: float,
    max_iterations: int,
) -> Sharpness:
    estimate = 0.0
    for iteration in range(1, max_iterations + 1):
        products = apply(vectors)
        before, estimate = estimate, _dot(vectors, products).item()
        if not any(product.any() for product in products):
            return Sharpness(0.0, True, iteration)
        if iteration > 1 and abs(estimate - before) <= tolerance * abs(estimate):
            return Sharpness(estimate, True, iteration)
        vectors = _normalized(products)
    return Sharpness(estimate, False, max_iterations)
