"""Files as the authors of minimum edit distance would write them in other configurations, and what is no such file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_check import check
from golden_files import NotUnderstood
from make_min_ed import dskd, tokenkit

ARRAYS = Path(__file__).parent / "arrays"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """`written(dskd, seed=3, ...)`: the file that a maker writes."""

    def written(make: Any, **settings: Any) -> Path:
        monkeypatch.setattr("make_min_ed.ARRAYS", tmp_path)
        make("made", **settings)
        return tmp_path / "made.npz"

    return written


@pytest.fixture
def changed(tmp_path):
    """A committed file with other contents; an array that is None is left out."""

    def changed(name: str, meta: dict[str, Any] | None = None, **arrays: Any) -> Path:
        with np.load(ARRAYS / f"{name}.npz") as file:
            contents = dict(file) | arrays
        contents["meta_json"] = np.array(json.dumps(json.loads(str(contents["meta_json"])) | (meta or {})))
        np.savez(tmp_path / "changed.npz", **{key: value for key, value in contents.items() if value is not None})
        return tmp_path / "changed.npz"

    return changed


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("settings", [{"temperature": 1.0, "rate": 1.0}, {"temperature": 3.0, "rate": 0.2}])
def test_another_configuration_of_dskd_is_reproduced(written, seed, settings):
    check(written(dskd, seed=seed, denominator=17.0, **settings))


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_another_configuration_of_tokenkit_is_reproduced(written, seed, temperature):
    check(written(tokenkit, seed=seed, temperature=temperature))


def test_the_walk_is_the_recorded_one(changed):
    """DSKD's file has both the vocabularies and the walk that its authors' code took: either will do."""
    with np.load(ARRAYS / "mined_dskd_fkl_kt2.npz") as file:
        recorded = json.loads(str(file["meta_json"]))
    assert recorded["dtw_base_to_blending"] and recorded["student_vocab"]
    meta = {key: value for key, value in recorded.items() if not key.endswith("_vocab")}
    check(changed("mined_dskd_fkl_kt2", meta_json=np.array(json.dumps(meta))))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"meta": {"kd_temperature": 1.0}}, "loss"),
        ({"meta": {"kd_rate": 0.6}}, "loss"),
        ({"grad_student_logits": np.zeros((2, 8, 11))}, "grad_student_logits"),
        ({"grad_fp32alias": np.zeros((2, 8, 11))}, "grad_fp32alias"),
        ({"onehot_fallback": np.zeros((2, 8), bool)}, "onehot_fallback"),
        ({"aligned_teacher_logits": np.zeros((2, 8, 11))}, "aligned_teacher_logits"),
    ],
)
def test_what_differs_is_found(changed, change, differs):
    with pytest.raises(AssertionError, match=f"^{differs}: off by"):
        check(changed("mined_dskd_fkl_kt2", **change))


def test_the_targets_alone_are_compared(changed):
    """As of a call of the inner function, which returns them."""
    outputs = dict.fromkeys(("loss", "grad_student_logits", "loss_fp32alias", "grad_fp32alias", "log_loss"))
    meta = {"function": "MinEditDisForwardKLD.get_aligned_teacher_logits"}
    check(changed("mined_dskd_fkl_kt2", meta=meta, **outputs))
    with pytest.raises(AssertionError, match=r"^aligned_teacher_logits: off by"):
        wrong = np.zeros((2, 8, 11))
        check(changed("mined_dskd_fkl_kt2", meta=meta, **outputs, aligned_teacher_logits=wrong))


def test_numbers_of_the_overwritten_logits_are_those_without_the_divergence(changed):
    """Of the authors' code in float32: recorded as the file's main numbers, they are told by a divergence of 0."""
    with np.load(ARRAYS / "mined_dskd_fkl_kt2.npz") as file:
        arrays = {
            "loss": file["loss_fp32alias"],
            "grad_student_logits": file["grad_fp32alias"],
            "log_loss": file["log_fp32alias_loss"],
            "log_forward_kl": file["log_fp32alias_forward_kl"],
            "log_accuracy": file["log_fp32alias_accuracy"],
        }
    check(changed("mined_dskd_fkl_kt2", **arrays))


@pytest.mark.parametrize(
    "meta",
    [{"kd_objective": "reverse_kl"}, {"label_smoothing": 0.1}, {"max_align_num": 3}],
    ids=lambda meta: next(iter(meta)),
)
def test_a_configuration_that_is_not_understood_fails(changed, meta):
    with pytest.raises(NotUnderstood):
        check(changed("mined_dskd_fkl_kt2", meta=meta))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"mined_mapping": np.arange(9)}, "loss"),
        ({"report_mined_onehot_mask_sum": np.array(99)}, "report_mined_onehot_mask_sum"),
        ({"logit_mask_new": None}, "loss"),
    ],
)
def test_every_array_of_tokenkit_counts(changed, change, differs):
    with pytest.raises(AssertionError, match=f"^{differs}: off by"):
        check(changed("mined_tokenkit_kt2", **change))
