"""The golden cases: runs worked out in float64, stored under ``data/golden`` (see its README)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

GOLDEN_DIR = Path(__file__).parents[1] / "data" / "golden"

CASES: list[str] = [
    "adamw_c20",
    "critical_gradients",
    "critical_gradients_group_c20",
    "defaults",
    "l2_amsgrad_maximize",
    "lr_schedule",
    "mean_size_eps_outside",
    "missing_grads",
    "tensor_scope_c3",
    "zero_grads_ties",
]

_NUM_PARAMS = 5


@dataclass(frozen=True)
class GoldenCase:
    """One case. Lists run over the parameters unless said otherwise.

    Attributes:
        name: The file's stem.
        kind: "cm" for critical momenta, "cg" for critical gradients.
        options: The constructor's keywords.
        steps: How many steps the run takes.
        lrs: The learning rate of every step.
        params0: The initial parameters, float32.
        grads: ``grads[t][i]``, float32; None where parameter i has no gradient at step t.
        params: The parameters after every step, (steps, *shape); of the first three only.
        final_params, final_exp_avgs, final_exp_avg_sqs: After the last step.
        final_slots: The filled slots, (filled, *shape), in slot order.
        final_keys: Their keys, (filled,), float32.
        final_steps: How many steps each parameter took part in.
    """

    name: str
    kind: Literal["cm", "cg"]
    options: dict[str, Any]
    steps: int
    lrs: list[float]
    params0: list[NDArray[np.float32]]
    grads: list[list[NDArray[np.float32] | None]]
    params: list[NDArray[np.float64]]
    final_params: list[NDArray[np.float64]]
    final_exp_avgs: list[NDArray[np.float64]]
    final_exp_avg_sqs: list[NDArray[np.float64]]
    final_slots: list[NDArray[np.float64]]
    final_keys: list[NDArray[np.float32]]
    final_steps: list[int]


def load_case(name: str) -> GoldenCase:
    """Read one of `CASES`."""
    with np.load(GOLDEN_DIR / f"{name}.npz") as stored:
        arrays: dict[str, NDArray[Any]] = {key: stored[key] for key in stored.files}
    options: dict[str, Any] = json.loads(str(arrays["config"]))
    options["betas"] = tuple(options["betas"])
    kind = options.pop("kind")
    steps = options.pop("steps")
    lrs = options.pop("lrs")

    def per_param(prefix: str) -> list[NDArray[Any]]:
        return [arrays[f"{prefix}_{i}"] for i in range(_NUM_PARAMS)]

    return GoldenCase(
        name=name,
        kind=kind,
        options=options,
        steps=steps,
        lrs=[options["lr"]] * steps if lrs is None else lrs,
        params0=per_param("param0"),
        grads=[[arrays.get(f"grad_{t}_{i}") for i in range(_NUM_PARAMS)] for t in range(steps)],
        params=[arrays[f"params_{i}"] for i in range(3)],
        final_params=per_param("final_param"),
        final_exp_avgs=per_param("final_exp_avg"),
        final_exp_avg_sqs=per_param("final_exp_avg_sq"),
        final_slots=per_param("final_slots"),
        final_keys=[_as_float32(keys) for keys in per_param("final_keys")],
        final_steps=[int(step) for step in per_param("final_step")],
    )


def _as_float32(keys: NDArray[np.float64]) -> NDArray[np.float32]:
    rounded = keys.astype(np.float32)
    if not np.array_equal(rounded, keys):
        raise ValueError(f"stored keys must be float32 numbers, got {keys!r}")
    return rounded
