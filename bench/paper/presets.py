"""The paper's own settings of trained models: its grid (Table 5) and its best (Tables 6 to 8)."""

from bench.paper.contenders import MOMENTUM, Hyperparameters

# Table 5.
TABLE_5: dict[str, tuple[float, ...]] = {
    "lr": (0.1, 0.01, 0.001, 0.0001),
    "beta1": (0.9, 0.99, 0.999),
    "beta2": (0.99, 0.999, 0.9999),
    "capacity": (5, 20),
    "priority_decay": (0.7, 0.99),
    "rho": (0.01, 0.05, 0.1),
}

# Tables 6, 7 and 8, by task. In the paper the beta2 of Adam+SAM on Penn Treebank is 0.9, which is
# not in Table 5.
TUNED: dict[str, dict[str, Hyperparameters]] = {
    "lstm-ptb": {
        "Adam": Hyperparameters(0.001, 0.9, 0.99),
        "Adam+CG": Hyperparameters(0.001, 0.9, 0.999, 5, 0.7),
        "Adam+SAM": Hyperparameters(0.001, 0.9, 0.9, rho=0.01),
        "Adam+CM": Hyperparameters(0.001, 0.9, 0.999, 5, 0.7),
        "Adam+SAM+CM": Hyperparameters(0.001, 0.9, 0.999, 5, 0.7, 0.1),
    },
    "resnet34-cifar10": {
        "Adam": Hyperparameters(0.001, 0.9, 0.999),
        "Adam+CG": Hyperparameters(0.0001, 0.9, 0.999, 20, 0.7),
        "Adam+SAM": Hyperparameters(0.0001, 0.9, 0.99, rho=0.05),
        "Adam+CM": Hyperparameters(0.0001, 0.9, 0.999, 20, 0.99),
        "Adam+SAM+CM": Hyperparameters(0.0001, 0.9, 0.99, 20, 0.99, 0.05),
    },
    "wrn-cifar10": {
        "Adam": Hyperparameters(0.01, 0.9, 0.999),
        "Adam+CG": Hyperparameters(0.001, 0.9, 0.99, 20, 0.7),
        "Adam+SAM": Hyperparameters(0.01, 0.9, 0.9999, rho=0.1),
        "Adam+CM": Hyperparameters(0.001, 0.9, 0.999, 5, 0.7),
        "Adam+SAM+CM": Hyperparameters(0.001, 0.9, 0.9999, 20, 0.7, 0.1),
    },
    "resnet34-cifar100": {
        "Adam": Hyperparameters(0.0001, 0.9, 0.9999),
        "Adam+CG": Hyperparameters(0.0001, 0.9, 0.9999, 20, 0.7),
        "Adam+SAM": Hyperparameters(0.0001, 0.9, 0.999, rho=0.1),
        "Adam+CM": Hyperparameters(0.0001, 0.9, 0.999, 20, 0.99),
        "Adam+SAM+CM": Hyperparameters(0.0001, 0.9, 0.9999, 20, 0.7, 0.05),
    },
    "wrn-cifar100": {
        "Adam": Hyperparameters(0.001, 0.9, 0.99),
        "Adam+CG": Hyperparameters(0.001, 0.9, 0.99, 20, 0.7),
        "Adam+SAM": Hyperparameters(0.001, 0.9, 0.999, rho=0.05),
        "Adam+CM": Hyperparameters(0.001, 0.9, 0.9999, 5, 0.7),
        "Adam+SAM+CM": Hyperparameters(0.001, 0.9, 0.99, 5, 0.7, 0.1),
    },
}


def learning_rates(system: str) -> tuple[float, ...]:
    """Return the learning rates that a system's search tries: Table 5's, four for every system.

    Table 5 is for Adam's variants. SGD needs rates ten times as large, and has as many.
    """
    if system == MOMENTUM:
        return tuple(10 * rate for rate in TABLE_5["lr"])
    return TABLE_5["lr"]
