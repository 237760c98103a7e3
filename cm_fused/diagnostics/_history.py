"""The history of an optimizer's critical buffers and parameters."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm_fused._distributed import is_sharded, local
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.tracking import OptimizerState
from cm_fused.diagnostics._reading import flat
from cm_fused.master_params import master_of

# Steps whose keys are noted on the device before the host looks at them.
_MAX_NOTES = 256
_NAN = float("nan")


@dataclass(frozen=True)
class History:
    """The history of some parameters up to a step.

    With ``low_precision_update="split"`` bfloat16 parameters are followed by their float32 masters.

    Attributes:
        mean_age: Steps since a filled slot was admitted, mean over the slots; 0 for the last step.
        max_age: The age of the oldest slot.
        admission_rate: Share of the steps since the last record in which something was admitted.
        distance: L2 distance from where the parameters were when recording began.
        update_rms: Root mean square of the last step's change of the parameters, weight decay
            included. NaN at a `record()` by hand.
    """

    mean_age: float
    max_age: float
    admission_rate: float
    distance: float
    update_rms: float


HISTORY = tuple(field.name for field in fields(History))


class _Followed(NamedTuple):
    """The history of one parameter's buffer so far, on the CPU."""

    keys: Tensor  # float32 (C,), after the last step looked at
    step: Tensor  # float32 (), the parameter's steps until then
    taken: Tensor  # int64 (), the steps it took part in since it is followed
    births: Tensor  # int64 (C,), what `taken` was when each slot was admitted
    admissions: Tensor  # int64 (), since the last `Buffers.take`
    seen: Tensor  # int64 (), what `taken` was then

    @classmethod
    def begin(cls, keys: Tensor, count: Tensor) -> "_Followed":
        """Return a buffer whose filled slots are of age 0."""
        keys, count = (tensor.detach().cpu().clone() for tensor in (keys, count))
        zero = torch.zeros((), dtype=torch.int64, device="cpu")
        return cls(keys, count, zero, torch.zeros_like(keys, dtype=torch.int64), zero, zero)

    def resized(self, capacity: int) -> "_Followed":
        """Return the buffer itself, or an empty one of another capacity."""
        if len(self.keys) == capacity:
            return self
        keys = torch.full((capacity,), -torch.inf, dtype=self.keys.dtype, device="cpu")
        return self._replace(keys=keys, births=self.taken.repeat(capacity))


class _Block:
    """Buffers of one device and capacity, which are followed in a few operations.

    Lists and tensors have an item for each parameter.
    """

    def __init__(
        self,
        params: list[Tensor],
        tensors: list[Tensor],
        decays: list[float],
        followed: list[_Followed],
    ) -> None:
        self.params = params
        # Views of the live keys, then of the step counts.
        self._tensors = tensors
        self._decays = torch.tensor(decays, dtype=torch.float32, device="cpu")
        # With a decay of 0 all keys are 0 after a step, and any gradient but zero is admitted.
        self._always = self._decays == 0 if 0.0 in decays else None
        columns = _Followed(*map(torch.stack, zip(*followed, strict=True)))
        self._shape = columns.keys.shape
        self._taken, self._births = columns.taken, columns.births
        self._admissions, self._seen = columns.admissions, columns.seen
        # Keys and counts after the last step looked at, and on their device after those since then.
        self._last = torch.cat([columns.keys.flatten(), columns.step])
        self._notes = [self._last.to(tensors[0].device)]

    def note(self) -> None:
        """Copy the keys and counts after a step, on their device."""
        self._notes.append(torch.cat(self._tensors))

    def process(self) -> None:
        """Find what the noted steps admitted, from the keys before and after each."""
        if len(self._notes) == 1:
            return
        notes = torch.stack(self._notes).cpu()
        self._notes, self._last = self._notes[-1:], notes[-1]
        size = self._shape.numel()
        keys, counts = notes[:, :size].view(-1, *self._shape), notes[:, size:]
        # A parameter without a gradient took no part: its keys did not decay.
        took_part = counts[1:] != counts[:-1]
        # Only the smallest key can be replaced, the first of equal ones; unfilled slots have -inf.
        before, slots = keys[:-1].min(-1, keepdim=True)
        after, before = keys[1:].gather(-1, slots).squeeze(-1), before.squeeze(-1)
        decayed = before * self._decays
        if self._always is None:
            admitted = after != decayed
        else:
            decayed = torch.where(before > -torch.inf, decayed, before)
            admitted = (after != decayed) | (self._always & (decayed > -torch.inf))
        admitted &= took_part
        taken = took_part.cumsum(0).add_(self._taken)
        births = (taken * admitted).T
        self._births = self._births.scatter_reduce(1, slots.squeeze(-1).T, births, "amax")
        self._taken = taken[-1]
        self._admissions = self._admissions + admitted.sum(0)

    def followed(self) -> dict[Tensor, _Followed]:
        """Return what is known of each parameter's buffer."""
        size = self._shape.numel()
        known = _Followed(
            self._last[:size].view(self._shape),
            self._last[size:],
            self._taken,
            self._births,
            self._admissions,
            self._seen,
        )
        rows = zip(*(tensor.unbind() for tensor in known), strict=True)
        return {param: _Followed(*row) for param, row in zip(self.params, rows, strict=True)}

    def take(self) -> Iterator[tuple[Tensor, tuple[float, float, float]]]:
        """Yield each parameter with mean age, largest age and admission rate; count these anew."""
        taken, admissions, seen = torch.stack([self._taken, self._admissions, self._seen]).tolist()
        births, keys = self._births.tolist(), self._last.tolist()
        capacity = self._shape[1]
        for i, param in enumerate(self.params):
            slots = zip(keys[i * capacity : (i + 1) * capacity], births[i], strict=True)
            ages = [taken[i] - birth for key, birth in slots if key > -math.inf]
            steps = taken[i] - seen[i]
            mean, largest = (sum(ages) / len(ages), float(max(ages))) if ages else (_NAN, _NAN)
            yield param, (mean, largest, admissions[i] / steps if steps else _NAN)
        self._admissions, self._seen = torch.zeros_like(self._admissions), self._taken


class Buffers:
    """Follows the keys of an optimizer's buffers from step to step."""

    def __init__(self, optimizer: CriticalAdam) -> None:
        self._optimizer = optimizer
        self._blocks: list[_Block] = []
        self.follow()

    def follow(self) -> None:
        """Begin anew with the state that there is: its slots are filled now."""
        self._optimizer._finish_step()
        self._process()
        known = self._followed()
        for param, state in self._states():
            earlier = known.get(param)
            begun = _Followed.begin(state["priorities"], state["step"])
            if earlier is not None:
                seen = earlier.seen - earlier.taken
                begun = begun._replace(admissions=earlier.admissions, seen=seen)
            known[param] = begun
        self._rebuild(known)

    def note(self) -> None:
        """Note the keys after a step; nothing waits for a device, except every 256th time.

        Keys of DTensors are known once the norms have been added up over processes.
        """
        self._optimizer._finish_step()
        if self._has_changed():
            self._process()
            self._rebuild(self._followed())
        for block in self._blocks:
            block.note()
        self._num_notes += 1
        if self._num_notes >= _MAX_NOTES:
            self._process()

    def take(self) -> dict[Tensor, tuple[float, float, float]]:
        """Return mean age, largest age and admission rate since the last call, by parameter."""
        self._process()
        return {param: numbers for block in self._blocks for param, numbers in block.take()}

    def _states(self) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                state = self._optimizer.state.get(param, {})
                if "priorities" in state and "step" in state:
                    yield param, state

    def _process(self) -> None:
        for block in self._blocks:
            block.process()
        self._num_notes = 0

    def _followed(self) -> dict[Tensor, _Followed]:
        return {p: row for block in self._blocks for p, row in block.followed().items()}

    def _has_changed(self) -> bool:
        """Return whether a tensor of the state may be another, or a group's decay."""
        state: Any = self._optimizer.state
        decays = [group["priority_decay"] for group in self._optimizer.param_groups]
        is_known = state is self._state and self._changes is not None
        return not is_known or state.changes.count != self._changes or decays != self._decays

    def _rebuild(self, known: dict[Tensor, _Followed]) -> None:
        """Make the blocks of the parameters that have a buffer now, from what is known of them."""
        decays = {
            param: group["priority_decay"]
            for group in self._optimizer.param_groups
            for param in group["params"]
        }
        members: dict[tuple[torch.device, int], list[tuple[Tensor, dict[str, Any]]]] = {}
        for param, state in self._states():
            keys = state["priorities"]
            members.setdefault((keys.device, len(keys)), []).append((param, state))
        self._blocks = []
        for (_, capacity), pairs in members.items():
            keys = [state["priorities"].detach() for _, state in pairs]
            counts = [state["step"].detach().reshape(1) for _, state in pairs]
            # A new buffer was empty, and its parameter has taken the step.
            number = torch.full((), -1.0, dtype=torch.float32, device="cpu")
            empty = _Followed.begin(number.new_empty(0), number)
            followed = [known.get(param, empty).resized(capacity) for param, _ in pairs]
            params = [param for param, _ in pairs]
            of_params = [float(decays[param]) for param in params]
            self._blocks.append(_Block(params, [*keys, *counts], of_params, followed))
        self._remember()

    def _remember(self) -> None:
        state: Any = self._optimizer.state
        self._state = state
        self._decays = [group["priority_decay"] for group in self._optimizer.param_groups]
        counts = isinstance(state, OptimizerState)
        counts = counts and all(state.tracks(param) for param, _ in self._states())
        # None where nobody counts.
        self._changes: int | None = state.changes.count if counts else None


class Moves:
    """Follows the parameters, or their float32 masters, from where they were."""

    def __init__(self, optimizer: CriticalAdam) -> None:
        self._optimizer = optimizer
        self._starts: dict[Tensor, Tensor] = {}
        self._befores: dict[Tensor, Tensor] = {}
        self._has_befores = False

    def begin(self, params: Iterable[Tensor]) -> None:
        """Remember where the parameters are that are not followed yet."""
        for param in params:
            if param not in self._starts:
                self._starts[param] = self._value(param).clone()

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the parameters before a step that will be recorded."""
        known = self._befores
        params = [param for param in self._starts if param.requires_grad or param in known]
        values = {param: self._value(param) for param in params}
        # A parameter has a master from its first step on.
        if any(param not in known or known[param].dtype != v.dtype for param, v in values.items()):
            self._befores = {param: torch.empty_like(value) for param, value in values.items()}
        befores = [self._befores[param] for param in values]
        for targets, sources in _in_lists(befores, list(values.values())):
            torch._foreach_copy_(targets, sources)
        self._has_befores = True

    def _value(self, param: Tensor) -> Tensor:
        """Return a copy of a parameter's master, or the parameter itself if it has none."""
        state: Any = self._optimizer.state
        master = master_of(param, state.get(param, {}))
        return param.detach() if master is None else master

    def forget(self) -> None:
        """Do not take what was remembered for the place before a later step."""
        self._has_befores = False

    def take(self, params: Sequence[Tensor], is_step: bool) -> list[tuple[float, float]]:
        """Return each parameter's distance from its start, and its RMS change in the last step.

        That is known at the end of the step, `is_step`, if `remember` was called at its beginning.
        """
        values = list(map(self._value, params))
        distances = _distances(values, list(map(self._starts.get, params)))
        lengths = [_NAN] * len(params)
        if is_step and self._has_befores:
            lengths = _distances(values, list(map(self._befores.get, params)))
        return [
            (distance, length / max(param.numel(), 1) ** 0.5)
            for param, distance, length in zip(params, distances, lengths, strict=True)
        ]


@torch.no_grad()
def _distances(values: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[float]:
    """Return the L2 distances of values from others, NaN where there is none."""
    result = [_NAN] * len(values)
    plain: dict[Any, tuple[list[int], list[Tensor], list[Tensor]]] = {}
    for i, (value, other) in enumerate(zip(values, others, strict=True)):
        if other is None:
            continue
        if is_sharded(value) or value.is_complex():
            difference: Any = value - other
            if is_sharded(difference):  # whose uneven shards torch does not flatten
                difference = difference.full_tensor()
            result[i] = torch.linalg.vector_norm(flat(difference, 0)).item()
            continue
        indices, now, before = plain.setdefault((value.device, value.dtype), ([], [], []))
        indices.append(i)
        now.append(value)
        before.append(other)
    for (_, dtype), (indices, now, before) in plain.items():
        dtype = torch.promote_types(dtype, torch.float32)
        norms = torch._foreach_norm(torch._foreach_sub(now, before), dtype=dtype)
        # One copy to the host for all of them.
        for i, norm in zip(indices, torch.stack(norms).tolist(), strict=True):
            result[i] = norm
    return result


def _in_lists(
    tensors: Sequence[Tensor], others: Sequence[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return pairs of lists of local tensors by device and dtype, for multi-tensor kernels."""
    lists: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, other in zip(tensors, others, strict=True):
        kind = tensor.device, tensor.dtype
        for each, into in zip((tensor, other), lists.setdefault(kind, ([], [])), strict=True):
            into.append(local(each))
    return list(lists.values())
