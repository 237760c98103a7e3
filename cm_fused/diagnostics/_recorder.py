"""Recording a live optimizer's buffers, to CSV and TensorBoard."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from cm_fused.diagnostics._history import HISTORY, Buffers, Moves
from cm_fused.diagnostics._reading import QUANTITIES, combined, critical, quantities

ALL = "all"
_COLUMNS = (*QUANTITIES, *HISTORY)
_NOTHING = (float("nan"),) * 3


class Recorder:
    """Records `Reading` and `History` of a live optimizer, to a CSV file and to TensorBoard.

    It follows every step through a step hook of the optimizer, and records every ``every`` steps:
    one row for each parameter that has a buffer or whose capacity is 0, and one named "all".

    A step costs one small operator more and waits for no device; with DTensors it waits for the sum
    of the norms over processes. Each record waits for the device, and so does every 256th step
    between two records. Parameters are copied twice, for the distance and for the last update.
    Measured on one core of an EPYC: for a network of 4 tensors and 9,610 elements a step takes 21
    us, its hook 3 us and a record 0.4 ms; for 16 tensors and 33,280 elements 39 us, 5 us and 1.0
    ms; for 4 M elements about 4 ms, too little to measure and 85 ms. By these figures the steps
    take 20 to 45 percent longer with ``every=100``, and training as a whole less.

    Key ages are found by comparing keys before and after a step. Slots that were filled when the
    recording began, or when a state dict was loaded, count from then on. With
    ``priority_decay=0`` keys say nothing, and every step with a gradient counts as an admission.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Its results do not
            change.
        path: The CSV file to write, or None. A file that exists is replaced: give a resumed run
            another one.
        every: Steps between records, >= 1.
        names: The parameters with their names, as `model.named_parameters()` yields them. No two
            parameters have one name, and none is named "all". Others are numbered.
        tensorboard: Folder for TensorBoard, or None.

    Raises:
        TypeError: The optimizer has no critical buffer.
        ValueError: ``every`` is not an int >= 1, or two of the ``names`` are the same or one is
            "all".
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
        self._optimizer = critical(optimizer)
        self._every = every
        self._names = _names_of(names)
        self._writer = None if tensorboard is None else _summary_writer(tensorboard)
        # Open as long as the recorder is: a run is long, and may be cut off.
        self._file = None if path is None else Path(path).open("w", newline="")  # noqa: SIM115
        self._csv: Any = None  # a writer, whose type has no public name
        self._buffers, self._moves = Buffers(self._optimizer), Moves(self._optimizer)
        self._follow_params()
        if every == 1:
            self._moves.remember()
        self.step = 0
        self.last: dict[str, dict[str, float]] = {}
        self._hooks = [
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _follow_params(self) -> None:
        """Name and follow the parameters that the optimizer has now."""
        groups = self._optimizer.param_groups
        params = list(chain.from_iterable(group["params"] for group in groups))
        self._num_params = len(params)
        self._moves.begin(params)
        taken = set(self._names.values())
        for i, param in enumerate(params):
            if param not in self._names:
                # Groups come and go, and names may be numbers.
                name = next(name for name in map(str, count(i)) if name not in taken)
                self._names[param] = name
                taken.add(name)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if sum(len(group["params"]) for group in self._optimizer.param_groups) != self._num_params:
            self._follow_params()
        self._buffers.note()
        since_last = self.step % self._every
        if since_last == 0:
            self._record(is_step=True)
        if since_last == self._every - 1 or self._every == 1:
            self._moves.remember()
        else:
            self._moves.forget()

    def _after_load(self, optimizer: Optimizer) -> None:
        """Follow the loaded buffers: their slots are no admissions of the next step."""
        self._buffers.follow()

    def record(self) -> dict[str, dict[str, float]]:
        """Record now; return the quantities of `Reading` and `History` by parameter name."""
        return self._record(is_step=False)

    def _record(self, *, is_step: bool) -> dict[str, dict[str, float]]:
        """Record; `is_step`: at the end of a step."""
        self._follow_params()
        params, readings = quantities(self._optimizer)
        of_buffers, moves = self._buffers.take(), self._moves.take(params, is_step)
        rows: dict[str, Sequence[float]] = {
            self._names[param]: (*reading, *of_buffers.get(param, _NOTHING), *move)
            for param, reading, move in zip(params, readings, moves, strict=True)
        }
        rows[ALL] = combined(_COLUMNS, list(rows.values()), [param.numel() for param in params])
        self._write(rows)
        self.last = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in rows.items()}
        return self.last

    def _write(self, rows: Mapping[str, Sequence[float]]) -> None:
        if self._file is not None:
            if self._csv is None:
                self._csv = csv.writer(self._file)
                self._csv.writerow(["step", "parameter", *_COLUMNS])
            self._csv.writerows([self.step, name, *row] for name, row in rows.items())
            self._file.flush()
        if self._writer is not None:
            for name, row in rows.items():
                for quantity, value in zip(_COLUMNS, row, strict=True):
                    self._writer.add_scalar(f"{quantity}/{name}", value, self.step)

    def close(self) -> None:
        """Stop recording and close the files; more calls do nothing."""
        for hook in self._hooks:
            hook.remove()
        for output in (self._file, self._writer):
            if output is not None:
                output.close()
        self._file = self._writer = None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _names_of(pairs: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Return the names of parameters, each of which is that of a row."""
    params: dict[str, Tensor] = {}
    names: dict[Tensor, str] = {}
    for name, param in pairs:
        if name == ALL:
            raise ValueError(f"names must not have {ALL!r}, the row of all parameters together")
        if params.setdefault(name, param) is not param:
            raise ValueError(
                f"names must differ, got {name!r} for two parameters; of several models, use "
                "model.named_parameters(prefix=...)"
            )
        names[param] = name
    return names


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard needs the package of that name: pip install tensorboard, or leave "
            "tensorboard=None and read the CSV file"
        ) from error
    return SummaryWriter(str(folder))
