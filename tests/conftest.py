"""Settings of every test: one thread (the same sums in the same order everywhere), no window, no deadlines."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from hypothesis import settings

# No deadline: a busy machine is no failure. Derandomized: the same commit passes or fails everywhere alike.
settings.register_profile("baltoro", deadline=None, derandomize=True, database=None)
settings.load_profile("baltoro")
