"""Every method in bfloat16, beside itself in float32: the same teacher, the same rows, the same student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import sets
from test_every_recipe import METHODS, trained

pytestmark = pytest.mark.sweep

LOSS, TERM = 0.01, 0.1
"""How far the first step's loss, and each of its terms, may be off float32: a part of what they are, or of the loss."""
PAIR = "lab_llama_to_llama"
SETTINGS = ("data.held_out=null", "stages.distill.gradients_every=1")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A teacher that has learned a little, in float32; and a cache for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("KDZOO_CACHE", str(cache))
        trained(tmp_path_factory.mktemp("first") / "run", "forward_kl", PAIR, *sets("stages.teacher.steps=30"))
        yield next(cache.glob("teacher/*/config.json")).parent


@pytest.mark.parametrize("name", METHODS)
def test_its_first_step_is_near_that_of_float32(tmp_path: Path, teacher: Path, name: str) -> None:
    given = sets(*SETTINGS, "teacher.config=null", f"teacher.name={teacher}", "stages.teacher=null")
    fine, rough = (
        trained(tmp_path / precision, name, PAIR, *given, *sets(f"precision={precision}")).lines()[0]
        for precision in ("fp32", "bf16")
    )
    assert rough["loss"] == pytest.approx(fine["loss"], rel=LOSS)
    for key, value in fine.items():
        if "/" in key and not key.endswith("gradient_at_state"):
            assert rough[key] == pytest.approx(value, rel=TERM, abs=TERM * fine["loss"]), key
    print(f"\n{name}: loss {rough['loss'] / fine['loss'] - 1:+.2%}")
