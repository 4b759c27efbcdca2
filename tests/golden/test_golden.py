"""Numbers of the authors' own code, and of independent computations, through our plugins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_files import COVERED, NOT_COVERED, NotUnderstood, check

ARRAYS = Path(__file__).parent / "arrays"


def test_a_golden_file_is_reproduced(golden_file):
    check(golden_file)


@pytest.fixture
def changed(tmp_path):
    """`changed("fkl_dskd_kt2", meta={...}, arrays={...})`: a committed file with other contents."""

    def changed(name: str, *, meta: dict[str, Any] | None = None, arrays: dict[str, Any] | None = None) -> Path:
        with np.load(ARRAYS / f"{name}.npz") as file:
            contents = dict(file)
        contents["meta_json"] = np.array(json.dumps(json.loads(str(contents["meta_json"])) | (meta or {})))
        np.savez(tmp_path / "changed.npz", **(contents | (arrays or {})))
        return tmp_path / "changed.npz"

    return changed


def test_an_unknown_function_fails(tmp_path):
    meta = {"source": "somebody/something@abc", "function": "Loss.forward / .inner"}
    np.savez(tmp_path / "tiny.npz", loss=np.zeros(()), meta_json=np.array(json.dumps(meta)))
    message = r"^somebody/something: Loss\.forward: no plugin covers it and not_covered\.json does not name it$"
    with pytest.raises(pytest.fail.Exception, match=message):
        check(tmp_path / "tiny.npz")


def test_an_unknown_function_of_a_known_repository_fails(changed):
    with pytest.raises(pytest.fail.Exception, match="no plugin covers it"):
        check(changed("fkl_dskd_kt2", meta={"function": "VariousDivergence.compute_another"}))


def test_a_listed_function_is_skipped_with_its_reason(changed):
    file = changed("fkl_dskd_kt2", meta={"function": "VariousDivergence.compute_js_divergence"})
    with pytest.raises(pytest.skip.Exception, match=r"compute_js_divergence: comes with the zoo$"):
        check(file)


def test_a_listed_setting_is_skipped_with_its_reason(changed):
    settings = {"beta": "sequence", "wrong": "projected", "lambda": 0.5}
    with pytest.raises(pytest.skip.Exception, match=r"wrong 'projected': comes with the next version$"):
        check(changed("residual_cross_a", meta={"configuration": settings}))


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("fkl_dskd_kt2", {"top_k": 3}),
        ("dskd_same_fkl_kt2", {"kd_objective": "hellinger"}),
        ("residual_same_a", {"configuration": {"beta": "sequence", "lambda": 0.5, "gate": True}}),
    ],
)
def test_a_configuration_that_is_not_understood_fails(changed, name, meta):
    with pytest.raises(NotUnderstood):
        check(changed(name, meta=meta))


@pytest.mark.parametrize(
    ("name", "meta", "differs"),
    [
        ("fkl_dskd_kt2", {"kd_temperature": 1.0}, "loss_sum"),
        ("fkl_dskd_kt2", {"teacher_temperature": 2.0, "use_tea_temp": True}, "loss_sum"),
        ("dskd_same_fkl_kt2", {"kd_rate": 0.6}, "loss"),
        ("dskd_same_fkl_kt2", {"kd_objective": "js_divergence"}, "loss"),
        ("dskd_cma_fkl_kt2", {"teacher_temperature": 1.5}, "loss"),
        (
            "residual_cross_a",
            {"configuration": {"beta": "sequence", "normalise": "l2", "wrong": "by_bytes", "lambda": 0.5}},
            "loss",
        ),
        ("residual_same_a", {"configuration": {"beta": 1.5, "wrong": "by_bytes", "lambda": 0.5}}, "loss"),
    ],
)
def test_every_setting_reaches_the_plugin(changed, name, meta, differs):
    with pytest.raises(AssertionError, match=f"^{differs}: off by"):
        check(changed(name, meta=meta))


def test_a_teacher_temperature_counts_only_where_the_authors_use_it(changed):
    check(changed("fkl_dskd_kt2", meta={"teacher_temperature": 2.0}))


def test_a_wrong_gradient_fails(changed):
    with pytest.raises(AssertionError, match=r"^grad_student_logits: off by"):
        check(changed("fkl_dskd_kt2", arrays={"grad_student_logits": np.zeros((2, 7, 11), np.float32)}))


def test_an_output_that_nothing_is_compared_with_fails(changed):
    with pytest.raises(AssertionError, match=r"^outputs that nothing is compared with: grad_teacher_logits"):
        check(changed("fkl_dskd_kt2", arrays={"grad_teacher_logits": np.zeros((2, 7, 11), np.float32)}))


def test_no_covered_function_is_listed_as_not_covered():
    assert not COVERED.keys() & NOT_COVERED.keys()


def test_every_committed_file_is_covered():
    for file in sorted(ARRAYS.glob("*.npz")):
        check(file)
