"""Arguments that crashed an operator, or were taken in silence: each is an error, with no change.

The older tests damaged dtypes, shapes, strides and lengths, one list at a time. None took a
tensor's memory from under it, changed a held tensor in place, or mixed in devices and views that
have no memory of their own, and these were what crashed. `bench.torture.operators` tries such
arguments at random; a part of it is run here.
"""

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.torture import operators
from cm_fused._backends.triton.columns import WIDTH, Column
from tests.operators.test_ops import LAST, OPS, STEPS, Sample, hold, sample, step_held_
from tests.support.cases import ROOT, needs_cpu_backend
from tests.support.training import assert_same

pytestmark = needs_cpu_backend

# Lists of tensors that each operator reads the memory of, beyond a single number.
READ = {
    "adam_cm_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "critical_buffers", "priorities"),
    "adam_cg_": ("params", "grads", "exp_avgs", "exp_avg_sqs", "critical_buffers", "priorities"),
    "sq_norms": ("params", "grads"),
    "keep_books_": ("priorities",),
    "commit_": ("exp_avgs", "critical_buffers", "critical_sums"),
}
assert READ.keys() == set(OPS)


def _copy(case: Sample, besides: Tensor | None = None) -> dict[str, list[Tensor]]:
    return {
        role: [t.clone() for t in tensors if t is not besides]
        for role, tensors in case.lists().items()
    }


def _same(case: Sample, before: dict[str, list[Tensor]], besides: Tensor | None = None) -> None:
    now = {role: [t for t in ts if t is not besides] for role, ts in case.lists().items()}
    assert_same(now, before)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize(("op", "role"), [(op, role) for op in OPS for role in READ[op]])
def test_tensor_without_its_memory(op: str, role: str, left: int) -> None:
    """A storage that was resized under a tensor, as sharding does, is an error: it was a crash."""
    case = sample(running_sum=True)
    tensor = case.lists()[role][LAST]
    before = _copy(case, tensor)
    tensor.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=rf"{role}\[{LAST}\] must have its memory"):
        case.call(op)
    _same(case, before, tensor)


def test_tensor_at_an_offset_of_no_memory() -> None:
    """Without memory a view's address is its offset, which is not null."""
    case = sample()
    case.grads[LAST] = torch.zeros(10)[5:]
    case.grads[LAST].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"grads\[{LAST}\] must have its memory"):
        case.call("adam_cm_")


@pytest.mark.parametrize("op", OPS)
def test_tensor_on_the_meta_device_among_others(op: str) -> None:
    """One tensor on the meta device made a call do nothing, in silence."""
    case = sample(running_sum=True)
    tensors = case.lists()[READ[op][-1]]
    tensors[LAST] = tensors[LAST].to("meta")
    before = _copy(case, tensors[LAST])
    with pytest.raises(RuntimeError, match=r"all tensors must be on one device.*cpu.*meta"):
        case.call(op)
    _same(case, before, tensors[LAST])


def test_grown_state_is_seen() -> None:
    """A held tensor that grows in its own memory keeps its address: the others were overrun."""
    case = sample(shapes=((2,),))
    memory = torch.zeros(3_000_000)
    case.exp_avgs = [memory.resize_(2)]
    held = hold(case)
    step_held_([held], [case])
    memory.resize_(3_000_000)
    case.params, case.grads = ([torch.zeros(3_000_000)] for _ in range(2))
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[0\] must have shape \(3000000\)"):
        step_held_([held], [case])
    torch.ops.cm_fused.release_state(held)


@pytest.mark.parametrize("role", ["exp_avg_sqs", "critical_buffers", "critical_sums", "priorities"])
def test_shrunk_state_is_seen(role: str) -> None:
    """A held tensor that shrinks in place keeps its address too."""
    case = sample(running_sum=True)
    held = hold(case)
    step_held_([held], [case])
    case.lists()[role][LAST].resize_(1)
    before = _copy(case)
    with pytest.raises(RuntimeError, match=rf"{role}\[{LAST}\] must"):
        step_held_([held], [case])
    _same(case, before)
    torch.ops.cm_fused.release_state(held)


def test_moment_of_another_dtype_in_the_same_place_is_seen() -> None:
    """Momenta seen as codes need scales, which the state does not have: there were none to read."""
    case = sample(shapes=((8,),))
    case.exp_avgs = [torch.zeros(8)]
    held = hold(case)
    step_held_([held], [case])
    case.exp_avgs[0].data = case.exp_avgs[0].data.view(torch.int8)[:8]
    with pytest.raises(RuntimeError, match=r"exp_avg_sqs\[0\] must have dtype Char"):
        step_held_([held], [case])
    torch.ops.cm_fused.release_state(held)


@pytest.mark.parametrize(
    "make", [torch._neg_view, torch._efficientzerotensor], ids=["negated", "zeros"]
)
def test_state_of_implied_values_is_not_held(make: Any) -> None:
    """A copy would be held and changed by steps, or memory that is not there."""
    case = sample()
    tensor = case.exp_avg_sqs[LAST]
    case.exp_avg_sqs[LAST] = make(tensor if make is torch._neg_view else tensor.shape)
    with pytest.raises(RuntimeError, match="a state to be held must lie in memory"):
        hold(case)


@pytest.mark.parametrize("op", STEPS)
def test_step_that_no_integer_counts(op: str) -> None:
    """2^62 and more, whose conversion to an integer was undefined."""
    case = sample()
    case.steps[LAST].fill_(2.0**62)
    before = _copy(case)
    with pytest.raises(RuntimeError, match=rf"steps\[{LAST}\] must be below 2\^62"):
        case.call(op)
    _same(case, before)


@pytest.mark.parametrize("column", [Column.PRIORITIES, Column.SLOT, Column.STEP])
def test_table_without_an_address(column: Column) -> None:
    """A table that was not refreshed has zeros, which were written to."""
    keys, slot, step = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    rows = torch.zeros(2, WIDTH, dtype=torch.int64)
    for i in range(2):
        rows[i, Column.PRIORITIES] = keys[i].data_ptr()
        rows[i, Column.SLOT] = slot[i].data_ptr()
        rows[i, Column.STEP] = step[i].data_ptr()
    rows[1, column] = 0
    with pytest.raises(RuntimeError, match=rf"table\[1\] must have an address in column {column}"):
        torch.ops.cm_fused.update_priorities_(
            rows,
            torch.ones(2, dtype=torch.float64),
            None,
            None,
            capacity=3,
            priority_decay=0.7,
            group_scope=True,
        )
    assert not keys.any()
    assert not step.any()


_WITH_UNKNOWN_CAPABILITY = """
import torch
from tests.operators.test_ops import sample
case = sample(given_sq_norm=True)
before = [t.clone() for t in (*case.priorities, *case.steps)]
try:
    case.call("adam_cg_")
except RuntimeError as error:
    print(all(map(torch.equal, before, (*case.priorities, *case.steps))), error)
"""


def test_unknown_capability_changes_nothing() -> None:
    """With the norm given, critical gradients had kept the books when the kernel was looked for."""
    result = subprocess.run(
        [sys.executable, "-c", _WITH_UNKNOWN_CAPABILITY],
        env={**os.environ, "CM_FUSED_CPU_CAPABILITY": "none"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("True ")
    assert "CM_FUSED_CPU_CAPABILITY must name" in result.stdout


def test_threads_that_step_one_state_take_turns() -> None:
    """Operators run without Python's lock: what is known of a state was shared."""
    case = sample(shapes=tuple((1 + i % 7,) for i in range(1500)))
    held = hold(case)

    def step() -> None:
        for _ in range(20):
            step_held_([held], [case])

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.ops.cm_fused.release_state(held)
    assert {count.item() for count in case.steps} == {82.0}


@pytest.mark.parametrize("first", [0, 250])
def test_arguments_damaged_at_random(first: int) -> None:
    """A part of the campaign: an error with no bit changed, or the reference's result."""
    outcomes = {operators.run_case(seed) for seed in range(first, first + 250)}
    assert outcomes == {0, 1, 2}
