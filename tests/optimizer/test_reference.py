"""The reference is the oracle's algorithm, under every combination of options, and compiles."""

import pytest
import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._bucket import Bucket
from cm_fused._state import access
from tests.support.cases import (
    KINDS,
    MIXED,
    REGIMES,
    Kind,
    Regime,
    adjusted_options,
    make_bucket,
    make_gradients,
    make_params,
    name_of,
    option_matrix,
    step_options,
    to_array,
)
from tests.support.compare import OracleRun, Seen, check_state, relative, see
from tests.support.oracle import Options

SHAPES: list[tuple[int, ...]] = [(7,), (3, 4), ()]
STEPS = {"cm": reference.adam_cm_, "cg": reference.adam_cg_}

# float64: each value to 1e-12, and where terms cancel to some forty ulps of the tensor's largest
# value. Parameters start, and gradients are mostly, of size 1.
CLOSE = relative(1e-12, 1e-14, size=1.0)


def _taking_part(bucket: Bucket, grads: list[Tensor | None]) -> Bucket:
    """Return the bucket of the parameters that have a gradient."""
    taking_part = [i for i, grad in enumerate(grads) if grad is not None]
    return Bucket(
        [bucket.params[i] for i in taking_part],
        [grad for grad in grads if grad is not None],
        {key: [tensors[i] for i in taking_part] for key, tensors in bucket.state.items()},
    )


def _seen(bucket: Bucket, i: int) -> Seen:
    return see({key: tensors[i] for key, tensors in bucket.state.items()})


def _check_run(options: Options, regime: Regime) -> None:
    bucket = make_bucket(make_params(SHAPES, torch.float64), options, fused=False)
    oracle = OracleRun(bucket.params)
    step_ = STEPS[options.kind]
    events = regime.events(options.capacity)
    for t, grads in enumerate(make_gradients(bucket.params, events)):
        step_(_taking_part(bucket, grads), step_options(options))
        oracle.step(grads, options)
        for i, (param, state) in enumerate(zip(oracle.params, oracle.states, strict=True)):
            where = f"step {t + 1}, params[{i}]"
            CLOSE(to_array(bucket.params[i]), param, where)
            seen = _seen(bucket, i)
            check_state(seen, state, options.capacity, CLOSE, where, amsgrad=options.amsgrad)


@pytest.mark.parametrize("options", option_matrix((0, 1, 3, 5, 20)), ids=name_of)
def test_options(options: Options) -> None:
    """Parameters and state after every step of a run that fills, replaces, skips and ties."""
    _check_run(options, MIXED)


@pytest.mark.parametrize("options", adjusted_options(), ids=name_of)
def test_adjusted_updates(options: Options) -> None:
    """The update is scaled by what beta1 gives, and decoupled weight decay is not."""
    _check_run(options, MIXED)


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
@pytest.mark.parametrize("capacity", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_regimes(kind: Kind, capacity: int, regime: Regime) -> None:
    """The same for the runs in which one thing happens to the buffer again and again."""
    decay = regime.priority_decay
    _check_run(Options(kind, lr=0.05, capacity=capacity, priority_decay=decay), regime)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capacity", [1, 2, 5, 8])
def test_slots_are_summed_in_their_order(capacity: int, dtype: torch.dtype) -> None:
    """The sum's bits are not the strides': `Tensor.sum`'s are, of five slots and more.

    Older tests compare layouts to a bound; a buffer's memory order changed a step.
    """
    slots = torch.randn(capacity, 30, 50, dtype=dtype)
    expected = torch.zeros(30, 50, dtype=dtype)
    for slot in slots.unbind():
        expected = expected + slot
    transposed = slots.mT.contiguous().mT
    for layout in (slots, transposed):
        assert torch.equal(access.sum_slots(layout), expected)
