"""What every test shares: one thread, a cache, the folder of real data, and where golden files lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).parents[1]

torch.set_num_threads(1)

# How fast examples come is the machine's load, not the code's health. They are the same in every run, so that a change
# is judged by what it changes; `--hypothesis-profile default` looks at others.
settings.register_profile("kdzoo", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kdzoo")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=str(Path(__file__).parent / "golden" / "arrays"),
        help="folder of golden .npz files to replay in tests/golden (default: the committed ones)",
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tokenizers and data beside the checkout; its tests are skipped without it."""
    folder = Path(os.environ.get("KDZOO_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real tokenizers and data at {folder}; set KDZOO_SHARED")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """$KDZOO_CACHE where set, so that slow artefacts outlive a session; else a folder for all its tests."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("KDZOO_CACHE"):
            patch.setenv("KDZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["KDZOO_CACHE"])
