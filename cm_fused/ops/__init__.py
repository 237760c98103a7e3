"""The implementations of the step, one module per backend library."""
