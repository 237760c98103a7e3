"""The implementations of the step, and the choice between them."""
