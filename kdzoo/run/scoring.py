"""What the models of a run score: on the evaluation sets, with scores kept in the cache, and on the held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kdzoo
from kdzoo.cache import cached_folder, cached_path
from kdzoo.data.rows import Row
from kdzoo.engine.close import release
from kdzoo.engine.distributed import barrier, from_rank_0, rank, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.errors import ModelError
from kdzoo.evaluate import COPY, HELD_OUT, ModelScores, Scores
from kdzoo.evaluate.scoring import Answer, Scored, copied_input, read_gold, score_model
from kdzoo.evaluate.verdict import read_beside_teacher
from kdzoo.run import messages
from kdzoo.run.context import ModelRole, RunContext, Weights, open_frozen
from kdzoo.run.folder import RunFolder
from kdzoo.run.inputs import Corpus, SourceRows, deal, encoding_key
from kdzoo.run.progress import print_message
from kdzoo.run.sets import score_sets

MEASURED = 256
"""Training rows, at most, that the teacher is measured on."""


class RunScores:
    """The scores of a run's models, and their answers in its folder (on rank 0)."""

    def __init__(self, context: RunContext, sets: Mapping[str, SourceRows], folder: RunFolder | None) -> None:
        self.context = context
        self.sets = sets
        self.folder = folder
        self.scores: dict[str, dict[str, ModelScores]] = {}

    @property
    def in_order(self) -> Scores:
        """The training rows, the held-out rows, then the evaluation sets as the recipe has them."""
        return {name: self.scores[name] for name in ("train", HELD_OUT, *self.sets) if name in self.scores}

    def measure_teacher(self, teacher: FrozenModel, rows: Sequence[Row]) -> None:
        """How well the teacher predicts the training rows, once. Raises ModelError for one that knows nothing."""
        if "train" in self.scores:
            return
        context = self.context
        batch = context.recipe.evaluation.batch
        measured = rows[: min(MEASURED, batch * 8)]
        entropy, accuracy = read_gold(teacher, context.teacher.encoder, measured, batch, "data.train")
        if not entropy < math.log(teacher.info.vocab_size):
            trained = "teacher" in context.recipe.stages
            address, advice = (
                ("stages.teacher", "train it longer, or at another rate")
                if trained
                else ("teacher", "is it the right folder, with its weights?")
            )
            raise ModelError(
                f"{address}: the teacher's cross-entropy on the training rows is {entropy:.2f} nats per token, no "
                f"better than a uniform guess ({math.log(teacher.info.vocab_size):.2f}); {advice}"
            )
        self.scores["train"] = {"teacher": ModelScores(rouge_l={}, cross_entropy=entropy, token_accuracy=accuracy)}
        print_message(messages.teacher_accuracy(accuracy), enabled=rank() == 0)

    def read_held_out(self, students: Mapping[str, Weights], teacher: FrozenModel, held_out: Corpus) -> None:
        """Each student's cross-entropy on the held-out rows, where the teacher is right and where it is wrong."""
        stage = self.context.recipe.stages["distill"]
        size = max(1, (stage.micro_batch or stage.batch) // world())
        dealt = deal(len(held_out.examples), size)
        for name, weights in students.items():
            student = open_frozen(self.context, weights, always_sharded=False)
            batches = (held_out.batches[indices] for indices in dealt)
            self.scores.setdefault(HELD_OUT, {})[name] = read_beside_teacher(student, teacher, batches)
            student.close()
            del student
            release()
            barrier()

    def copy_inputs(self) -> None:
        """The scores of an answer that repeats the input."""
        for name, source in self.sets.items():
            self._keep(name, COPY, copied_input(source.rows, self.context.recipe.evaluation.decoding))

    def evaluate(self, name: str, weights: Weights, role: ModelRole, key: str | None) -> None:
        """Score one model on every set; with a `key` (what the model was made from) scores are kept in the cache."""
        missing: dict[str, SourceRows] = {}
        for set_name, source in self.sets.items():
            path = cached_path("scores", self._key(source, role, key)) / "scored.json"
            if key is not None and from_rank_0(path.exists()):
                self._keep(set_name, name, _read_scored(path))
            else:
                missing[set_name] = source
        if missing:
            self._generate_and_read(name, weights, role, key, missing)
            release()
            barrier()

    def _generate_and_read(
        self, name: str, weights: Weights, role: ModelRole, key: str | None, sets: Mapping[str, SourceRows]
    ) -> None:
        """Loads the model; when this returns, nothing holds it."""
        evaluation = self.context.recipe.evaluation
        model = open_frozen(self.context, weights, always_sharded=False)

        def score(set_name: str, rows: Sequence[Row], on_done: Callable[[int], None]) -> Scored:
            return score_model(model, role.encoder, rows, evaluation, sets[set_name].address, on_done)

        rows = {set_name: source.rows for set_name, source in sets.items()}
        for set_name, scored in score_sets(f"evaluate {name}", rows, evaluation.decoding, score):
            self._keep(set_name, name, scored)
            if key is not None and rank() == 0:
                _write_scored(self._key(sets[set_name], role, key), scored)
        model.close()

    def _key(self, source: SourceRows, role: ModelRole, key: str | None) -> dict[str, Any]:
        """What the scores of a model on a set depend on."""
        recipe = self.context.recipe
        return {
            "kdzoo": kdzoo.__version__,
            "model": key,
            "rows": source.fingerprint,
            "encoding": encoding_key(self.context, role),
            "evaluation": recipe.evaluation.model_dump(mode="json", exclude={"sets"}),
            "precision": recipe.precision,
        }

    def _keep(self, set_name: str, model: str, scored: Scored) -> None:
        self.scores.setdefault(set_name, {})[model] = scored.scores
        if self.folder is not None:
            for decoding, answers in scored.answers.items():
                self.folder.write_predictions(set_name, model, decoding, answers)


def _read_scored(path: Path) -> Scored:
    found = json.loads(path.read_text())
    answers = {decoding: [Answer(**answer) for answer in kept] for decoding, kept in found["answers"].items()}
    return Scored(found["scores"], answers)


def _write_scored(content: Mapping[str, Any], scored: Scored) -> None:
    answers = {decoding: [asdict(answer) for answer in found] for decoding, found in scored.answers.items()}

    def build(out: Path) -> None:
        text = json.dumps({"scores": scored.scores, "answers": answers}, ensure_ascii=False)
        (out / "scored.json").write_text(text, encoding="utf-8")

    cached_folder("scores", content, build)
