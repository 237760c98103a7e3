"""The machine code of the Triton pass: `python -m bench.machine_code`."""
