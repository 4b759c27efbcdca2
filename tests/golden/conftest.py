"""Every .npz file of `--golden DIR` becomes one test."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" not in metafunc.fixturenames:
        return
    folder = metafunc.config.invocation_params.dir / metafunc.config.getoption("--golden")
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise pytest.UsageError(f"--golden: no .npz file in {folder}")
    metafunc.parametrize("golden_file", files, ids=lambda file: Path(file).stem)
