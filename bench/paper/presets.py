"""The paper's own settings of trained models, as hyperparameters of `bench.paper.contenders`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench.paper.contenders import MOMENTUM, Hyperparameters
from bench.paper.paper_numbers import TABLE_5, TABLES_6_TO_8

# Table 5's rates are ten apart.
_BETWEEN = (0.03, 0.003, 0.0003)


def hyperparameters(default: Hyperparameters, values: Mapping[str, Any]) -> Hyperparameters:
    """Return the default with some values replaced; those that are None are not."""
    return replace(default, **{k: v for k, v in values.items() if v is not None})


def tuned_settings(data: str, model: str) -> Mapping[str, Hyperparameters]:
    """Return each system's best setting of Tables 6 to 8 for a data set and a model."""
    return {
        system: hyperparameters(Hyperparameters(best.lr), best._asdict())
        for (of_data, of_model, system), best in TABLES_6_TO_8.items()
        if (of_data, of_model) == (data, model)
    }


def learning_rates(system: str, between: bool = False) -> tuple[float, ...]:
    """Return the learning rates that a system's search tries: as many for every system.

    Table 5 is for Adam's variants. SGD needs rates ten times as large.

    Args:
        system: A key of ``SYSTEMS``.
        between: Whether to add those between Table 5's four.
    """
    rates = (*TABLE_5["lr"], *(_BETWEEN if between else ()))
    return tuple(10 * rate for rate in rates) if system == MOMENTUM else rates
