"""The tests. What is set here is set before torch is imported."""

import os

# A thread of OpenMP that waits for others sleeps: by default it spins, and where the workers have all
# cores it waits long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
