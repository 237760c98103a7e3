"""The paper's own settings of trained models, as hyperparameters of `bench.paper.contenders`."""

from collections.abc import Mapping

from bench.paper.contenders import MOMENTUM, Hyperparameters
from bench.paper.paper_numbers import TABLE_5, TABLES_6_TO_8


def tuned_settings(data: str, model: str) -> Mapping[str, Hyperparameters]:
    """Return each system's best setting of Tables 6 to 8 for a data set and a model."""
    return {
        system: Hyperparameters(**{k: v for k, v in best._asdict().items() if v is not None})
        for (of_data, of_model, system), best in TABLES_6_TO_8.items()
        if (of_data, of_model) == (data, model)
    }


def learning_rates(system: str) -> tuple[float, ...]:
    """Return the learning rates that a system's search tries: Table 5's, four for every system.

    Table 5 is for Adam's variants. SGD needs rates ten times as large, and has as many.
    """
    if system == MOMENTUM:
        return tuple(10 * rate for rate in TABLE_5["lr"])
    return TABLE_5["lr"]
