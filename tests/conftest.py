"""Shared fixtures: where real data lies, and what a test does when hardware is missing."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device (CMAC_REQUIRE_GPU=1 turns the skip into a failure)"
    )
    config.addinivalue_line("markers", "dali: needs nvidia-dali")
    config.addinivalue_line("markers", "slow: more than about ten seconds")
    # The networks under test are too small to share; more threads than cores make them wait for each other.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            if os.environ.get("CMAC_REQUIRE_GPU") == "1":
                pytest.fail("CMAC_REQUIRE_GPU=1 but torch sees no CUDA device")
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real media named by CMAC_DATA (default: ../shared/data beside the repository)."""
    folder = Path(os.environ.get("CMAC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CMAC_DATA to a folder of real videos")
    return folder
