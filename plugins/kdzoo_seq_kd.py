"""Sequence-level knowledge distillation: the student learns the teacher's own answers, which a stage generates."""

from __future__ import annotations

from typing import Any, Literal

from kdzoo import Logits, Loss, Needs, Params, Register, Terms, hookimpl, ops, visit


class SeqKD(Loss):
    """Cross-entropy on the tokens of the teacher's own answers.

    The stage `answers` generates them once, greedily or as the likeliest of several samples, and puts them in the place
    of the data's responses, in all rows of `distill` or in a share of them. Answers are text: each model reads them in
    its own tokens. Any other loss of `distill` sees the same rows, such as `forward_kl` for the paper's word level.
    """

    name = "seq_kd"
    paper = "Kim & Rush, Sequence-Level Knowledge Distillation, EMNLP 2016, arxiv.org/abs/1606.07947"
    formula = "L = - 1/N sum_i log q_i(y_i), y = argmax_y log p(y | prompt) as far as the teacher's decoding finds it"
    deviations = (
        "The authors' answer is the best hypothesis of beam search that has ended, by the sum of its log-probabilities "
        "(harvardnlp/seq2seq-attn@2d36b43, s2sa/beam.lua). Here it is the greedy answer, or by the same sum the "
        "likeliest of one sample per seed of `stages.answers.decoding`.",
        "To train on the data too, the paper weighs two terms, (1 - alpha) on the data's response and alpha on the "
        "teacher's answer to the same prompt. Here each row has one response, and `stages.answers.share` is the share "
        "of rows that have the teacher's. The paper's sequence-level interpolation, which picks the hypothesis most "
        "similar to the data's response, is not offered.",
        'The authors divide by the sequences of the batch (train.lua): `reduction` "sequences".',
        "An answer that was cut is learnt without an end. A row whose answer is empty keeps the data's response.",
    )

    class Params(Params):
        reduction: Literal["tokens", "sequences"] = "tokens"
        """What the sum over tokens is divided by: the response tokens of the step, or its sequences."""

    @classmethod
    def needs(cls, params: Any, same_tokens: bool) -> Needs:
        return Needs(answers=True)

    @visit
    def answer(self, student: Logits) -> Terms:
        log_q = student.logprobs()
        nll = ops.cross_entropy(log_q, student.labels)
        right = ops.is_top(log_q.detach(), student.labels)
        return Terms().add("seq_kd", nll, per=self.params.reduction).watch("token_accuracy", right, len(student))


@hookimpl
def register_plugins(register: Register) -> None:
    register(SeqKD)
