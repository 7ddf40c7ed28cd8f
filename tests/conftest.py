"""pytest -n 2 keeps two cores busy: each test process and all that it starts have one thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported
