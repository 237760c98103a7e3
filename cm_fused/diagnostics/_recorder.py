"""Recording a live optimizer's buffers, to CSV and TensorBoard."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from cm_fused.diagnostics._history import History, Track
from cm_fused.diagnostics._reading import Reading, combined, critical, read

ALL = "all"


class Recorder:
    """Records `Reading` and `History` of a live optimizer, to a CSV file and to TensorBoard.

    It follows every step through a step hook of the optimizer, and records every ``every`` steps:
    one row for each parameter that has a buffer, and one named "all". Each step waits for the
    device once; parameters are copied once, for the distance.

    Key ages are found by comparing keys before and after a step. Slots that were filled when the
    recording began, or when a state dict was loaded, count from then on. With
    ``priority_decay=0`` keys say nothing, and every step with a gradient counts as an admission.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Its results do not
            change.
        path: The CSV file to write, or None.
        every: Steps between records, >= 1.
        names: The parameters with their names, as `model.named_parameters()` yields them. Others
            are numbered.
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
        self._optimizer = critical(optimizer)
        self._every = every
        self._names = {param: name for name, param in names}
        self._writer = None if tensorboard is None else _summary_writer(tensorboard)
        # Open as long as the recorder is: a run is long, and may be cut off.
        self._file = None if path is None else Path(path).open("w", newline="")  # noqa: SIM115
        self._csv: csv.DictWriter[str] | None = None
        self._tracks: dict[Tensor, Track] = {}
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                self._begin_track(param, *self._keys_and_count(param))
        self.step = 0
        self.last: dict[str, dict[str, float]] = {}
        self._hooks = [
            self._optimizer.register_step_post_hook(self._after_step),
            self._optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def _begin_track(self, param: Tensor, keys: Tensor | None, count: float) -> None:
        self._names.setdefault(param, str(len(self._tracks)))
        self._tracks[param] = Track(param, keys, count)

    def _keys_and_count(self, param: Tensor) -> tuple[Tensor | None, float]:
        """Return a parameter's keys, (C,) on the CPU, and the number of its steps."""
        state = self._optimizer.state.get(param, {})
        keys = state.get("priorities")
        return None if keys is None else keys.detach().cpu().clone(), float(state.get("step", 0))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param not in self._tracks:
                    self._begin_track(param, None, 0.0)
                keys, count = self._keys_and_count(param)
                self._tracks[param].update(keys, count, group["priority_decay"])
        if self.step % self._every == 0:
            self.record()

    def _after_load(self, optimizer: Optimizer) -> None:
        """Follow the loaded buffers: their slots are no admissions of the next step."""
        for param, track in self._tracks.items():
            track.follow(*self._keys_and_count(param))

    def record(self) -> dict[str, dict[str, float]]:
        """Record now; return the quantities of `Reading` and `History` by parameter name."""
        readings = read(self._optimizer)
        histories = {param: self._tracks[param].history(param) for param in readings}
        self.last = {
            self._names[param]: {**asdict(readings[param]), **asdict(histories[param])}
            for param in readings
        }
        self.last[ALL] = {**combined(Reading, readings), **combined(History, histories)}
        for name, quantities in self.last.items():
            self._write(name, quantities)
        if self._file is not None:
            self._file.flush()
        return self.last

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


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard needs the package of that name: pip install tensorboard, or leave "
            "tensorboard=None and read the CSV file"
        ) from error
    return SummaryWriter(str(folder))
