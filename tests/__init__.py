"""The tests. What is set here is set before torch is imported."""

import os

# A thread of OpenMP that waits for others sleeps. By default it spins, for long where the workers
# of pytest-xdist have all cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
