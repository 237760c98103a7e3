"""Diagnostics against a buffer kept by hand, without changing what they look at."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cm_fused import SAM, AdamCG, AdamCM
from cm_fused._backends import cpu
from cm_fused.diagnostics import ALL, Reading, Recorder, combine, read, sharpness

BACKENDS = ["eager", *(["cpu"] if cpu.unavailable_reason is None else [])]
STEPS = 12


def _gradients(count: int = STEPS, shape: tuple[int, ...] = (6,)) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for step in range(count):
        # Norms that rise and fall, so that some steps are not admitted.
        yield torch.randn(shape, generator=generator) * (1.5 + 1.4 * math.sin(step))


class _Buffer:
    """Algorithm 1's buffer as a list, with the step at which each slot was admitted."""

    def __init__(self, capacity: int, decay: float) -> None:
        self.capacity, self.decay = capacity, decay
        self.entries: list[tuple[float, Tensor, int]] = []
        self.admitted: list[bool] = []

    def offer(self, key: float, item: Tensor, step: int) -> None:
        entry = (key, item.clone(), step)
        smallest = min(range(len(self.entries)), key=lambda i: self.entries[i][0], default=0)
        room = len(self.entries) < self.capacity
        if room:
            self.entries.append(entry)
        elif key > self.entries[smallest][0]:
            self.entries[smallest] = entry
        self.admitted.append(room or self.entries[smallest] is entry)
        self.entries = [(k * self.decay, i, s) for k, i, s in self.entries]

    def agreement(self) -> float:
        top = max(range(len(self.entries)), key=lambda i: self.entries[i][0])
        cosines = [
            torch.cosine_similarity(item, self.entries[top][1], dim=0).item()
            for i, (_, item, _) in enumerate(self.entries)
            if i != top
        ]
        return sum(cosines) / len(cosines) if cosines else math.nan


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [1, 2, 5])
@pytest.mark.parametrize("optimizer_class", [AdamCM, AdamCG])
def test_against_a_buffer_by_hand(
    backend: str, capacity: int, optimizer_class: type[AdamCM] | type[AdamCG]
) -> None:
    """Every quantity after every step; the C++ step's deferred commit is seen as made."""
    param = torch.zeros(6, requires_grad=True)
    start = param.detach().clone()
    optimizer = optimizer_class(
        [param], lr=0.1, capacity=capacity, priority_decay=0.95, backend=backend
    )
    buffer = _Buffer(capacity, 0.95)
    m = torch.zeros(6)
    mean = torch.zeros(6)
    with Recorder(optimizer) as recorder:
        for step, gradient in enumerate(_gradients()):
            param.grad = gradient
            before = param.detach().clone()
            optimizer.step()
            m = 0.9 * m + 0.1 * (gradient if optimizer_class is AdamCM else gradient + mean)
            item = m if optimizer_class is AdamCM else gradient
            buffer.offer(gradient.norm().item(), item, step)
            items = torch.stack([item for _, item, _ in buffer.entries])
            mean = items.sum(0) / capacity
            ages = [step - admitted for _, _, admitted in buffer.entries]
            aggregate = (m + mean).norm().item() if optimizer_class is AdamCM else math.nan
            expected = {
                "filled": len(items),
                "variance": items.var(0, correction=0).mean().item(),
                "agreement": buffer.agreement(),
                "momentum_norm": m.norm().item(),
                "mean_norm": mean.norm().item(),
                "aggregate_norm": aggregate,
                "mean_age": sum(ages) / len(ages),
                "max_age": max(ages),
                "admission_rate": float(buffer.admitted[-1]),
                "distance": (param.detach() - start).norm().item(),
                "update_rms": (param.detach() - before).norm().item() / math.sqrt(6),
            }
            assert recorder.last["0"] == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
            assert recorder.last[ALL] == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    assert not all(buffer.admitted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "sam"])
def test_disturbs_nothing(backend: str, wrap: bool, tmp_path: Path) -> None:
    """Parameters and state have the same bits with a recorder as without."""

    def run(record: bool) -> tuple[list[Tensor], object]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1))
        base = AdamCM(model.parameters(), lr=0.01, capacity=3, backend=backend)
        optimizer = SAM(base) if wrap else base

        def closure() -> float:
            optimizer.zero_grad()
            loss = model(torch.ones(7, 5)).square().mean()
            loss.backward()
            return float(loss.item())

        recorder = Recorder(optimizer, tmp_path / "record.csv") if record else None
        for _ in range(20):
            optimizer.step(closure)
        if recorder is not None:
            assert recorder.step == 20
            assert recorder.last[ALL]["filled"] == 3
            recorder.close()
        return [p.detach() for p in model.parameters()], optimizer.state_dict()["state"]

    with_recorder, without = run(True), run(False)
    torch.testing.assert_close(with_recorder, without, rtol=0, atol=0)


def test_csv(tmp_path: Path) -> None:
    """A row for each named parameter that has a buffer and one for all, every second step."""
    model = nn.Linear(3, 2)
    frozen = nn.Parameter(torch.zeros(2))
    optimizer = AdamCM([*model.parameters(), frozen], capacity=2)
    path = tmp_path / "record.csv"
    recorder = Recorder(optimizer, path, every=2, names=model.named_parameters())
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    recorder.close()
    optimizer.step()  # is not seen any more
    recorder.close()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["parameter"]) for row in rows] == [
        (step, name) for step in ("2", "4") for name in ("weight", "bias", ALL)
    ]
    assert [float(row["filled"]) for row in rows] == [2.0] * 6
    assert float(rows[2]["distance"]) == pytest.approx(
        math.hypot(float(rows[0]["distance"]), float(rows[1]["distance"]))
    )


def test_skipped_parameter_keeps_its_ages() -> None:
    """A parameter without a gradient takes no part: its slots do not age."""
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    optimizer = AdamCM(params, capacity=2)
    with Recorder(optimizer) as recorder:
        for gradients in ((True, True), (True, False), (True, False)):
            for param, present in zip(params, gradients, strict=True):
                param.grad = torch.ones(2) if present else None
            optimizer.step()
        assert recorder.last["1"]["max_age"] == 0
        assert math.isnan(recorder.last["1"]["admission_rate"])
        assert recorder.last["0"]["max_age"] == 1


def test_groups_that_come_and_go() -> None:
    """Every parameter has a name of its own, also where an earlier group was removed.

    Older tests only add groups: after a removal the new parameter's number was another's name.
    """
    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(2)
    optimizer = AdamCM([{"params": params[:1]}, {"params": params[1:2]}])
    with Recorder(optimizer) as recorder:
        optimizer.step()
        del optimizer.param_groups[0]
        optimizer.add_param_group({"params": params[2:]})
        optimizer.step()
        assert [*recorder.last] == ["1", "2", "all"]


def test_names_that_are_not_of_one_row(tmp_path: Path) -> None:
    """Two parameters with one name, or one named "all", are refused before anything is opened.

    Older tests name the parameters of one model: a row took another's place, and the step raised
    after it was taken. A parameter that is given twice has one row.
    """
    models = nn.Linear(2, 1), nn.Linear(2, 1)
    pairs = [pair for model in models for pair in model.named_parameters()]
    optimizer = AdamCM([param for _, param in pairs])
    path = tmp_path / "buffer.csv"
    with pytest.raises(ValueError, match="names must differ, got 'weight' for two parameters"):
        Recorder(optimizer, path, names=pairs)
    with pytest.raises(ValueError, match="names must not have 'all'"):
        Recorder(optimizer, path, names=[("all", models[0].weight)])
    assert not path.exists()
    own = pairs[:2]
    with Recorder(optimizer, names=[*own, *own]) as recorder:
        models[0](torch.ones(2)).sum().backward()
        optimizer.step()
    assert [*recorder.last] == ["weight", "bias", "all"]


def test_a_state_dict_loaded_while_recording() -> None:
    """What a state dict brings is no admission, and counts its age from then on.

    Situation: a recorded run loads its best checkpoint. Older tests load nothing while recording.
    """
    param = torch.zeros(2, requires_grad=True)
    optimizer = AdamCM([param], capacity=2, priority_decay=1.0)
    other = AdamCM([torch.zeros(2)], capacity=2, priority_decay=1.0)
    for each, scale in ((optimizer, 1.0), (other, 10.0)):
        for _ in range(2):
            each.param_groups[0]["params"][0].grad = torch.full((2,), scale)
            each.step()
    with Recorder(optimizer) as recorder:
        optimizer.load_state_dict(other.state_dict())
        param.grad = torch.ones(2)  # less than both keys
        optimizer.step()
        assert recorder.last["0"]["admission_rate"] == 0.0
        assert recorder.last["0"]["max_age"] == 1.0


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_extreme_decays(decay: float) -> None:
    """With 1 equal keys are never admitted again; with 0 each step is."""
    param = torch.zeros(2, requires_grad=True)
    optimizer = AdamCM([param], capacity=1, priority_decay=decay)
    with Recorder(optimizer) as recorder:
        for _ in range(4):
            param.grad = torch.ones(2)
            optimizer.step()
        assert recorder.last["0"]["max_age"] == (0 if decay == 0 else 3)


Records = list[dict[str, dict[str, float]]]


def _records(every: int, steps: int, backend: str) -> Records:
    """Return what was recorded of steps in which much happens."""
    params = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    optimizer = AdamCM(params[:2], lr=0.1, capacity=3, priority_decay=0.95, backend=backend)
    records = []
    with Recorder(optimizer, every=every) as recorder:
        for step, gradients in enumerate(_gradients(steps, (3, 3)), 1):
            if step == 5:
                optimizer.add_param_group({"params": params[2:], "capacity": 2})
            if step == 8:
                optimizer.param_groups[0]["priority_decay"] = 0.8
            if step == 12:
                optimizer.resize_buffer(4)
            for i, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
                param.grad = None if step % 4 == 2 and i == 1 else gradient
            optimizer.step()
            if step % every == 0:
                records.append(recorder.last)
    return records


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("every", [2, 3, 15, 300])
def test_recording_less_often(every: int, backend: str) -> None:
    """Nothing of the steps between is lost: the same ages and admissions as of every step.

    A group is added, a buffer resized and a decay changed in between, and a parameter left out.
    """
    steps = max(every, 30)
    each_step, records = _records(1, steps, backend), _records(every, steps, backend)
    assert len(records) == steps // every
    for number, record in enumerate(records):
        window = each_step[number * every : (number + 1) * every]
        for name, quantities in record.items():
            rates = [of_step[name]["admission_rate"] for of_step in window if name in of_step]
            known = [rate for rate in rates if not math.isnan(rate)]
            expected = dict(window[-1][name])
            if name != ALL:
                expected["admission_rate"] = sum(known) / len(known)
                assert quantities == pytest.approx(expected, nan_ok=True)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of torch's operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count a call, and make it."""
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_between_records_costs_one_operator() -> None:
    """Whatever the number of parameters; a record takes few besides those for each.

    Each step took three for every parameter, and each record 52, then 13 and 140 besides.
    """
    counts = []
    for size in (2, 20):
        params = [torch.zeros(3, requires_grad=True) for _ in range(size)]
        optimizer = AdamCM(params)
        for param in params:
            param.grad = torch.ones(3)
        with Recorder(optimizer, every=100) as recorder:
            for _ in range(3):
                optimizer.step()
            with _Counting() as between:
                recorder._after_step(optimizer, (), {})
            with _Counting() as record:
                recorder.record()
        assert between.names == ["cat.default"]
        counts.append(len(record.names))
    assert counts[1] - counts[0] < 18 * 10
    assert counts[0] < 70


def test_the_last_update() -> None:
    """It is the step's that is recorded, of all elements, unless the step before was not seen."""
    params = [torch.zeros(2, requires_grad=True), torch.zeros(6, requires_grad=True)]
    optimizer = AdamCM(params, lr=0.1)
    with Recorder(optimizer, every=3) as recorder:
        for step in range(1, 8):
            before = [param.detach().clone() for param in params]
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
            moves = [(p.detach() - b).square() for p, b in zip(params, before, strict=True)]
            if step % 3 == 0:
                for name, move in zip(("0", "1", ALL), (*moves, torch.cat(moves)), strict=True):
                    expected = move.mean().sqrt().item()
                    assert recorder.last[name]["update_rms"] == pytest.approx(expected, rel=1e-5)
            else:
                assert math.isnan(recorder.record()[ALL]["update_rms"])


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moves_of_float32_masters(backend: str, every: int) -> None:
    """They are those of a float32 training with the same gradients.

    Older tests record float32 parameters alone: the moves were those of the rounded parameter, most
    of them 0 at this rate.
    """
    last = []
    for dtype in (torch.float32, torch.bfloat16):
        params = [torch.ones(size, dtype=dtype, requires_grad=True) for size in (6, 40)]
        frozen = torch.ones(2, dtype=dtype)
        optimizer = AdamCM(
            [*params, frozen], lr=1e-4, low_precision_update="split", backend=backend
        )
        with Recorder(optimizer, every=every) as recorder:
            for gradients in zip(_gradients(4), _gradients(4, (40,)), strict=True):
                for param, gradient in zip(params, gradients, strict=True):
                    param.grad = gradient.to(torch.bfloat16).to(dtype)
                optimizer.step()
        last.append(recorder.last)
        assert recorder.last[ALL]["update_rms"] > 0
    for name, row in last[0].items():
        for quantity in ("distance", "update_rms"):
            assert last[1][name][quantity] == row[quantity], (name, quantity)


def test_no_state_yet_and_complex_parameters() -> None:
    """Nothing to read before the first step; complex elements are pairs."""
    param = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    optimizer = AdamCM([param], capacity=2)
    assert read(optimizer) == {}
    param.grad = torch.tensor([3 + 4j, 0, 0])
    optimizer.step()
    reading = read(optimizer)[param]
    assert reading.filled == 1
    assert reading.variance == 0
    assert math.isnan(reading.agreement)
    assert reading.momentum_norm == pytest.approx(0.5)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_torchs_defaults_change_nothing(steps_before: int) -> None:
    """What a recording makes of its own is made where it is needed, of the dtype that it needs.

    A buffer that a recording had not seen was made on torch's default device. `test_contract.py`
    and `test_compat.py` step under one, and record nothing.
    """
    rows = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float16)):
        params = [torch.zeros(2, requires_grad=True), torch.zeros(6, requires_grad=True)]
        gradients = [[torch.arange(len(p)).cos() * t for p in params] for t in range(9)]
        optimizer = AdamCM(params, capacity=2)
        _step_each(optimizer, params, gradients[:steps_before])
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), Recorder(optimizer, every=2) as recorder:
                _step_each(optimizer, params, gradients[steps_before:])
        finally:
            torch.set_default_dtype(torch.float32)
        rows.append(str(recorder.last))  # in which NaN is NaN
    assert rows[0] == rows[1]


def _step_each(optimizer: AdamCM, params: list[Tensor], gradients: list[list[Tensor]]) -> None:
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def test_combine() -> None:
    """Norms add as vectors do, the rest by elements, and what does not exist is left out."""
    small = Reading(1, 2.0, math.nan, 3.0, 0.0, 1.0)
    large = Reading(5, 6.0, 0.5, 4.0, 2.0, 0.0)
    both = combine({torch.zeros(1): small, torch.zeros(3): large})
    assert both == Reading(4, 5.0, 0.5, 5.0, 2.0, 1.0)


def test_tensorboard(tmp_path: Path) -> None:
    """Files where it is installed, else an error that says so."""
    param = torch.zeros(2, requires_grad=True)
    optimizer = AdamCM([param])
    try:
        recorder = Recorder(optimizer, tensorboard=tmp_path)
    except ModuleNotFoundError as error:
        assert "pip install tensorboard" in str(error)  # noqa: PT017
        return
    with recorder:
        param.grad = torch.ones(2)
        optimizer.step()
    assert list(tmp_path.glob("events*"))


def test_errors() -> None:
    """The argument is named; nothing is hooked.

    Older tests give every loss as a tensor: a closure raised AttributeError. They give no frozen
    parameter, for which autograd raised.
    """
    param = torch.zeros(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"must have a critical buffer .* got Adam"):
        Recorder(SAM(torch.optim.Adam([param])))
    optimizer = AdamCM([param])
    with pytest.raises(ValueError, match="every must be an int >= 1, got 0"):
        Recorder(optimizer, every=0)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(
        TypeError, match=r"loss must be a tensor .*, got builtin_function_or_method"
    ):
        sharpness(param.sum, [param])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="params must have at least one"):
        sharpness(param.sum(), [])
    with pytest.raises(ValueError, match="tolerance must be > 0, got 0"):
        sharpness(param.sum(), [param], tolerance=0)
    with pytest.raises(ValueError, match="max_iterations must be >= 1, got 0"):
        sharpness(param.sum(), [param], max_iterations=0)
    with pytest.raises(ValueError, match="params must have at least one element"):
        sharpness(param.sum(), [torch.zeros(0, requires_grad=True)])
    complex_param = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match=r"must be real, got torch.complex64 for params\[1\]"):
        sharpness(complex_param.abs().sum(), [param, complex_param])
    frozen = torch.zeros(2)
    message = r"params must require grad, got params\[1\] that does not .*if p.requires_grad"
    with pytest.raises(ValueError, match=message):
        sharpness((param * frozen).sum(), [param, frozen])


def test_sharpness_of_a_model() -> None:
    """The exact largest eigenvalue of a small network's Hessian; nothing else is touched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inputs, targets = torch.randn(16, 3).double(), torch.randn(16, 1).double()
    params = list(model.parameters())

    def loss_at(flat: Tensor) -> Tensor:
        sizes = [param.numel() for param in params]
        parts = zip(model.named_parameters(), torch.split(flat, sizes), strict=True)
        values = {name: part.view_as(param) for (name, param), part in parts}
        outputs = torch.func.functional_call(model, values, inputs)
        return nn.functional.mse_loss(outputs, targets)

    flat = torch.cat([param.detach().flatten() for param in params])
    hessian = torch.autograd.functional.hessian(loss_at, flat)  # type: ignore[no-untyped-call]
    exact = torch.linalg.eigvalsh(hessian)[-1].item()
    state = torch.get_rng_state()
    loss = nn.functional.mse_loss(model(inputs), targets)
    result = sharpness(loss, params, tolerance=1e-8, max_iterations=2000)
    assert result.eigenvalue == pytest.approx(exact, rel=1e-4)
    assert sharpness(loss, params, tolerance=1e-8, max_iterations=2000) == result
    assert all(param.grad is None for param in params)
    assert torch.equal(torch.get_rng_state(), state)
    assert not sharpness(loss, params, tolerance=1e-12, max_iterations=2).converged


def test_sharpness_with_a_tensor_given_twice() -> None:
    """A tensor counts once: x**2 in two variables has eigenvalue 2, not 4.

    Situation: parameters chained from modules that are tied. The older tests give each one once.
    """
    param = torch.ones(2, requires_grad=True)
    found = sharpness(param.square().sum(), [param, param])
    assert found.eigenvalue == pytest.approx(2.0, rel=1e-4)


def test_sharpness_of_a_linear_loss() -> None:
    """No curvature, also where a parameter is not used."""
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    assert sharpness(x.sum(), [x, unused]).eigenvalue == 0
    assert sharpness(x.square().sum(), [x, unused]).eigenvalue == pytest.approx(2)


@pytest.mark.parametrize("seed", range(20))
def test_sharpness_of_a_saddle(seed: int) -> None:
    """The Hessian of x * y has the eigenvalues 1 and -1, whatever vector it starts from.

    The Rayleigh quotient of any vector stands still under power iteration there.
    """
    x, y = (torch.tensor(value, requires_grad=True) for value in (0.3, 0.7))
    result = sharpness(x * y, [x, y], seed=seed)
    assert result.converged
    assert result.eigenvalue == pytest.approx(1)


def _symmetric(eigenvalues: Tensor) -> Tensor:
    """Return a random float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(len(eigenvalues))
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    hessian: Tensor = basis @ torch.diag(eigenvalues.double()) @ basis.T
    return hessian


def _ramp(size: int) -> Tensor:
    return torch.linspace(0.1, 1.0, size)


SPECTRA = {
    "one parameter": torch.tensor([3.0]),
    "one parameter, negative": torch.tensor([-3.0]),
    "pair": torch.tensor([1.0, -1.0]),
    "pairs": torch.cat([_ramp(15), -_ramp(15)]),
    "pairs and zeros": torch.cat([_ramp(5), -_ramp(5), torch.zeros(20)]),
    "larger below": torch.cat([_ramp(15), -100 * _ramp(15)]),
    "negative": -_ramp(30),
    "negative, far from 0": -1000 - _ramp(30),
    "multiple": torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, 1.0, 0.0]),
    "identity": torch.ones(12),
    "zero": torch.zeros(7),
    "rank one": torch.cat([torch.tensor([5.0]), torch.zeros(30)]),
    "rank one, negative": torch.cat([torch.tensor([-5.0]), torch.zeros(30)]),
    "many sizes": torch.logspace(-8, 3, 40),
    "normal": torch.randn(60, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_sharpness_of_a_spectrum(name: str, dtype: torch.dtype) -> None:
    """Whatever the other eigenvalues, what is said to be converged is the largest one.

    Power iteration stood still on pairs of opposite sign, which the older test's spectra lack.
    """
    eigenvalues = SPECTRA[name]
    hessian = _symmetric(eigenvalues).to(dtype)
    x = torch.randn(len(eigenvalues), dtype=dtype)
    # Two tensors, the second of which may be empty.
    parts = [part.clone().requires_grad_() for part in (x[:1], x[1:])]
    whole = torch.cat(parts)
    tolerance = 1e-5
    result = sharpness(0.5 * whole @ hessian @ whole, parts, tolerance=tolerance)
    assert result.converged
    assert result.iterations <= 200
    size = eigenvalues.abs().max().item()
    assert abs(result.eigenvalue - eigenvalues.max().item()) <= tolerance * size


@pytest.mark.parametrize("max_iterations", [1, 2, 5])
def test_sharpness_that_has_not_converged(max_iterations: int) -> None:
    """Few products do not suffice, and it says so; there are no more of them."""
    x = torch.ones(30, dtype=torch.float64, requires_grad=True)
    loss = 0.5 * x @ _symmetric(SPECTRA["pairs"]) @ x
    result = sharpness(loss, [x], max_iterations=max_iterations)
    assert not result.converged
    assert result.iterations == max_iterations
    assert -1 <= result.eigenvalue <= 1


def test_sharpness_with_a_tolerance_out_of_reach() -> None:
    """Below the rounding of float32 nothing is said to be converged that is not."""
    x = torch.ones(30, requires_grad=True)
    loss = 0.5 * x @ _symmetric(SPECTRA["pairs"]).float() @ x
    result = sharpness(loss, [x], tolerance=1e-12)
    assert not result.converged
    assert result.eigenvalue == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sharpness_that_is_not_finite(value: float) -> None:
    """A Hessian that is not finite has no largest eigenvalue, and none is claimed."""
    x = torch.ones(3, requires_grad=True)
    result = sharpness((value * x.square()).sum(), [x])
    assert not result.converged
    assert not math.isfinite(result.eigenvalue)
    weights = torch.tensor([1.0, 2.0, value])
    assert not sharpness((weights * x.square()).sum(), [x]).converged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sharpness_under_autocast(dtype: torch.dtype) -> None:
    """Called under autocast it has the bits that it has without.

    Its products were made in low precision there; no test called it so.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1))
    loss = nn.functional.mse_loss(model(torch.randn(32, 6)), torch.randn(32, 1))
    expected = sharpness(loss, model.parameters())
    with torch.autocast("cpu", dtype=dtype):
        assert sharpness(loss, model.parameters()) == expected
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        assert sharpness(loss, model.parameters()) == expected
    assert expected.converged


def test_sharpness_of_half_precision_parameters() -> None:
    """Vectors are float32 and products bfloat16, whose rounding the tolerance allows for."""
    x = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.arange(1.0, 9.0).bfloat16()
    result = sharpness(0.5 * (weights * x.square()).sum(), [x], tolerance=0.02)
    assert result.converged
    assert result.eigenvalue == pytest.approx(8, rel=0.02)
