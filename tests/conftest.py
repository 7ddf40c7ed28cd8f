"""Each test process and all that it starts use one thread, so that pytest -n 2 uses two cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported
if not os.environ.get("SLOW"):
    os.environ["CXX"] = "no-compiler"  # else --compile auto takes minutes where --steps are many

import pytest
import torch

pytest_plugins = ["running"]  # fixtures: nursery, start, two, inside


@pytest.fixture(autouse=True)
def restore_torch_settings():
    """Undo what a script's main() sets for the process, which then runs other tests."""
    yield
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


def pytest_collection_modifyitems(items):
    """Run the sweeps first: they mostly wait, so one worker runs them all, on one Ray cluster."""
    items.sort(key=lambda item: item.path.stem != "test_sweep")
