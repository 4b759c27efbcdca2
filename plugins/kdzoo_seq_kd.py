"""Sequence-level knowledge distillation: the student learns the teacher's own answers, which a stage generates."""

from __future__ import annotations

from typing import Any

from kdzoo import Logits, Loss, Needs, Register, Terms, hookimpl, ops, visit


class SeqKD(Loss):
    """Cross-entropy on the tokens of the teacher's own answers.

    The stage `answers` generates them, greedily or as the likeliest of several samples, and puts them in the place of
    the data's responses, of all rows or of a share. Two tokenizers are no obstacle: answers are text.
    """

    name = "seq_kd"
    paper = "Kim & Rush, Sequence-Level Knowledge Distillation, EMNLP 2016, arxiv.org/abs/1606.07947"
    formula = "L = - 1/N sum_i log q_i(y_i), y = argmax_y p(y | prompt) as the teacher finds it"
    deviations = (
        "The paper's mode is the best hypothesis of beam search (width 5). Here it is the greedy answer, or the "
        "likeliest of the samples of `stages.answers.decoding.seeds`.",
        "The paper mixes the data in by weights, (1 - alpha) for the data's response and alpha for the teacher's "
        "answer of every row. Here `stages.answers.share` mixes by rows, each of which has one response; the data's "
        "rows count as much as the others.",
        "Sequence-level interpolation, which takes the hypothesis most similar to the data's response, is not there.",
        "An answer that was cut is learnt without an end; a row whose answer is empty keeps the data's response.",
    )

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(answers=True)

    @visit
    def answer(self, student: Logits) -> Terms:
        log_q = student.logprobs()
        nll = ops.cross_entropy(log_q, student.labels)
        right = ops.is_top(log_q.detach(), student.labels)
        return Terms().add("seq_kd", nll).watch("token_accuracy", right, len(student))


@hookimpl
def register_plugins(register: Register) -> None:
    register(SeqKD)
