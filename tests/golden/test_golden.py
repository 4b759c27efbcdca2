"""Numbers of the authors' own code, and of independent computations, through our plugins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_check import COVERED, check
from golden_files import NOT_COVERED, NOT_COVERED_SETTINGS, NotUnderstood

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
    file = changed("fkl_dskd_kt2", meta={"source": "ghwang-s/abkd@df81318", "function": "bdkd"})
    with pytest.raises(pytest.skip.Exception, match=r"^ghwang-s/abkd: bdkd: both KLs .* no method of the zoo$"):
        check(file)


def test_a_listed_setting_is_skipped_with_its_reason(changed, monkeypatch):
    listed = {"wrong": {"by_guess": "comes with the next version"}}
    monkeypatch.setitem(NOT_COVERED_SETTINGS, "independent float64 reference: stage 2", listed)
    settings = {"beta": "sequence", "wrong": "by_guess", "lambda": 0.5}
    with pytest.raises(pytest.skip.Exception, match=r"wrong 'by_guess': comes with the next version$"):
        check(changed("residual_cross_a", meta={"configuration": settings}))


def test_padding_is_not_attended_to(changed):
    settings = {"beta": "sequence", "wrong": "by_bytes", "attend": "sequence", "lambda": 0.5}
    mask = np.ones((2, 9), np.int64)
    mask[0, -1] = 0
    file = changed("residual_cross_a", meta={"configuration": settings}, arrays={"teacher_attention_mask": mask})
    with pytest.raises(AssertionError, match="off by"):  # the file attends to responses alone
        check(file)


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("fkl_dskd_kt2", {"top_k": 3}),
        ("dskd_same_fkl_kt2", {"kd_objective": "hellinger"}),
        ("residual_same_a", {"configuration": {"beta": "sequence", "lambda": 0.5, "gate": True}}),
        ("fkl_kdflow_T1", {"reduction": "mean"}),
        ("vanillakd_fkl_dskd_forward", {"label_smoothing": 0.1}),
        ("vanillakd_fkl_dskd_forward", {"kd_objective": "hellinger"}),
        ("fusion_expert_attention_10", {"configuration": {"fusion": "expert_maximum", "top_k": 2}}),
        ("fusion_expert_attention_10", {"configuration": {"fusion": "expert_attention", "top_k": 2, "scale": 1.0}}),
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
        *(
            ("residual_cross_a", {"configuration": {"beta": "sequence", "lambda": 0.5, **changes}}, "loss")
            for changes in (
                {"wrong": "attention"},
                {"wrong": "projected"},
                {"wrong": "entropy"},
                {"wrong": "by_bytes", "attend": "sequence"},
            )
        ),
        ("residual_same_a", {"configuration": {"beta": 1.5, "wrong": "by_bytes", "lambda": 0.5}}, "loss"),
        ("residual_same_a", {"configuration": {"beta": "sequence", "mask": False, "lambda": 0.5}}, "loss"),
        ("residual_same_no_mask_a", {"configuration": {"beta": "sequence", "mask": True, "lambda": 0.5}}, "loss"),
        *(("js_kdflow_T1", changes, "loss_sum") for changes in ({"temperature": 2.0}, {"jsd_beta": 0.3})),
        ("sfkl_kdflow_T1", {"skew_lambda": 0.4}, "loss_sum"),
        *(
            ("vanillakd_fkl_dskd_forward", changes, "loss")
            for changes in ({"kd_rate": 0.6}, {"kd_temperature": 1.0}, {"kd_objective": "skewed_reverse_kl"})
        ),
        ("fusion_expert_attention_10", {"configuration": {"fusion": "expert_attention", "top_k": 3}}, "fused"),
        ("fusion_expert_attention_10", {"configuration": {"fusion": "router_weighted", "top_k": 2}}, "fused"),
    ],
)
def test_every_setting_reaches_the_plugin(changed, name, meta, differs):
    with pytest.raises(AssertionError, match=f"^{differs}: off by"):
        check(changed(name, meta=meta))


@pytest.mark.parametrize(
    ("name", "settings", "differs"),
    [
        ("residual_stage1_1", {"rows": "response", "target": "label", "init": "pca"}, None),  # as it is in the file
        ("residual_stage1_1", {"rows": "response", "target": "label", "reconstruction_weight": 0.0}, None),
        ("residual_stage1_1", {"rows": "response", "target": "label", "reconstruction_weight": 0.5}, "loss"),
        ("residual_stage1_1", {"rows": "response", "target": "teacher"}, "loss"),
        ("residual_same_a", {"beta": "sequence", "lambda": 0.5, "attend": "sequence"}, None),  # nothing is attended to
        ("residual_same_a", {"beta": "sequence", "lambda": 0.5, "wrong": "projected"}, None),  # rows are known
        (
            "residual_same_a",
            {"beta": "sequence", "lambda": 0.5, "head_gradient": False},
            "grad_residual_sum__student_lm",
        ),
        (
            "residual_same_a",
            {"beta": "sequence", "lambda": 0.5, "state_gradient": False},
            "grad_residual_sum__student_h",
        ),
        ("residual_same_a", {"beta": "sequence", "lambda": 0.5, "beta_gradient": True}, "grad_residual_sum__student_h"),
        ("residual_cross_a", {"beta": "sequence", "lambda": 0.5, "attend": "response"}, None),
        ("residual_cross_a", {"beta": "sequence", "lambda": 0.5, "mask": True}, None),
    ],
)
def test_every_parameter_of_the_formulas_is_known(changed, name, settings, differs):
    file = changed(name, meta={"configuration": settings})
    if differs is None:
        return check(file)
    with pytest.raises(AssertionError, match=f"^{differs}.*: off by"):
        check(file)
    return None


def test_a_teacher_temperature_counts_only_where_the_authors_use_it(changed):
    check(changed("fkl_dskd_kt2", meta={"teacher_temperature": 2.0}))
    check(changed("vanillakd_fkl_dskd_forward", meta={"teacher_temperature": 2.0}))


@pytest.mark.parametrize(
    ("fusion", "top_k"),
    [
        ("expert_attention", 1),
        ("expert_attention", 3),
        ("expert_attention", 4),
        ("router_weighted", 1),
        ("router_weighted", 2),
        ("router_weighted", 3),
        ("expert_mean", 2),
        ("expert_router_all", 2),
    ],
)
def test_another_fusion_of_the_same_experts_is_reproduced(changed, fusion, top_k):
    name = "fusion_expert_attention_10"
    with np.load(ARRAYS / f"{name}.npz") as file:
        experts, logits, alpha = file["experts"], file["router_logits"], file["alpha"]
    every = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = every * (every >= np.sort(every, -1)[..., [-top_k]])
    gate = kept / kept.sum(-1, keepdims=True)
    fused = {
        "expert_attention": np.einsum("btm,btmj,btjd->btd", gate, alpha, experts),
        "router_weighted": np.einsum("btm,btmd->btd", gate, experts),
        "expert_mean": experts.mean(2),
        "expert_router_all": np.einsum("btm,btmd->btd", every, experts),
    }[fusion]
    check(changed(name, meta={"configuration": {"fusion": fusion, "top_k": top_k}}, arrays={"fused": fused}))


def test_attention_between_experts_is_compared(changed):
    with pytest.raises(AssertionError, match=r"^alpha: off by"):
        check(changed("fusion_expert_attention_10", arrays={"alpha": np.full((2, 7, 4, 4), 0.25)}))


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
