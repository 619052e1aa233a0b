"""Shared by all tests: one thread, and the tests' own folder on the path (`from engine.nets import ...`)."""

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the nets are tiny: threads would wait for each other
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    # Here and not in pyproject.toml, which pytest reads before the checkout is on the path. It points to the test, and so is
    # not among the warnings from revflow's own lines.
    config.addinivalue_line("filterwarnings", "error::revflow.ReconstructionWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
