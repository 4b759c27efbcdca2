"""Writes the golden files of minimum edit distance: the authors' formulas as they compute them, in plain numpy float64.

songmzhang/DSKD @ 077337a, code/criterions/min_edit_dis_kld.py, `MinEditDisForwardKLD.forward`; bminixhofer/tokenkit
@ bcacdef, tokenkit/training/losses.py, `compute_baseline_mined_loss`. Gradients are analytic, and each is held to
finite differences before it is written. Run it in this folder: `python make_min_ed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = Path(__file__).parent / "arrays"
FAR = -100_000.0

Loss = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""From the student's logits to the loss and its gradient."""


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def forward_kl(logits: np.ndarray, target: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, from a target that is given as logits; and its gradient."""
    p, q = softmax(target / temperature), softmax(logits / temperature)
    terms = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0)
    return terms.sum(-1), (q - p) / temperature


def one_hot(label: int, size: int) -> np.ndarray:
    target = np.full(size, FAR)
    target[label] = 100.0
    return target


def held(loss: Loss, logits: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss and its gradient, which finite differences along random directions confirm."""
    value, gradient = loss(logits)
    rng = np.random.default_rng(9)
    for _ in range(5):
        direction = rng.normal(size=logits.shape)
        slope = (loss(logits + 1e-5 * direction)[0] - loss(logits - 1e-5 * direction)[0]) / 2e-5
        assert np.isclose(slope, (gradient * direction).sum(), rtol=1e-6), (slope, (gradient * direction).sum())
    return value, gradient


def write(name: str, meta: dict[str, Any], **arrays: Any) -> None:
    np.savez(ARRAYS / f"{name}.npz", **arrays, meta_json=json.dumps(meta))


# songmzhang/DSKD


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        before, row = row, [i + 1]
        row += [0] * len(b)
        for j, y in enumerate(b):
            row[j + 1] = min(row[j] + 1, before[j + 1] + 1, before[j] + (x != y))
    return row[-1]


def walk(teacher: list[str], student: list[str]) -> list[list[int]]:
    """For each of the student's tokens those of the teacher's that it is on the cheapest walk with."""
    total = np.full((len(teacher) + 1, len(student) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(teacher):
        for j, b in enumerate(student):
            cost = edit_distance(a.replace("▁", ""), b.replace("Ġ", ""))
            total[i + 1, j + 1] = cost + min(total[i, j + 1], total[i + 1, j], total[i, j])
    total = total[1:, 1:]
    found: list[list[int]] = [[] for _ in student]
    i, j = len(teacher) - 1, len(student) - 1
    while i or j:
        found[j].insert(0, i)
        options = [
            total[i - 1, j - 1] if i and j else np.inf,
            total[i - 1, j] if i else np.inf,
            total[i, j - 1] if j else np.inf,
        ]
        move = int(np.argmin(options))
        i, j = i - (move in (0, 1)), j - (move in (0, 2))
    found[0].insert(0, 0)
    return found


STUDENT = ["<eos>", "I", "Ġlike", "Ġdis", "till", "ation", "Ġa", "Ġlot", ":", "Ġrun", "s", "Ġha", "Ġwine"]
TEACHER = ["</s>", "▁I", "▁like", "▁distill", "ation", "▁a", "▁lot", ":", "▁ru", "ns", "▁the", "▁ha", "▁wines", "x"]
PARTNERS = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 6, 11, 12, 10]
ROWS = {  # prompt, response; the last one is the end
    "student": [([8, 8], [1, 2, 3, 4, 5, 6, 7, 0]), ([8], [1, 9, 10, 11, 11, 12, 0]), ([8], [2, 2, 0])],
    "teacher": [([7, 7], [1, 2, 3, 4, 5, 6, 0]), ([7], [1, 8, 9, 11, 12, 0]), ([7], [2, 0])],
}
"""Tokens that one walk puts together with one, with several, and two of which belong to one that says the same."""


def padded(model: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] and the labels that positions predict."""
    rows = ROWS[model]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids, labels = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), -100)
    for b, (prompt, response) in enumerate(rows):
        ids[b, : len(prompt) + len(response)] = prompt + response
        labels[b, len(prompt) - 1 : len(prompt) + len(response) - 1] = response
    return ids, labels


def dskd(name: str, seed: int, temperature: float, rate: float, denominator: float) -> None:
    rng = np.random.default_rng(seed)
    (ids, labels), (teacher_ids, teacher_labels) = padded("student"), padded("teacher")
    student = 2 * rng.normal(size=(*ids.shape, len(STUDENT)))
    teacher = 2 * rng.normal(size=(*teacher_ids.shape, len(TEACHER)))
    first = {mine: PARTNERS.index(mine) for mine in PARTNERS}
    targets, alone = student.copy(), np.zeros(ids.shape, bool)
    for b in range(len(ids)):
        ours, theirs = np.nonzero(labels[b] != -100)[0], np.nonzero(teacher_labels[b] != -100)[0]
        walked = walk([TEACHER[t] for t in teacher_ids[b, theirs]], [STUDENT[t] for t in ids[b, ours]])
        for at, found in zip(ours, walked, strict=True):
            targets[b, at] = one_hot(labels[b, at], len(STUDENT))
            alone[b, at] = True
            if len(found) == 1 and PARTNERS[teacher_ids[b, theirs[found[0]]]] == ids[b, at]:
                alone[b, at] = False
                targets[b, at] = FAR
                for mine, source in first.items():
                    targets[b, at, mine] = teacher[b, theirs[found[0]], source]
    scored = labels != -100

    def loss(logits: np.ndarray) -> tuple[float, np.ndarray]:
        kl, of_kl = forward_kl(logits[scored], targets[scored], temperature)
        q = softmax(logits[scored])
        gold = np.eye(len(STUDENT))[labels[scored]]
        nll = -np.log((q * gold).sum(-1))
        gradient = np.zeros_like(logits)
        gradient[scored] = (rate * of_kl + (1 - rate) * (q - gold)) / denominator
        return float((rate * kl + (1 - rate) * nll).sum() / denominator), gradient

    value, gradient = held(loss, student)
    write(
        name,
        {
            "source": "independent float64 reference, songmzhang/DSKD@077337a",
            "function": "MinEditDisForwardKLD.forward",
            "configuration": {
                "kd_temperature": temperature,
                "kd_rate": rate,
                "student_vocab": STUDENT,
                "teacher_vocab": TEACHER,
            },
        },
        student_input_ids=ids,
        student_label=labels,
        teacher_input_ids=teacher_ids,
        teacher_label=teacher_labels,
        student_logits=student,
        teacher_logits=teacher,
        tea2stu_id_mapping=np.array(PARTNERS),
        aligned_teacher_logits=targets,
        onehot_fallback=alone,
        batch_denom=denominator,
        loss=value,
        grad_student_logits=gradient,
    )


# bminixhofer/tokenkit


def tokenkit(name: str, seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    lengths, spans = {"student": 8, "teacher": 9}, [[(1, 1), (1, 2), (2, 1), (1, 1), (2, 2)], [(1, 1), (2, 1), (1, 1)]]
    sizes, b = {"student": 11, "teacher": 13}, 2
    ids = {model: rng.integers(size, size=(b, lengths[model])) for model, size in sizes.items()}
    logits = {model: 2 * rng.normal(size=(b, lengths[model], size)) for model, size in sizes.items()}
    chunks = {model: np.zeros((b, lengths[model], 8), bool) for model in sizes}
    masks = {model: np.zeros((b, lengths[model]), bool) for model in sizes}
    for row, found in enumerate(spans):
        for which, model in enumerate(sizes):
            place = 1
            for chunk, span in enumerate(found):
                chunks[model][row, place : place + span[which], chunk] = True
                place += span[which]
            masks[model][row, 2:place] = True
    mapping = rng.integers(sizes["teacher"], size=9)  # two entries are filled up
    takes = np.pad(mapping, (0, sizes["student"] - len(mapping)))
    mask = np.zeros(sizes["student"])
    mask[-1] = np.finfo(np.float32).min
    a, c = (chunks[model].copy() for model in sizes)
    for found, model in ((a, "student"), (c, "teacher")):
        found[:, :-1] &= masks[model][:, 1:, None]

    def last(members: np.ndarray) -> np.ndarray:
        ends = members.copy()
        ends[:, :-1] &= ~members[:, 1:]
        return ends.argmax(1)

    of_a, of_c = a[:, 1:].sum(1), c[:, 1:].sum(1)
    single = (of_c == 1) & (of_a == 1)
    counted = of_c == (1 & (of_a == 1))  # as Python reads what they wrote
    alone, alone_counted = ((a[:, 1:] & ~kept[:, None]).sum(-1) != 0 for kept in (single, counted))
    count = counted.sum() + alone_counted.sum()

    def loss(student: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient = 0.0, np.zeros_like(student)
        for row, chunk in np.argwhere(single):
            at, there = last(a)[row, chunk], last(c)[row, chunk]
            kl, slope = forward_kl(student[row, at], logits["teacher"][row, there, takes] + mask, temperature)
            total, gradient[row, at] = total + kl, gradient[row, at] + slope
        for row, at in np.argwhere(alone):
            target = one_hot(ids["student"][row, at + 1], sizes["student"]) + mask
            kl, slope = forward_kl(student[row, at], target, temperature)
            total, gradient[row, at] = total + kl, gradient[row, at] + slope
        return float(total / count), gradient / count

    ids["student"] %= sizes["student"] - 1  # no token is an entry that the mask leaves out
    value, gradient = held(loss, logits["student"])
    write(
        name,
        {
            "source": "independent float64 reference, bminixhofer/tokenkit@bcacdef",
            "function": "compute_baseline_mined_loss",
            "configuration": {"kd_temp": temperature},
        },
        **{f"{model}_input_ids": ids[model] for model in sizes},
        **{f"{model}_logits": logits[model] for model in sizes},
        **{f"alignment_{model}": chunks[model] for model in sizes},
        **{f"loss_mask_{model}": masks[model] for model in sizes},
        mined_mapping=mapping,
        logit_mask_new=mask,
        report_mined_one_to_one_mask_sum=single.sum(),
        report_mined_onehot_mask_sum=alone.sum(),
        loss=value,
        grad_student_logits=gradient,
    )


if __name__ == "__main__":
    dskd("mined_dskd_kt1.5", 0, temperature=1.5, rate=0.3, denominator=20.0)
    tokenkit("mined_tokenkit_kt2", 1, temperature=2.0)
