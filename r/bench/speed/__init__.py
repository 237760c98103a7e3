"""What a step takes of time and memory: `python -m bench.speed`."""
