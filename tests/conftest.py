"""pytest -n 2 keeps two cores busy: each test process and all that it starts have one thread."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import pytest
import torch

pytest_plugins = ["running"]  # fixtures: nursery, start, two, inside


@pytest.fixture(autouse=True)
def as_main_found_it():
    """A script's main() sets these for its whole process, which goes on with other tests."""
    yield
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


def pytest_collection_modifyitems(items):
    """Sweeps first: they mostly wait, and so one worker does them all, on one Ray."""
    items.sort(key=lambda item: item.path.stem != "test_sweep")
