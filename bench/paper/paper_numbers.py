"""The paper's own numbers: Malviya et al., "Promoting Exploration in Memory-Augmented Adam using
Critical Momenta".

Tables are named as in the paper. Systems have the names of `bench.paper.systems.SYSTEMS`.
"""  # noqa: D205

from typing import NamedTuple


class LossSharpness(NamedTuple):
    """Final loss and largest Hessian eigenvalue, means over 20 seeds; no spread is given."""

    loss: float
    sharpness: float


class Accuracy(NamedTuple):
    """Best validation accuracy in %, mean and spread of 3 runs; the spread's kind is not given."""

    mean: float
    spread: float


class Best(NamedTuple):
    """The best hyperparameters of a system; None where the system does not have it."""

    lr: float
    beta1: float
    beta2: float
    capacity: int | None = None
    priority_decay: float | None = None
    rho: float | None = None


# The table inside Fig. 5: C = 20, λ = 0.99.
FIGURE_5 = {
    ("Goldstein-Price", "Adam"): LossSharpness(0.86, 1.49),
    ("Goldstein-Price", "Adam+SAM"): LossSharpness(3.14, 1.43),
    ("Goldstein-Price", "Adam+CG"): LossSharpness(0.85, 1.51),
    ("Goldstein-Price", "Adam+CM"): LossSharpness(0.81, 1.36),
    ("Levy", "Adam"): LossSharpness(13.87, 65.65),
    ("Levy", "Adam+SAM"): LossSharpness(13.87, 65.62),
    ("Levy", "Adam+CG"): LossSharpness(13.61, 64.45),
    ("Levy", "Adam+CM"): LossSharpness(12.50, 62.53),
}

# Levy; system, C, λ.
TABLE_2 = {
    ("Adam+CG", 5, 0.7): LossSharpness(14.40, 64.72),
    ("Adam+CG", 5, 0.99): LossSharpness(14.41, 64.67),
    ("Adam+CG", 20, 0.99): LossSharpness(13.61, 64.45),
    ("Adam+CM", 5, 0.7): LossSharpness(12.90, 63.74),
    ("Adam+CM", 5, 0.99): LossSharpness(13.02, 63.83),
    ("Adam+CM", 20, 0.99): LossSharpness(12.50, 62.53),
}

_COLUMNS = (
    ("CIFAR-10", "ResNet34"),
    ("CIFAR-10", "WRN-1"),
    ("CIFAR-100", "ResNet34"),
    ("CIFAR-100", "WRN-1"),
)
# Whether the hyperparameters were searched; system; one accuracy for each of the columns.
_TABLE_1 = {
    (False, "Adam"): ((93.6, 4.1), (90.5, 1.1), (69.6, 0.5), (61.9, 0.4)),
    (False, "Adam+CG"): ((93.3, 1.6), (89.7, 1.4), (69.3, 0.2), (62.2, 1.0)),
    (False, "Adam+SAM"): ((93.6, 4.4), (90.3, 3.5), (69.5, 0.1), (62.1, 0.3)),
    (False, "Adam+CM"): ((93.7, 2.4), (90.7, 2.4), (69.8, 1.4), (61.7, 0.3)),
    (False, "Adam+SAM+CM"): ((93.4, 5.3), (91.0, 1.3), (68.2, 0.1), (63.1, 0.2)),
    (True, "Adam"): ((93.9, 0.3), (91.1, 0.6), (70.7, 0.3), (62.8, 0.3)),
    (True, "Adam+CG"): ((93.8, 0.4), (90.6, 0.3), (71.0, 0.3), (63.4, 0.5)),
    (True, "Adam+SAM"): ((93.7, 2.6), (90.5, 3.8), (70.5, 0.4), (62.4, 0.5)),
    (True, "Adam+CM"): ((94.0, 0.3), (91.5, 0.1), (71.2, 0.3), (63.6, 0.6)),
    (True, "Adam+SAM+CM"): ((94.5, 2.3), (91.7, 2.0), (69.7, 0.3), (63.1, 0.5)),
}
# Whether the hyperparameters were searched, system, data set, model.
TABLE_1 = {
    (*row, *column): Accuracy(*accuracy)
    for row, accuracies in _TABLE_1.items()
    for column, accuracy in zip(_COLUMNS, accuracies, strict=True)
}

# The grid.
TABLE_5: dict[str, tuple[float, ...]] = {
    "lr": (0.1, 0.01, 0.001, 0.0001),
    "beta1": (0.9, 0.99, 0.999),
    "beta2": (0.99, 0.999, 0.9999),
    "capacity": (5, 20),
    "priority_decay": (0.7, 0.99),
    "rho": (0.01, 0.05, 0.1),
}

# Best of the grid; data set, model, system. β2 = 0.9 of Adam+SAM on PTB is not in the grid.
TABLES_6_TO_8 = {
    ("PTB", "LSTM", "Adam"): Best(0.001, 0.9, 0.99),
    ("PTB", "LSTM", "Adam+CG"): Best(0.001, 0.9, 0.999, 5, 0.7),
    ("PTB", "LSTM", "Adam+SAM"): Best(0.001, 0.9, 0.9, rho=0.01),
    ("PTB", "LSTM", "Adam+CM"): Best(0.001, 0.9, 0.999, 5, 0.7),
    ("PTB", "LSTM", "Adam+SAM+CM"): Best(0.001, 0.9, 0.999, 5, 0.7, 0.1),
    ("CIFAR-10", "ResNet34", "Adam"): Best(0.001, 0.9, 0.999),
    ("CIFAR-10", "ResNet34", "Adam+CG"): Best(0.0001, 0.9, 0.999, 20, 0.7),
    ("CIFAR-10", "ResNet34", "Adam+SAM"): Best(0.0001, 0.9, 0.99, rho=0.05),
    ("CIFAR-10", "ResNet34", "Adam+CM"): Best(0.0001, 0.9, 0.999, 20, 0.99),
    ("CIFAR-10", "ResNet34", "Adam+SAM+CM"): Best(0.0001, 0.9, 0.99, 20, 0.99, 0.05),
    ("CIFAR-10", "WRN-1", "Adam"): Best(0.01, 0.9, 0.999),
    ("CIFAR-10", "WRN-1", "Adam+CG"): Best(0.001, 0.9, 0.99, 20, 0.7),
    ("CIFAR-10", "WRN-1", "Adam+SAM"): Best(0.01, 0.9, 0.9999, rho=0.1),
    ("CIFAR-10", "WRN-1", "Adam+CM"): Best(0.001, 0.9, 0.999, 5, 0.7),
    ("CIFAR-10", "WRN-1", "Adam+SAM+CM"): Best(0.001, 0.9, 0.9999, 20, 0.7, 0.1),
    ("CIFAR-100", "ResNet34", "Adam"): Best(0.0001, 0.9, 0.9999),
    ("CIFAR-100", "ResNet34", "Adam+CG"): Best(0.0001, 0.9, 0.9999, 20, 0.7),
    ("CIFAR-100", "ResNet34", "Adam+SAM"): Best(0.0001, 0.9, 0.999, rho=0.1),
    ("CIFAR-100", "ResNet34", "Adam+CM"): Best(0.0001, 0.9, 0.999, 20, 0.99),
    ("CIFAR-100", "ResNet34", "Adam+SAM+CM"): Best(0.0001, 0.9, 0.9999, 20, 0.7, 0.05),
    ("CIFAR-100", "WRN-1", "Adam"): Best(0.001, 0.9, 0.99),
    ("CIFAR-100", "WRN-1", "Adam+CG"): Best(0.001, 0.9, 0.99, 20, 0.7),
    ("CIFAR-100", "WRN-1", "Adam+SAM"): Best(0.001, 0.9, 0.999, rho=0.05),
    ("CIFAR-100", "WRN-1", "Adam+CM"): Best(0.001, 0.9, 0.9999, 5, 0.7),
    ("CIFAR-100", "WRN-1", "Adam+SAM+CM"): Best(0.001, 0.9, 0.99, 5, 0.7, 0.1),
}
