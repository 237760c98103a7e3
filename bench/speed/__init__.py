"""The time and the memory of a step: `python -m bench.speed`."""
