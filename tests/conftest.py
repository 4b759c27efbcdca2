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


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No workers for a test that is named: they would take longer to start than it takes. Else one per core."""
    return 0 if any("::" in argument for argument in config.args) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a worker takes one file after the other, and none is left with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tokenizers and data beside the checkout; its tests are skipped without it."""
    folder = Path(os.environ.get("KDZOO_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real tokenizers and data at {folder}; set KDZOO_SHARED")
    return folder


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all tests of a session, whichever worker runs them."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session", autouse=True)
def cache(common: Path) -> Iterator[Path]:
    """$KDZOO_CACHE where set, so that slow artifacts outlive a session; else a folder for all its tests."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("KDZOO_CACHE"):
            patch.setenv("KDZOO_CACHE", str(common / "cache"))
        yield Path(os.environ["KDZOO_CACHE"])
