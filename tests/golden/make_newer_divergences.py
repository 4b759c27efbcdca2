"""Golden files of ToDi, TAID, AMiD and CSD: what the authors' functions compute, in numpy and float64.

Written anew from their code as it computes, at the commits that `meta_json` names. Gradients are complex steps: what
the authors detach is computed once, at the point itself, and stays. Run in the folder `tests/golden`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Objective = Callable[[Array], Array]
"""Of the student's logits [B, T, V], which may be complex, a number per position."""

RNG = np.random.default_rng(2026)
STUDENT, TEACHER = 2.5 * RNG.normal(size=(2, 2, 5, 9))  # [B, T, V]
LABEL = RNG.integers(9, size=(2, 5))
LABEL[:, :2], LABEL[1, -1] = -100, -100
SCORED = LABEL != -100


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean(values: Array) -> Any:
    """Over the scored positions: the authors' divide by those of the batch."""
    return values[SCORED].sum() / SCORED.sum()


def write(name: str, source: str, function: str, configuration: dict[str, Any], **arrays: Any) -> None:
    meta = {
        "source": f"independent float64 reference, {source}",
        "function": function,
        "configuration": configuration,
    }
    np.savez(Path("arrays") / f"{name}.npz", meta_json=json.dumps(meta), **arrays)


def write_objective(
    name: str, source: str, function: str, configuration: dict[str, Any], objective: Objective, scalar: bool = True
) -> None:
    """`scalar` false: the authors' scalar is a stand-in, of which only the gradient means something."""
    gradient, step = np.zeros_like(STUDENT), 1e-30
    for index in np.ndindex(STUDENT.shape):
        moved = STUDENT.astype(complex)
        moved[index] += 1j * step
        gradient[index] = mean(objective(moved)).imag / step
    outputs: dict[str, Any] = {"loss": mean(objective(STUDENT))} if scalar else {}
    write(
        name,
        source,
        function,
        configuration,
        student_logits=STUDENT,
        teacher_logits=TEACHER,
        label=LABEL,
        grad_student_logits=gradient if scalar else gradient * SCORED.sum(),
        **outputs,
    )


# jungseongryong/ToDi, code/criterions/various_divergence.py


def todi(tau: float, teacher_tau: float = 1.0) -> Objective:
    log_p, at = log_softmax(TEACHER / tau / teacher_tau), log_softmax(STUDENT / tau)
    weight_p = 1 / (1 + np.exp(at - log_p))
    weight_q = 1 / (1 + np.exp(log_p - at))

    def objective(logits: Array) -> Array:
        log_q = log_softmax(logits / tau)
        return (weight_p * np.exp(log_p) * (log_p - log_q) + weight_q * np.exp(log_q) * (log_q - log_p)).sum(-1)

    return objective


# SakanaAI/TAID, src/distil_losses/taid.py and fkl.py


def taid(t: float) -> Objective:
    target = np.exp(log_softmax((1 - t) * STUDENT + t * TEACHER))
    return lambda logits: -(target * log_softmax(logits)).sum(-1)


def taid_ts(losses: Array, t_start: float, t_end: float, alpha: float, beta: float, adaptive: bool) -> Array:
    """t after every call of `update_t` with these losses, `global_step` counting the calls before it."""
    t, previous, momentum, found = t_start, None, 0.0, []
    for step, loss in enumerate(losses):
        if previous is not None:
            momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
            target = t_start + (t_end - t_start) * step / len(losses)
            delta = alpha / (1 + np.exp(-momentum)) * (1 - t)
            t = min(t_end, max(target, t + delta)) if adaptive else target
        previous = loss
        found.append(t)
    return np.array(found)


# aailab-kaist/AMiD, distillm/losses.py


def amid(div_name: str, div_order: str, alpha: float, lam: float) -> Objective:
    log_p = log_softmax(TEACHER)

    def objective(logits: Array) -> Array:
        log_q = log_softmax(logits)
        if alpha >= 1:
            log_r = log_softmax(lam * log_p + (1 - lam) * log_q)
        else:
            power = (1 - alpha) / 2
            log_r = log_softmax(np.log(lam * np.exp(power * log_p) + (1 - lam) * np.exp(power * log_q)) / power)
        named = {"p": log_p, "q": log_q, "r": log_r}
        first, second = (named[letter] for letter in div_order)
        if div_name == "fkl":
            return (np.exp(first) * (first - second)).sum(-1)
        a, b = 0.2, 0.7
        both = np.exp(a * first + b * second).sum(-1)
        ends = a / (a + b) * np.exp((a + b) * first).sum(-1) + b / (a + b) * np.exp((a + b) * second).sum(-1)
        return -(both - ends) / (a * b)

    return objective


# aailab-kaist/CSD, task_agnostic_distillation/csd/losses.py and task_specific_distillation/train/ddp_csd.py


def csd(first: Array, second: Array) -> Objective:
    """The stand-in: with weights [B, T, V] as constants, linear in the logits."""
    error = STUDENT - TEACHER
    by = (error - (first * error).sum(-1, keepdims=True)) * second
    by = (by + (error - (second * error).sum(-1, keepdims=True)) * first) / 2
    return lambda logits: (by * logits).sum(-1)


def jeffrey(logits: Array) -> Array:
    log_p, log_q = log_softmax(TEACHER), log_softmax(logits)
    gap = np.exp(log_p) - np.exp(log_q)
    return -(gap * log_q - gap * log_p).sum(-1)


def main() -> None:
    source = "jungseongryong/ToDi@45f1f8bf"
    write_objective("todi_kt1", source, "compute_ToDi", {"kd_temperature": 1.0}, todi(1.0))
    temperatures = {"kd_temperature": 2.0, "teacher_temperature": 1.5, "use_tea_temp": True}
    write_objective("todi_kt2_tt1.5", source, "compute_ToDi", temperatures, todi(2.0, 1.5))

    source = "SakanaAI/TAID@a0628922"
    write_objective("taid_t0.4", source, "TAID.compute_loss", {"t": 0.4}, taid(0.4))
    losses = np.array([3.0, 2.4, 2.5, 1.7, 1.1, 1.2, 0.8, 0.3])
    schedule = {"t_start": 0.2, "t_end": 0.9, "alpha": 0.25, "beta": 0.9}
    for adaptive in (True, False):
        write(
            f"taid_update_{'adaptive' if adaptive else 'linear'}",
            source,
            "TAID.update_t",
            {**schedule, "disable_adaptive": not adaptive},
            losses=losses,
            t=taid_ts(losses, **schedule, adaptive=adaptive),
        )

    source = "aailab-kaist/AMiD@a9631059"
    for div_name, div_order, alpha, lam in (("fkl", "pr", -3.0, 0.3), ("fkl", "rq", 1.0, 0.6), ("ab", "qr", 0.5, 0.5)):
        configuration = {"amid_div_name": div_name, "amid_div_order": div_order, "amid_alpha": alpha, "amid_lam": lam}
        objective = amid(div_name, div_order, alpha, lam)
        write_objective(f"amid_{div_name}_{div_order}_a{alpha:g}", source, "amid", configuration, objective)

    source = "aailab-kaist/CSD@c77a3a7d"
    write_objective("jeffreys_csd", source, "jeffrey", {}, jeffrey)
    uniform, p = np.full_like(TEACHER, 1 / TEACHER.shape[-1]), np.exp(log_softmax(TEACHER))
    q = np.exp(log_softmax(STUDENT))
    tempered = np.exp(log_softmax(STUDENT / 1.5))
    mixed = 0.3 * p + 0.7 * q
    for name, function, configuration, first, second in (
        ("csd_t1.5", "csd", {"temp": 1.5}, tempered, tempered),
        ("csd_us", "csd_weighting_function", {"type": "US"}, uniform, q),
        ("csd_ts", "csd_weighting_function", {"type": "TS"}, p, q),
        ("csd_ts_mix", "CSD_TS_mix.forward", {"alpha": 0.3}, mixed, mixed),
    ):
        write_objective(name, source, function, configuration, csd(first, second), scalar=False)


if __name__ == "__main__":
    main()
