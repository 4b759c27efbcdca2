"""A recipe from its first stage to its scores: read this file to know what a run does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import kdzoo
from kdzoo.cache import cached_folder, cached_path
from kdzoo.data.collate import Example, build_examples
from kdzoo.data.rows import Row, load_rows
from kdzoo.engine import distributed
from kdzoo.engine.close import release
from kdzoo.engine.distributed import barrier, from_rank_0, rank, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.errors import ModelError
from kdzoo.evaluate import COPY, HELD_OUT, ModelScores
from kdzoo.evaluate.scoring import Answer, Scored, copied_input, read_gold, score_model
from kdzoo.evaluate.verdict import read_beside_teacher
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.load import LoadedRecipe
from kdzoo.run.card import write_model_card
from kdzoo.run.export import save_trained
from kdzoo.run.folder import RunFolder
from kdzoo.run.followers import Followers
from kdzoo.run.progress import print_scores, say
from kdzoo.run.session import (
    Party,
    Session,
    Weights,
    corpus,
    encoding_key,
    experts,
    open_session,
    rows_fingerprint,
    shared_entries,
    sizes,
)
from kdzoo.run.sets import Sets, score_sets
from kdzoo.run.stages import (
    LOOKED_AT,
    Ground,
    artefact_stage,
    deal,
    make_artefact,
    open_frozen,
    single_model,
    stage_losses,
    train_stage,
)


def run_recipe(loaded: LoadedRecipe, out: Path | None) -> None:
    """Every stage of the recipe on this rank, and the run folder on rank 0."""
    device = distributed.start()
    folder = RunFolder.create(loaded.recipe.title, out) if rank() == 0 else None
    path = Path(from_rank_0(str(folder.path) if folder is not None else ""))
    try:
        session = open_session(loaded.recipe, load_plugins(loaded.plugin_files), device)
        run = Run(session, loaded, folder, path)
        run.read_everything()
        if folder is not None:
            folder.write_recipe(loaded.resolved)
            folder.write_environment(
                {"ranks": world(), "device_of_rank_0": str(device), "data": run.data_fingerprints()}
            )
        with run.followers.following(loaded) if folder is not None else nullcontext():
            run.all_stages()
    except BaseException:
        if folder is not None:
            folder.discard_if_unused()
        raise


class Run:
    """One run on one rank. `folder` is there on rank 0 alone; `path` is the same everywhere."""

    def __init__(self, session: Session, loaded: LoadedRecipe, folder: RunFolder | None, path: Path) -> None:
        self.session = session
        self.loaded = loaded
        self.recipe = loaded.recipe
        self.folder = folder
        self.path = path
        self.scores: dict[str, dict[str, ModelScores]] = {}
        self.followers = Followers(session.registry, path)

    def read_everything(self) -> None:
        """All rows, tokenised: what is wrong with the data is told before anything is trained."""
        session, recipe = self.session, self.recipe
        self.sets: Sets = {n: load_rows(s, f"evaluation.sets.{n}") for n, s in recipe.evaluation.sets.items()}
        for name, rows in self.sets.items():
            for party in (session.student, session.teacher):
                build_examples(rows, None, party.encoder, None, False, f"evaluation.sets.{name}")
        for name, stage in recipe.stages.items():
            if stage.data is not None and name != "distill":
                load_rows(stage.data, f"stages.{name}.data")
        own = recipe.stages["distill"].data
        address = "data.train" if own is None else "stages.distill.data"
        source = own or recipe.data.train
        both = partial(corpus, session, student=session.student, teacher=session.teacher)
        self.rows = both(source, address)
        held_out = recipe.data.held_out
        self.held_out = None if held_out is None else both(held_out, "data.held_out")
        for name in ("teacher", "sft"):
            if name in recipe.stages:
                stage_losses(session, name, recipe.stages[name])
        for needs in session.needs(recipe.losses).values():
            for name in needs.artefacts:
                artefact_stage(session, name)
        self.say_alignment(self.rows.examples)
        self.say_fusions()

    def data_fingerprints(self) -> dict[str, str]:
        """A hash of the rows of every source, by its place in the recipe."""
        found = {"data.train": self.rows.fingerprint}
        if self.held_out is not None:
            found["data.held_out"] = self.held_out.fingerprint
        return found | {f"evaluation.sets.{name}": rows_fingerprint(rows) for name, rows in self.sets.items()}

    def all_stages(self) -> None:
        session, stages = self.session, self.recipe.stages
        teacher = Weights(session.teacher.model.folder, session.teacher.model.adapter)
        teacher_key = session.teacher.model.fingerprint
        if "teacher" in stages:
            trained = single_model(session, "teacher", stages["teacher"], session.teacher, teacher.folder, self.log)
            teacher, teacher_key = Weights(trained), trained.name
            session.place_student(trained)
        untrained, sft = session.student.model.folder, None
        if "sft" in stages:
            sft = single_model(session, "sft", stages["sft"], session.student, untrained, self.log)

        self.distill(teacher, teacher_key, untrained, sft)

        for name, found in self.sets.items():
            self.keep(name, COPY, copied_input(found, self.recipe.evaluation.decoding))
        self.evaluate("teacher", teacher, session.teacher, teacher_key)
        self.evaluate("untrained student", Weights(untrained), session.student, session.student.model.fingerprint)
        if sft is not None:
            self.evaluate("student, data alone", Weights(sft), session.student, sft.name)
        self.evaluate("student", self.exported(untrained), session.student, None)
        self.finish()

    @property
    def keeps_adapter(self) -> bool:
        """Whether the run leaves the student's adapter by itself."""
        return self.recipe.student.lora is not None and self.recipe.student.lora.export == "adapter"

    def exported(self, untrained: Path) -> Weights:
        """The student as the run leaves it."""
        folder = self.path / "student"
        return Weights(untrained, folder) if self.keeps_adapter else Weights(folder)

    def distill(self, teacher_weights: Weights, teacher_key: str, untrained: Path, sft: Path | None) -> None:
        """The stage that all this is for: teacher and student together; leaves the trained student's folder."""
        session = self.session
        teacher = open_frozen(session, teacher_weights, always_sharded=True)
        self.judge_teacher(teacher)
        artefacts = {
            slot: {
                name: make_artefact(
                    session, name, insists, self.recipe.losses[slot].fuse, teacher, teacher_key, self.log
                ).state
                for name, insists in needs.artefacts.items()
            }
            for slot, needs in session.needs(self.recipe.losses).items()
        }
        ground = Ground(session.student, untrained, teacher, self.rows, artefacts)
        stage = self.recipe.stages["distill"]
        engine, _ = train_stage(
            session, "distill", stage, self.recipe.losses, ground, self.log, self.path / "checkpoints"
        )
        state = engine.state("student.", trained_only=session.student.lora is not None)
        if rank() == 0:
            save_trained(self.path / "student", untrained, session.student, state, self.keeps_adapter)
        engine.close()
        del engine, state
        release()
        barrier()
        self.read_held_out(
            {"student, data alone": None if sft is None else Weights(sft), "student": self.exported(untrained)}, teacher
        )
        teacher.close()
        del teacher, ground
        release()
        barrier()

    def read_held_out(self, students: Mapping[str, Weights | None], teacher: FrozenModel) -> None:
        """Each student's cross-entropy on the held-out rows, apart where the teacher is right and where it is wrong."""
        if self.held_out is None:
            return
        stage = self.recipe.stages["distill"]
        size = max(1, (stage.micro_batch or stage.batch) // world())
        dealt = deal(len(self.held_out.examples), size)
        for name, weights in students.items():
            if weights is not None:
                student = open_frozen(self.session, weights, always_sharded=False)
                batches = (self.held_out.collate(indices) for indices in dealt)
                self.scores.setdefault(HELD_OUT, {})[name] = read_beside_teacher(student, teacher, batches)
                student.close()
                del student
                release()
                barrier()

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        if self.folder is not None:
            self.folder.log_step({"step": step, **metrics}, stage)
            self.followers.step_logged(step, metrics, stage)

    def say(self, text: str) -> None:
        say(text, enabled=rank() == 0)

    def say_alignment(self, examples: Sequence[Example]) -> None:
        if self.session.same_tokens:
            self.say(f"{len(examples)} training rows; teacher and student share one tokenizer")
            student, teacher = (
                sizes(party.model.folder, self.session).vocabulary
                for party in (self.session.student, self.session.teacher)
            )
            if (entries := shared_entries(self.session, student, teacher)) is not None:
                self.say(
                    f"their heads are padded, the student's to {student:,} entries and the teacher's to {teacher:,}; "
                    f"the {entries:,} of the tokenizer are compared"
                )
            return
        alignments = [e.alignment for e in examples if e.alignment is not None]
        in_spans = sum(end - start for alignment in alignments for start, end, _, _ in alignment.spans)
        in_pairs = sum(len(alignment.pairs) for alignment in alignments)
        tokens = sum(len(e.student.ends) for e in examples if e.student)
        self.say(
            f"{len(examples)} training rows; two tokenizers, {in_spans / tokens:.1%} of the student's response tokens "
            f"lie in aligned spans and {in_pairs / tokens:.1%} in pairs ('{self.recipe.align.use}'"
            f"{self.readers_of_alignment()})"
        )

    def readers_of_alignment(self) -> str:
        """Which losses read pairs or spans."""
        readers = [f"'{name}'" for name, needs in self.session.needs(self.recipe.losses).items() if needs.aligned]
        return f"; read by {', '.join(readers)}" if readers else "; no loss reads them"

    def say_fusions(self) -> None:
        """Which losses read which state of a mixture of experts; a fusion that has nothing to fuse."""
        count, losses = experts(self.session), self.recipe.losses
        if not count:
            for name in sorted({slot.fuse for slot in losses.values() if slot.fuse is not None}):
                self.say(f"fuse.{name}: the teacher is no mixture of experts; its own state is read")
            return
        readers = [name for name, needs in self.session.needs(losses).items() if needs.teacher]
        told = [
            f"'{name}' reads " + (f"'{self.recipe.fuse[fuse].use}'" if fuse else "its own state")
            for name, fuse in ((name, losses[name].fuse) for name in readers)
        ]
        self.say("; ".join([f"teacher: a mixture of {count} experts", *told]))

    def judge_teacher(self, teacher: FrozenModel) -> None:
        """How much of the gold text the teacher itself would not say; refuse one that knows nothing."""
        rows = self.rows.rows[: min(LOOKED_AT, self.recipe.evaluation.batch * 8)]
        encoder = self.session.teacher.encoder
        entropy, accuracy = read_gold(teacher, encoder, rows, self.recipe.evaluation.batch, "data.train")
        if not entropy < math.log(teacher.facts.vocabulary):
            trained = "teacher" in self.recipe.stages
            address, advice = (
                ("stages.teacher", "train it longer, or at another rate")
                if trained
                else ("teacher", "is it the right folder, with its weights?")
            )
            raise ModelError(
                f"{address}: the teacher's cross-entropy on the training rows is {entropy:.2f} nats per token, no "
                f"better than a uniform guess ({math.log(teacher.facts.vocabulary):.2f}); {advice}"
            )
        self.scores["train"] = {"teacher": ModelScores(rouge_l={}, cross_entropy=entropy, token_accuracy=accuracy)}
        self.say(f"teacher: wrong on {1 - accuracy:.1%} of the response tokens of the training rows")

    def evaluate(self, name: str, weights: Weights, party: Party, key: str | None) -> None:
        """Score one model on every set; with a `key` (what the model was made from) scores are kept in the cache."""
        missing = []
        for set_name, rows in self.sets.items():
            path = cached_path("scores", self.score_key(rows, party, key)) / "scored.json"
            if key is not None and from_rank_0(path.exists()):
                found = json.loads(path.read_text())
                answers = {
                    decoding: [Answer(**answer) for answer in kept] for decoding, kept in found["answers"].items()
                }
                self.keep(set_name, name, Scored(found["scores"], answers))
            else:
                missing.append(set_name)
        if missing:
            self.generate_and_read(name, weights, party, key, {set_name: self.sets[set_name] for set_name in missing})
            release()
            barrier()

    def generate_and_read(self, name: str, weights: Weights, party: Party, key: str | None, sets: Sets) -> None:
        """Loads the model; when this returns, nothing holds it."""
        evaluation = self.recipe.evaluation
        model = open_frozen(self.session, weights, always_sharded=False)

        def score(set_name: str, rows: Sequence[Row], on_done: Callable[[int], None]) -> Scored:
            return score_model(model, party.encoder, rows, evaluation, f"evaluation.sets.{set_name}", on_done)

        for set_name, scored in score_sets(f"evaluate {name}", sets, evaluation.decoding, score):
            self.keep(set_name, name, scored)
            if key is not None and rank() == 0:
                keep_scored(self.score_key(sets[set_name], party, key), scored)
        model.close()

    def score_key(self, rows: Sequence[Row], party: Party, key: str | None) -> dict[str, Any]:
        """What the scores of a model on a set depend on."""
        return {
            "kdzoo": kdzoo.__version__,
            "model": key,
            "rows": rows_fingerprint(rows),
            "encoding": encoding_key(self.session, party),
            "evaluation": self.recipe.evaluation.model_dump(mode="json", exclude={"sets"}),
            "precision": self.recipe.precision,
        }

    def keep(self, set_name: str, model: str, scored: Scored) -> None:
        self.scores.setdefault(set_name, {})[model] = scored.scores
        if self.folder is not None:
            for decoding, answers in scored.answers.items():
                self.folder.write_predictions(set_name, model, decoding, answers)

    def finish(self) -> None:
        if self.folder is None:
            return
        ordered = {name: self.scores[name] for name in ("train", HELD_OUT, *self.sets) if name in self.scores}
        self.folder.write_scores(ordered)
        registry = self.session.registry
        losses = [
            (name, slot.use, registry.losses[slot.use].paper, registry.losses[slot.use].formula, slot.weight)
            for name, slot in self.recipe.losses.items()
        ]
        train = self.recipe.stages["distill"].data or self.recipe.data.train
        write_model_card(
            self.folder.student,
            self.recipe.title,
            self.session.student.model.description,
            losses,
            self.loaded.path.name,
            ordered,
            teacher=self.session.teacher.model.description,
            data=f"{len(self.rows.rows)} rows of '{train.lab or train.set or train.jsonl or train.dataset}'",
            base_model=self.recipe.student.name,
            lora=self.recipe.student.lora,
        )
        print_scores(ordered)
        self.say(f"run folder: {self.path}")


def keep_scored(content: Mapping[str, Any], scored: Scored) -> None:
    """Into the cache, for `Run.evaluate` to find."""
    answers = {decoding: [asdict(answer) for answer in found] for decoding, found in scored.answers.items()}

    def build(out: Path) -> None:
        text = json.dumps({"scores": scored.scores, "answers": answers}, ensure_ascii=False)
        (out / "scored.json").write_text(text, encoding="utf-8")

    cached_folder("scores", content, build)
