"""A state machine that uses an optimizer's public API at random, beside a model.

Both take the same steps with the same options. Only the optimizer under test is also saved and
loaded, copied, pickled, moved, and asked for what must fail. Gradients are missing, zero, spiky,
strided, expanded, plain or not finite.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import real
from tests.support.compare import committed_copy

SHAPES = ((), (0,), (3,), (4, 5), (2, 3, 2), (300,))
MAX_GROUPS = 3
View = dict[str, Tensor]
seeds = st.integers(0, 2**31)
capacities = st.integers(0, 6)
# What a group may have of its own, and what may change between two steps.
HYPERPARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 1e-4, 0.1]),
    "betas": st.sampled_from([(0.9, 0.99), (0.0, 0.5), (0.5, 0.999)]),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "weight_decay": st.sampled_from([0.0, 0.0, 0.1]),
    "decoupled_weight_decay": st.booleans(),
    "adjust_lr_fn": st.sampled_from([None, None, "match_rms_adamw"]),
    "amsgrad": st.booleans(),
    "priority_decay": st.sampled_from([0.0, 0.7, 1.0]),
    "priority_scope": st.sampled_from(["group", "tensor"]),
    "buffer_mean": st.sampled_from(["capacity", "size"]),
    "eps_inside_sqrt": st.booleans(),
    "max_grad_norm": st.sampled_from([None, None, 1.0]),
    "skip_nonfinite": st.booleans(),
    "maximize": st.booleans(),
}
options_of_a_group = st.fixed_dictionaries({"capacity": capacities, **HYPERPARAMETERS})


class ApiMachine(RuleBasedStateMachine):
    """The rules. A subclass constructs both optimizers and says what of them is to be the same.

    Attributes:
        transitions: How many rules were run, of all machines.
        params: Parameters of the optimizer under test.
        optimizer: The optimizer under test.
        model_params: Parameters of the model.
        model: An optimizer that does nothing but steps.
        dtypes: Dtypes of the parameters, in turn.
        backends: What the optimizer under test may be switched to.
        precision: Options of low precision, the same for all groups.
        reorders: Whether parameters may take another memory order, which new state follows.
    """

    transitions: ClassVar[int] = 0

    params: list[Tensor]
    optimizer: CriticalAdam
    model_params: list[Tensor]
    model: CriticalAdam
    dtypes: tuple[torch.dtype, ...]
    backends: tuple[str | None, ...]
    precision: dict[str, Any]
    reorders: bool

    def construct_both(
        self, kind: type[CriticalAdam], seed: int, model_backend: str, options: dict[str, Any]
    ) -> None:
        """Make both, with one group."""
        options = {**options, **self.precision}
        self.params, self.model_params = self._new_params(seed), self._new_params(seed)
        self.optimizer = kind(self.params, backend=self.backends[0], **options)
        self.model = kind(self.model_params, backend=model_backend, **options)

    def check_agreement(self) -> None:
        """Compare parameters and state."""
        raise NotImplementedError

    def after_gradients(self) -> None:
        """Look at the gradients of a step that is to come."""

    @precondition(lambda self: len(self.optimizer.param_groups) < MAX_GROUPS)
    @rule(seed=seeds, options=options_of_a_group)
    def add_group(self, seed: int, options: dict[str, Any]) -> None:
        """Add a param group with options of its own."""
        for params, optimizer in self._both():
            new = self._new_params(seed)
            params += new
            optimizer.add_param_group({"params": new, **options})

    @rule(seed=seeds, steps=st.integers(1, 3), closes=st.booleans())
    def step(self, seed: int, steps: int, closes: bool) -> None:
        """Step with gradients of all kinds, more than once so that buffers fill."""
        for t in range(steps):
            self._set_gradients(seed + t)
            for _, optimizer in self._both():
                assert optimizer.step((lambda: 1.5) if closes else None) == (
                    1.5 if closes else None
                )

    @rule(seed=seeds, value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    def skip(self, seed: int, value: float) -> None:
        """Step with a gradient that is not finite, which all groups are to skip."""
        self._set_gradients(seed)
        before = views(self.optimizer, self.params)
        poisons = [
            poison(params, value, torch.Generator().manual_seed(seed)) for params, _ in self._both()
        ]
        for _, optimizer in self._both():
            kept = [group["skip_nonfinite"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["skip_nonfinite"] = True
            optimizer.step()
            for group, skips in zip(optimizer.param_groups, kept, strict=True):
                group["skip_nonfinite"] = skips
        if all(poisons):
            after = views(self.optimizer, self.params)
            assert_same_bits(after, before, "a skipped step", may_be_others=True)

    @rule(
        group=st.integers(0, MAX_GROUPS - 1),
        options=st.fixed_dictionaries({}, optional=HYPERPARAMETERS),
        as_tensor=st.booleans(),
    )
    def change_hyperparameters(self, group: int, options: dict[str, Any], as_tensor: bool) -> None:
        """Change what a scheduler may change, and more."""
        for _, optimizer in self._both():
            chosen = optimizer.param_groups[group % len(optimizer.param_groups)]
            chosen.update(options)
            if as_tensor:
                chosen["lr"] = torch.tensor(float(chosen["lr"]))

    @rule(capacity=capacities)
    def resize_buffer(self, capacity: int) -> None:
        """Change the capacity of all buffers."""
        for _, optimizer in self._both():
            optimizer.resize_buffer(capacity)

    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        """Go on in a new optimizer, perhaps of another backend."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        groups = [
            {key: group[key] for key in ("params", "capacity")}
            for group in self.optimizer.param_groups
        ]
        backend = data.draw(st.sampled_from(self.backends))
        self.optimizer = type(self.optimizer)(groups, backend=backend, **self.precision)
        self.optimizer.load_state_dict(torch.load(file))

    @rule()
    def load_own(self) -> None:
        """Load a state dict into the optimizer that it is of."""
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    @rule()
    def look(self) -> None:
        """Have a state dict made and thrown away."""
        self.optimizer.state_dict()

    @rule(data=st.data())
    def change_backend(self, data: st.DataObject) -> None:
        """Have the next steps taken by another backend."""
        backend = data.draw(st.sampled_from(self.backends))
        for group in self.optimizer.param_groups:
            group["backend"] = backend

    @rule()
    def deepcopy(self) -> None:
        """Go on with a copy."""
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))

    @rule()
    def pickle(self) -> None:
        """Go on with what pickle makes of it."""
        self.params, self.optimizer = pickle.loads(pickle.dumps((self.params, self.optimizer)))

    @rule(order=st.sampled_from(["same", "transposed", "with gaps"]))
    def move_storage(self, order: str) -> None:
        """Have the parameters lie elsewhere, and otherwise."""
        for param in self.params:
            moved = param.detach().clone()
            if self.reorders and order == "transposed" and moved.ndim > 1:
                moved = moved.mT.contiguous().mT
            if self.reorders and order == "with gaps" and moved.ndim > 0:
                moved = torch.stack([moved, moved], -1)[..., 0]
            param.data = moved

    @precondition(lambda self: any(param in self.optimizer.state for param in self.params))
    @rule(seed=seeds)
    def replace_by_another_shape(self, seed: int) -> None:
        """Step while a parameter's data has another shape than its state."""
        self._set_gradients(seed)
        known = [param for param in self.params if param in self.optimizer.state]
        param = known[seed % len(known)]
        data = param.data

        def spoil() -> None:
            param.data = torch.zeros((*data.shape, 2), dtype=data.dtype)
            param.grad = torch.ones_like(param)

        def mend() -> None:
            param.grad = None
            param.data = data

        self._check_refused(spoil, mend)

    @rule(seed=seeds, fault=st.sampled_from(["shape", "dtype", "sparse", "integer"]))
    def give_a_bad_gradient(self, seed: int, fault: str) -> None:
        """Step with a gradient that does not fit its parameter."""
        self._set_gradients(seed)
        param = self.params[seed % len(self.params)]
        other = torch.float32 if param.dtype == torch.float64 else torch.float64
        bad = {
            "shape": torch.zeros((*param.shape, 2), dtype=param.dtype),
            "dtype": torch.zeros(param.shape, dtype=other),
            "sparse": torch.zeros(param.shape, dtype=param.dtype).to_sparse(),
            "integer": torch.zeros(param.shape, dtype=torch.int64),
        }[fault]
        # What autograd lets nobody assign may still come by other ways.
        self._check_refused(
            lambda: _force_gradient(param, bad), lambda: setattr(param, "grad", None)
        )

    @precondition(lambda self: any(p.grad is not None for p in self.optimizer.state))
    @rule(group=st.integers(0, MAX_GROUPS - 1))
    def ask_for_another_capacity(self, group: int) -> None:
        """Step after a change of the capacity by hand."""
        groups = self.optimizer.param_groups
        chosen = groups[group % len(groups)]
        taking_part = any(
            param.grad is not None and param in self.optimizer.state for param in chosen["params"]
        )
        capacity = chosen["capacity"]
        if not taking_part or capacity == 0:  # from no buffer to one is no contradiction
            return
        self._check_refused(
            lambda: chosen.update(capacity=capacity + 1),
            lambda: chosen.update(capacity=capacity),
        )

    @invariant()
    def agrees(self) -> None:
        """The optimizer under test is where the model is."""
        if hasattr(self, "optimizer"):
            ApiMachine.transitions += 1
            self.check_agreement()

    def _check_refused(self, spoil: Callable[[], None], mend: Callable[[], None]) -> None:
        """Check that a step raises and changes nothing."""
        before = views(self.optimizer, self.params)
        spoil()
        try:
            with pytest.raises(RuntimeError):
                self.optimizer.step()
        finally:
            mend()
        assert_same_bits(views(self.optimizer, self.params), before, "a refused step")

    def _both(self) -> Iterator[tuple[list[Tensor], CriticalAdam]]:
        yield self.params, self.optimizer
        yield self.model_params, self.model

    def _set_gradients(self, seed: int) -> None:
        for params, _ in self._both():
            source = torch.Generator().manual_seed(seed)
            for param in params:
                param.grad = gradient(param, source)
        self.after_gradients()

    def _new_params(self, seed: int) -> list[Tensor]:
        source = torch.Generator().manual_seed(seed)
        first = seed % len(SHAPES)
        shapes = [*SHAPES, *SHAPES][first : first + 3]
        return [
            new_param(shape, self.dtypes[i % len(self.dtypes)], source)
            for i, shape in enumerate(shapes)
        ]


def _force_gradient(param: Tensor, bad: Tensor) -> None:
    """Set a gradient that `Tensor.grad` refuses, by way of data of another shape."""
    data = param.data
    param.grad = None
    param.grad_dtype = None
    if bad.shape != data.shape:
        param.data = data.new_zeros(bad.shape)
    param.grad = bad
    param.data = data


def views(optimizer: CriticalAdam, params: list[Tensor]) -> list[View]:
    """Return copies of each parameter and its state, a pending commit made in the copies alone."""
    return [_view(param, optimizer.state.get(param, {})) for param in params]


def _view(param: Tensor, state: dict[str, Any]) -> View:
    view = committed_copy(state)
    view.pop("pending_slot", None)
    largest = view.get("max_exp_avg_sq")
    if largest is not None and not largest.any():
        # Loading makes what amsgrad, turned on since, would have made at the next step.
        del view["max_exp_avg_sq"]
    return {"param": real(param).clone(), **view}


def assert_same_bits(
    actual: list[View], expected: list[View], what: str, *, may_be_others: bool = False
) -> None:
    """Check that every tensor has the same bits.

    Args:
        actual: What is compared.
        expected: What it is to be.
        what: For the message.
        may_be_others: State may be new, and a running sum, another backend's, dropped.
    """
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        where = f"{what}, parameter {i}"
        assert may_be_others or one.keys() == other.keys(), where
        for key, value in other.items():
            if may_be_others and key == "critical_sum":
                continue
            assert one[key].dtype == value.dtype, f"{where}: {key}"
            assert torch.equal(_bytes(one[key]), _bytes(value)), f"{where}: {key}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).unsqueeze(-1).view(torch.uint8)


def new_param(shape: tuple[int, ...], dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Return a parameter of normal values."""
    return _normal(torch.Size(shape), dtype, source).requires_grad_()


def gradient(param: Tensor, source: torch.Generator) -> Tensor | None:
    """Return a gradient of one kind or another, or None.

    It is small enough that nothing overflows in float16, and is drawn in float32: every dtype from
    float32 up gets the same values.
    """
    kind = int(torch.randint(8, (), generator=source))
    values = _normal(param.shape, param.dtype, source)
    if kind == 0:
        return None
    if kind == 1:
        return torch.zeros_like(values)
    if kind == 2:
        return values * 1e3
    if kind == 3 and param.ndim > 1:
        return values.mT.contiguous().mT
    if kind == 4 and param.ndim > 0:
        return torch.stack([values, values], -1)[..., 0]  # gaps
    if kind == 5:
        return _normal(torch.Size(()), param.dtype, source).expand(param.shape)
    return values


def poison(params: list[Tensor], value: float, source: torch.Generator) -> bool:
    """Put a value somewhere into one of the gradients; return whether there was a place."""
    places = [param for param in params if param.grad is not None and param.numel()]
    if not places:
        return False
    chosen = places[int(torch.randint(len(places), (), generator=source))]
    spoilt = chosen.grad.clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
    spoilt.view(-1)[int(torch.randint(spoilt.numel(), (), generator=source))] = value
    chosen.grad = spoilt
    return True


def _normal(shape: torch.Size, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=source, dtype=drawn).to(dtype)
