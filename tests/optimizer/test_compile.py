"""torch.compile takes steps whole, compiles them twice and never again."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cm_fused import AdamCG, AdamCM
from cm_fused._backends import library, traced
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.table import KEYS, mask_of
from tests.support.cases import make_bucket
from tests.support.oracle import Options
from tests.support.training import BACKENDS, KINDS, ROUNDING, assert_same

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"max_grad_norm": 0.5, "skip_nonfinite": True, "amsgrad": True},
    "decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1, "buffer_mean": "size"},
    "adjusted": {"decoupled_weight_decay": True, "adjust_lr_fn": "match_rms_adamw"},
    "low_precision": {"buffer_dtype": torch.bfloat16, "moment_dtype": torch.int8, "seed": 5},
}
STEPS = 12


def _where_there_is_time(backend: str) -> Any:
    """Return a parameter for a backend: of those but "cpu" the training step is traced anyway."""
    return backend if backend == "cpu" else pytest.param(backend, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def _quiet(nothing_compiled: None) -> Iterator[None]:
    """Compile anew; what torch says of itself while it compiles is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _model() -> nn.Module:
    torch.manual_seed(0)
    # A matrix and a vector: with more parameters tracing takes longer.
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh())


def _lr(in_a_tensor: bool) -> Any:
    return torch.tensor(0.02) if in_a_tensor else 0.02


def _give_gradients(model: nn.Module, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator) * (1 + t % 3)


def _compare(ours: nn.Module, theirs: nn.Module) -> None:
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **ROUNDING)


@pytest.mark.parametrize("backend", [_where_there_is_time(name) for name in BACKENDS])
@pytest.mark.parametrize(
    ("cls", "options", "lr_in_a_tensor"),
    [
        (AdamCM, "plain", False),
        (AdamCM, "clipping", True),
        (AdamCM, "low_precision", True),
        (AdamCM, "adjusted", True),
        (AdamCG, "decoupled", False),
        # Each class, each option and both kinds of lr are above.
        pytest.param(AdamCM, "adjusted", False, marks=pytest.mark.slow),
        pytest.param(AdamCG, "clipping", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_step(
    cls: type[CriticalAdam], options: str, lr_in_a_tensor: bool, backend: str
) -> None:
    """One graph for the first step, which makes the state, and one for all that follow.

    A scheduler changes the learning rate after each; the parameters are those of plain steps.
    """
    runs = []
    for _ in range(2):
        model = _model()
        lr = _lr(lr_in_a_tensor)
        optimizer = cls(model.parameters(), lr=lr, backend=backend, **OPTIONS[options])
        runs.append((model, optimizer))
    (model, optimizer), (twin, expected) = runs
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for _, o in runs]
    for t in range(STEPS):
        for each in (model, twin):
            _give_gradients(each, t)
        step()
        expected.step()
        for scheduler in schedulers:
            scheduler.step()
        assert counter.frame_count == min(t + 1, 2)
    if options == "low_precision":
        # Torch contracts some sums: a code may differ.
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0.05, atol=0.01)
    else:
        _compare(model, twin)


def test_compiled_step_goes_on_eagerly() -> None:
    """State that compiled steps left, a commit pending, is an eager step's, and the other way."""
    model = _model()
    optimizer = AdamCM(model.parameters(), lr=0.02)
    twin = copy.deepcopy(model)
    expected = AdamCM(twin.parameters(), lr=0.02)
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for t in range(STEPS):
        for each in (model, twin):
            _give_gradients(each, t)
        (step if t % 4 < 2 else optimizer.step)()
        expected.step()
    assert_same(optimizer.state_dict()["state"], expected.state_dict()["state"])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_a_compiled_step_leaves_the_options(backend: str) -> None:
    """A step that counts skipped steps changes its group in that, and in no option.

    torch.compile takes `capturable` for True, and writes the whole of a group that has changed
    back: an eager step after it raised then, and so did every step from its checkpoint. The tests
    of compiled steps looked at parameters and state only, and the one that goes on eagerly does not
    count.
    """
    groups = []
    for compiles in (True, False):
        model = _model()
        options = [{"params": [p], "skip_nonfinite": p.ndim > 1} for p in model.parameters()]
        optimizer = AdamCM(options, lr=0.02, max_grad_norm=1.0, backend=backend)
        step: Any = optimizer.step
        if compiles:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for t in range(4):
            _give_gradients(model, t)
            step()
            scheduler.step()
        optimizer.step()
        groups.append(
            [
                {name: (type(value), value) for name, value in group.items() if name != "params"}
                for group in optimizer.param_groups
            ]
        )
    assert groups[0] == groups[1]


@pytest.mark.parametrize(
    ("cls", "backend"),
    [
        # Each class and each backend once where there is little time.
        pytest.param(
            cls, name, marks=() if (cls is AdamCM) == (name == "cpu") else pytest.mark.slow
        )
        for cls in KINDS
        for name in BACKENDS
        if name != "triton"
    ],
)
def test_compiled_training_step(cls: type[CriticalAdam], backend: str) -> None:
    """Forward, backward and step in one function: its only breaks are torch's own, at backward.

    The same function with torch.optim.AdamW has as many graphs.
    """
    assert _frames_of_training(cls, backend=backend) <= _frames_of_adamw() + 1


@cache
def _frames_of_adamw() -> int:
    return _frames_of_training(torch.optim.AdamW)


def _frames_of_training(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> int:
    """Return how many graphs a function that trains has after two steps, and never more."""
    torch._dynamo.reset()
    model = _model()
    optimizer = cls(model.parameters(), lr=torch.tensor(0.01), **options)
    counter = CompileCounterWithBackend("aot_eager")

    def train(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(inputs).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    compiled = torch.compile(train, backend=counter)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    counts = []
    for t in range(STEPS):
        compiled(torch.randn(4, 5, generator=torch.Generator().manual_seed(t))).item()
        scheduler.step()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1]
    return counts[1]


# What registers is the operator of the step, the same for both.
@pytest.mark.parametrize("backend", [_where_there_is_time(b) for b in BACKENDS if b != "eager"])
def test_a_compiled_step_registers_its_state_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in each step, but again when other state is loaded; nothing outlives the optimizer.

    Older tests looked at the values alone, which were right.
    """
    made = []
    register = library.RegisteredState.__init__

    def counted(*arguments: Any, **others: Any) -> None:
        made.append(1)
        register(*arguments, **others)

    monkeypatch.setattr(library.RegisteredState, "__init__", counted)
    model = _model()
    optimizer = AdamCM(model.parameters(), backend=backend, capacity=3)
    step = torch.compile(optimizer.step, backend="eager")
    counts = []
    for t in range(7):
        if t == 5:
            optimizer.load_state_dict(optimizer.state_dict())
            loaded = len(made)
        _give_gradients(model, t)
        step()
        counts.append(len(made))
    assert counts[1:5] == counts[1:2] * 4
    assert counts[5:] == [loaded + 1] * 2
    state = weakref.ref(next(iter(optimizer.state.values()))["exp_avg"])
    grad = weakref.ref(next(model.parameters()).grad)
    optimizer.zero_grad()
    assert grad() is None
    del optimizer, step
    torch._dynamo.reset()
    gc.collect()
    assert state() is None


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("kind", ["cm", "cg"])
def test_opcheck_of_the_step(kind: Any, backend: str) -> None:
    """Its schema, autograd registration, fake kernel and functionalization agree with it."""
    params = [torch.randn(5, 3), torch.randn(4)]
    bucket = make_bucket(params, Options(kind=kind, capacity=3), fused=True)
    torch.library.opcheck(
        traced.step_op,
        (
            bucket.params,
            bucket.grads,
            [tensor for key in KEYS for tensor in bucket[key]],
            mask_of(bucket.state),
            [0, 1],
            [],
            None,
            *(torch.tensor(0.01), torch.tensor(0.5), None),
        ),
        {
            "batches": -1,
            "backend": backend,
            "critical_gradients": kind == "cg",
            **{name: getattr(bucket.options, name) for name in traced.PLAIN_OPTIONS},
        },
    )
