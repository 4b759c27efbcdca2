"""Every fault of a recipe is one line: address, what is wrong, what to do, who set it. All come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdzoo.recipe.merge import Layer, merge
from kdzoo.recipe.schema import recipe_schema
from kdzoo.recipe.validate import OWNED_BY_THE_RECIPE, faults


@pytest.fixture
def lines(valid, declared):
    """The faults of the valid recipe with a patch over it."""

    def lines(patch: dict) -> list[str]:
        merged = merge([Layer("base.json", Path(), valid), Layer("patch.json", Path(), patch)])
        return faults(merged, recipe_schema(declared, whole=True))

    return lines


def test_a_valid_recipe_has_none(lines):
    assert lines({}) == []
    assert lines({"stages": {"answers": {}}}) == []
    several = {"score": "mean_logprob", "decoding": {"sample": True, "temperature": 0.7, "seeds": [1, 2]}}
    assert lines({"stages": {"answers": several}}) == []


KD = "'gold', 'needy', 'wide'"
CASES = {
    "a misspelt key": (
        {"sead": 1},
        "sead: unknown key, did you mean 'seed'? (set by patch.json)",
    ),
    "a key like no other": (
        {"data": {"template": {"zzz": 1}}},
        "data.template.zzz: unknown key; known are 'chat', 'prompt', 'prompt_with_input' (set by patch.json)",
    ),
    "extends inside": (
        {"data": {"extends": "a.json"}},
        "data.extends: unknown key; known are "
        "'held_out', 'max_length', 'max_prompt_length', 'template', 'train' (set by patch.json)",
    ),
    "a misspelt parameter": (
        {"losses": {"kd": {"params": {"widht": 1}}}},
        "losses.kd.params.widht: unknown key, did you mean 'width'? (set by patch.json)",
    ),
    "a parameter of a parameter": (
        {"losses": {"kd": {"params": {"floor": {"at": 2}}}}},
        "losses.kd.params.floor.at: 2 is not a number ≥ 0 and ≤ 1 (set by patch.json)",
    ),
    "a share of no answers": (
        {"stages": {"answers": {"share": 0}}},
        "stages.answers.share: 0 is not a number > 0 and ≤ 1 (set by patch.json)",
    ),
    "a key of a stage that trains": (
        {"stages": {"answers": {"steps": 3}}},
        "stages.answers.steps: unknown key; known are 'batch', 'decoding', 'max_new_tokens', 'score', 'seed', 'share' "
        "(set by patch.json)",
    ),
    "several answers of greedy decoding": (
        {"stages": {"answers": {"decoding": {"seeds": [1, 2]}}}},
        "stages.answers.decoding.seeds: greedy decoding does not read it; set 'sample' to true, or remove it "
        "(set by patch.json)",
    ),
    "answers of no seed": (
        {"stages": {"answers": {"decoding": {"sample": True, "seeds": []}}}},
        "stages.answers.decoding.seeds: is empty; give at least one (set by patch.json)",
    ),
    "a choice of one": (
        {"stages": {"answers": {"score": "mean_logprob", "decoding": {"sample": True, "seeds": [1]}}}},
        "stages.answers.score: there is one candidate, so that nothing is chosen; let 'decoding' sample with several "
        "'seeds', or remove it (set by patch.json)",
    ),
    "a misspelt stage of answers": (
        {"stages": {"answer": {"steps": 1}}},
        "stages.answer.use: missing key, did you mean 'answers'?",
    ),
    "a rank of nothing": (
        {"student": {"lora": {"rank": 0}}},
        "student.lora.rank: 0 is not an integer ≥ 1 (set by patch.json)",
    ),
    "a misspelt key of LoRA": (
        {"student": {"lora": {"aplha": 1}}},
        "student.lora.aplha: unknown key, did you mean 'alpha'? (set by patch.json)",
    ),
    "a target for all that is no list": (
        {"student": {"lora": {"targets": "q_proj"}}},
        "student.lora.targets: 'q_proj' is not 'all-linear' or list, each string (set by patch.json)",
    ),
    "no target": (
        {"student": {"lora": {"targets": []}}},
        "student.lora.targets: is empty; give at least one (set by patch.json)",
    ),
    "LoRA for a teacher that no stage trains": (
        {"teacher": {"lora": {"rank": 4}}},
        "teacher.lora: no stage trains the teacher; add 'stages.teacher', or remove it (set by patch.json)",
    ),
    "an adapter beside a student's weights": (
        {"student": {"adapter": {"name": "a", "merge": False}}},
        "student.adapter.merge: a student starts from merged weights; remove it (set by patch.json)",
    ),
    "an adapter beside the weights that a student is cut from": (
        {"teacher": {"adapter": {"name": "a", "merge": False}}, "student": {"config": None, "layers": [0]}},
        "teacher.adapter.merge: a student's cut starts from merged weights; remove it (set by patch.json)",
    ),
    "an adapter without a name": (
        {"student": {"adapter": {}}},
        "student.adapter.name: missing key",
    ),
    "a fusion that the recipe does not have": (
        {"fuse": {"mean": {"use": "mean", "params": {"site": "x"}}}, "losses": {"kd": {"fuse": "maen"}}},
        "losses.kd.fuse: the recipe's 'fuse' has no 'maen', did you mean 'mean'? (set by patch.json)",
    ),
    "a fusion where there is none": (
        {"losses": {"kd": {"fuse": "mean"}}},
        "losses.kd.fuse: the recipe's 'fuse' has no 'mean'; it is empty (set by patch.json)",
    ),
    "a fusion for a stage of one model": (
        {"stages": {"sft": {"steps": 1, "losses": {"sft": {"use": "gold", "fuse": "mean"}}}}},
        "stages.sft.losses.sft.fuse: this stage has no teacher whose state a loss could read; remove it "
        "(set by patch.json)",
    ),
    "token weights that the recipe does not have": (
        {"token_weights": {"hardest": {"use": "hard"}}, "losses": {"kd": {"weights": "hardets"}}},
        "losses.kd.weights: the recipe's 'token_weights' has no 'hardets', did you mean 'hardest'? (set by patch.json)",
    ),
    "token weights where there are none": (
        {"losses": {"kd": {"weights": "hardest"}}},
        "losses.kd.weights: the recipe's 'token_weights' has no 'hardest'; it is empty (set by patch.json)",
    ),
    "token weights of a stage that the recipe does not have": (
        {"stages": {"sft": {"steps": 1, "losses": {"sft": {"use": "gold", "weights": "hardest"}}}}},
        "stages.sft.losses.sft.weights: the recipe's 'token_weights' has no 'hardest'; it is empty (set by patch.json)",
    ),
    "misspelt token weights": (
        {"token_weights": {"hardest": {"use": "hrad"}}},
        "token_weights.hardest.use: no plugin offers 'hrad', did you mean 'hard'? (set by patch.json)",
    ),
    "a misspelt parameter of token weights": (
        {"token_weights": {"hardest": {"use": "hard", "params": {"widht": 1}}}},
        "token_weights.hardest.params.widht: unknown key, did you mean 'width'? (set by patch.json)",
    ),
    "a misspelt key of token weights": (
        {"token_weights": {"hardest": {"use": "hard", "parms": {}}}},
        "token_weights.hardest.parms: unknown key, did you mean 'params'? (set by patch.json)",
    ),
    "token weights that are a name": (
        {"token_weights": {"hardest": "hard"}},
        "token_weights.hardest: 'hard' is not an object (set by patch.json)",
    ),
    "a parameter where there is none": (
        {"losses": {"gold": {"params": {"width": 1}}}},
        "losses.gold.params.width: unknown key; no key is allowed here (set by patch.json)",
    ),
    "a parameter out of range": (
        {"losses": {"kd": {"params": {"width": 0}}}},
        "losses.kd.params.width: 0 is not an integer ≥ 1 (set by patch.json)",
    ),
    "a parameter of no type of a union": (
        {"losses": {"kd": {"params": {"beta": [1]}}}},
        "losses.kd.params.beta: [1] is not a number or string (set by patch.json)",
    ),
    "a missing parameter": (
        {"losses": {"kd": {"use": "needy", "params": {"width": None}}}},
        "losses.kd.params.site: missing key",
    ),
    "missing parameters": (
        {"losses": {"kd": {"use": "needy", "params": None}}},
        "losses.kd.params: missing key (removed by patch.json)",
    ),
    "a misspelt loss": (
        {"losses": {"kd": {"use": "wied"}}},
        "losses.kd.use: no plugin offers 'wied', did you mean 'wide'? (set by patch.json)",
    ),
    "an unknown loss": (
        {"losses": {"kd": {"use": "quite_another"}}},
        f"losses.kd.use: no plugin offers 'quite_another'; known are {KD} (set by patch.json)",
    ),
    "a loss that is no string": (
        {"losses": {"kd": {"use": 3}}},
        f"losses.kd.use: no plugin offers 3; known are {KD} (set by patch.json)",
    ),
    "an unknown aligner": (
        {"align": {"use": "by_byte"}},
        "align.use: no plugin offers 'by_byte', did you mean 'by_bytes'? (set by patch.json)",
    ),
    "an aligner's parameter": (
        {"align": {"use": "by_bytes", "params": {"x": 1}}},
        "align.params.x: unknown key; no key is allowed here (set by patch.json)",
    ),
    "an unknown fusion": (
        {"fuse": {"experts": {"use": "maen", "params": {"site": "x"}}}},
        "fuse.experts.use: no plugin offers 'maen', did you mean 'mean'? (set by patch.json)",
    ),
    "a fusion without its parameters": (
        {"fuse": {"experts": {"use": "mean"}}},
        "fuse.experts.params: missing key",
    ),
    "an unknown plugin of a stage": (
        {"stages": {"projectors": {"steps": 1, "use": "wied"}}},
        "stages.projectors.use: no plugin offers 'wied', did you mean 'wide'? (set by patch.json)",
    ),
    "a parameter of a stage's plugin": (
        {"stages": {"projectors": {"steps": 1, "use": "wide", "params": {"width": "x"}}}},
        "stages.projectors.params.width: 'x' is not an integer ≥ 1 (set by patch.json)",
    ),
    "a loss of a stage": (
        {"stages": {"sft": {"steps": 1, "losses": {"x": {"use": "glod"}}}}},
        "stages.sft.losses.x.use: no plugin offers 'glod', did you mean 'gold'? (set by patch.json)",
    ),
    "a missing key": (
        {"data": {"train": None}},
        "data.train: missing key (removed by patch.json)",
    ),
    "a slot without use": (
        {"losses": {"more": {"weight": 1}}},
        "losses.more.use: missing key",
    ),
    "a wrong type": (
        {"seed": "7"},
        "seed: '7' is not an integer (set by patch.json)",
    ),
    "a truth value for a number": (
        {"seed": True},
        "seed: true is not an integer (set by patch.json)",
    ),
    "a number for a truth value": (
        {"data": {"template": {"chat": 1}}},
        "data.template.chat: 1 is not true or false (set by patch.json)",
    ),
    "a value for an object": (
        {"teacher": "gpt2"},
        "teacher: 'gpt2' is not an object (set by patch.json)",
    ),
    "an object for a value": (
        {"losses": {"gold": {"weight": {"start": 1, "end": 0}}}},
        "losses.gold.weight.steps: missing key",
    ),
    "neither number nor ramp": (
        {"losses": {"gold": {"weight": "half"}}},
        "losses.gold.weight: 'half' is not a number or object (set by patch.json)",
    ),
    "a value of no choice": (
        {"precision": "bf-16"},
        "precision: 'bf-16' is not 'fp32' or 'bf16', did you mean 'bf16'? (set by patch.json)",
    ),
    "too small": (
        {"stages": {"distill": {"steps": 0}}},
        "stages.distill.steps: 0 is not an integer ≥ 1 (set by patch.json)",
    ),
    "not above": (
        {"stages": {"distill": {"lr": 0}}},
        "stages.distill.lr: 0 is not a number > 0 (set by patch.json)",
    ),
    "a list of the wrong length": (
        {"stages": {"distill": {"betas": [0.9]}}},
        "stages.distill.betas: [0.9] is not a list of 2: number, number; its length is 1 (set by patch.json)",
    ),
    "an item of a list": (
        {"stages": {"distill": {"betas": [0.9, "x"]}}},
        "stages.distill.betas[1]: 'x' is not a number (set by patch.json)",
    ),
    "no term": (
        {"losses": {"gold": None, "kd": None}},
        "losses: is empty; name at least one loss (set by patch.json)",
    ),
    "two sources of a model": (
        {"student": {"name": "gpt2"}},
        "student: 'name' (set by patch.json) and 'config' (set by base.json) exclude each other; "
        "set all but one to null",
    ),
    "no source of a model": (
        {"teacher": {"name": None}},
        "teacher: needs one of 'name', 'gguf_file', 'gguf_package', 'config', 'layers' (set by patch.json)",
    ),
    "a teacher cut from itself": (
        {"teacher": {"name": None, "layers": [0]}},
        "teacher.layers: is allowed for the student only; remove it (set by patch.json)",
    ),
    "a revision of no name": (
        {"student": {"revision": "main"}},
        "student.revision: is allowed only together with 'name'; remove it (set by patch.json)",
    ),
    "two sources of rows": (
        {"data": {"train": {"jsonl": "x.jsonl"}}},
        "data.train: 'lab' (set by base.json) and 'jsonl' (set by patch.json) exclude each other; "
        "set all but one to null",
    ),
    "no source of held-out rows": (
        {"data": {"held_out": {}}},
        "data.held_out: needs one of 'lab', 'set', 'jsonl', 'dataset' (set by patch.json)",
    ),
    "no source of a stage's rows": (
        {"stages": {"distill": {"data": {"limit": 3}}}},
        "stages.distill.data: needs one of 'lab', 'set', 'jsonl', 'dataset' (set by patch.json)",
    ),
    "a split of no hub data set": (
        {"evaluation": {"sets": {"dolly": {"jsonl": "x", "split": "test"}}}},
        "evaluation.sets.dolly.split: is allowed only together with 'dataset'; remove it (set by patch.json)",
    ),
    "no length of a stage": (
        {"stages": {"distill": {"steps": None}}},
        "stages.distill: needs one of 'steps', 'epochs' (set by patch.json)",
    ),
    "two lengths of a stage": (
        {"stages": {"distill": {"epochs": 2}}},
        "stages.distill: 'steps' (set by base.json) and 'epochs' (set by patch.json) exclude each other; "
        "set all but one to null",
    ),
    "no distillation": (
        {"stages": {"distill": None}},
        "stages.distill: missing key; every recipe has this stage (removed by patch.json)",
    ),
    "a misspelt stage": (
        {"stages": {"taecher": {"steps": 1}}},
        "stages.taecher.use: missing key, did you mean 'teacher'?",
    ),
    "a stage without a plugin": (
        {"stages": {"projectors": {"steps": 1}}},
        "stages.projectors.use: missing key; name the loss whose module this stage trains",
    ),
    "losses of an artifact's stage": (
        {"stages": {"projectors": {"steps": 1, "use": "wide", "losses": {"x": {"use": "gold"}}}}},
        "stages.projectors.losses: a stage that makes an artifact trains the loss in 'use'; remove it "
        "(set by patch.json)",
    ),
    "a plugin of a named stage": (
        {"stages": {"distill": {"use": "wide"}}},
        "stages.distill.use: is allowed only in a stage that makes an artifact; remove it (set by patch.json)",
    ),
    "losses inside distill": (
        {"stages": {"distill": {"losses": {"x": {"use": "gold"}}}}},
        "stages.distill.losses: this stage trains the recipe's 'losses'; move them there (set by patch.json)",
    ),
    "no losses of a stage of one model": (
        {"stages": {"sft": {"steps": 1}}},
        "stages.sft.losses: missing key; name the losses of this stage",
    ),
    "a batch size for the engine": (
        {"deepspeed": {"train_batch_size": 8}},
        "deepspeed.train_batch_size: is set by the recipe; use 'stages.<stage>.batch' (set by patch.json)",
    ),
    "clipping in a stage's engine": (
        {"stages": {"distill": {"deepspeed": {"gradient_clipping": 1}}}},
        "stages.distill.deepspeed.gradient_clipping: is set by the recipe; use 'stages.distill.clip' "
        "(set by patch.json)",
    ),
    "precision for the engine": (
        {"deepspeed": {"bf16": {"enabled": True}}},
        "deepspeed.bf16: is set by the recipe; use 'precision' (set by patch.json)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_this_line(lines, case):
    patch, line = CASES[case]
    assert lines(patch) == [line]


@pytest.mark.parametrize("key", OWNED_BY_THE_RECIPE)
def test_every_key_that_the_recipe_owns_is_refused(lines, key):
    (line,) = lines({"deepspeed": {key: 1}})
    assert line.startswith(f"deepspeed.{key}: is set by the recipe; use '")


def test_other_keys_of_the_engine_pass_verbatim(lines):
    assert lines({"deepspeed": {"zero_optimization": {"stage": 3}, "aio": {"anything": [1, {"a": None}]}}}) == []


def test_a_key_that_deepspeed_would_ignore_is_refused(lines):
    (line,) = lines({"deepspeed": {"zero_optimisation": {"stage": 3}}})
    assert line.startswith(
        "deepspeed.zero_optimisation: is not a key of DeepSpeed's configuration, did you mean 'zero_optimization'?"
    )


def test_all_faults_come_at_once_and_sorted(lines):
    patch = {
        "sead": 1,
        "losses": {"kd": {"use": "wied", "weihgt": 1}},
        "stages": {"distill": {"steps": 0, "deepspeed": {"fp16": {}}}},
        "student": "gpt2",
    }
    assert lines(patch) == [
        "losses.kd.use: no plugin offers 'wied', did you mean 'wide'? (set by patch.json)",
        "losses.kd.weihgt: unknown key, did you mean 'weight'? (set by patch.json)",
        "sead: unknown key, did you mean 'seed'? (set by patch.json)",
        "stages.distill.deepspeed.fp16: is set by the recipe; use 'precision' (set by patch.json)",
        "stages.distill.steps: 0 is not an integer ≥ 1 (set by patch.json)",
        "student: 'gpt2' is not an object (set by patch.json)",
    ]


def test_an_empty_recipe_lacks_everything(declared):
    assert faults(merge([]), recipe_schema(declared, whole=True)) == [
        f"{key}: missing key" for key in ("data", "losses", "stages", "student", "teacher", "title")
    ]


def test_a_long_value_is_cut(lines):
    (line,) = lines({"seed": "x" * 500})
    assert line == f"seed: '{'x' * 56}... is not an integer (set by patch.json)"
