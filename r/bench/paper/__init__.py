"""The paper's experiments, rerun with this package."""
