"""The order of a run, from a recipe to scores: read it from top to bottom to know what a run does."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from kdzoo.data.collate import build_examples
from kdzoo.engine import distributed
from kdzoo.engine.close import release
from kdzoo.engine.distributed import barrier, from_rank_0, rank, world
from kdzoo.engine.frozen import FrozenModel
from kdzoo.plugin.registry import load_plugins
from kdzoo.recipe.load import LoadedRecipe
from kdzoo.recipe.model import Answers
from kdzoo.run import messages
from kdzoo.run.answers import AnsweredRows, answered_rows
from kdzoo.run.artifacts import make_artifacts, single_model
from kdzoo.run.card import write_model_card
from kdzoo.run.context import RunContext, Weights, open_context, open_frozen
from kdzoo.run.export import save_trained
from kdzoo.run.folder import RunFolder
from kdzoo.run.inputs import Corpus, SourceRows, StageInputs, columns_fingerprint, tokenise
from kdzoo.run.overview import of_rows, overview
from kdzoo.run.progress import print_message, print_scores
from kdzoo.run.resolved import ResolvedRecipe, resolve_recipe
from kdzoo.run.scoring import RunScores
from kdzoo.run.trackers import Trackers
from kdzoo.run.trainer import train_stage


def run_recipe(loaded: LoadedRecipe, out: Path | None) -> None:
    """Every stage of the recipe on this rank, and the run folder on rank 0."""
    device = distributed.start()
    folder = RunFolder.create(loaded.recipe.title, out) if rank() == 0 else None
    path = Path(from_rank_0(str(folder.path) if folder is not None else ""))
    try:
        context = open_context(loaded.recipe, load_plugins(loaded.plugin_files), device)
        run = Run(context, resolve_recipe(context), loaded, folder, path)
        run.tokenise()
        if folder is not None:
            folder.write_recipe(loaded.resolved)
            folder.write_environment(
                {"ranks": world(), "device_of_rank_0": str(device), "data": run.data_fingerprints()}
            )
        with run.trackers.open(loaded) if folder is not None else nullcontext():
            run.train_and_evaluate()
    except BaseException:
        if folder is not None:
            folder.discard_if_unused()
        raise


class Run:
    """One run on one rank. `folder` is there on rank 0 alone; `path` is the same everywhere."""

    corpus: Corpus
    held_out: Corpus | None
    answered: AnsweredRows | None = None
    """The rows of `distill` once they have the teacher's answers, where the recipe asks for them."""

    def __init__(
        self,
        context: RunContext,
        resolved: ResolvedRecipe,
        loaded: LoadedRecipe,
        folder: RunFolder | None,
        path: Path,
    ) -> None:
        self.context = context
        self.resolved = resolved
        self.loaded = loaded
        self.recipe = loaded.recipe
        self.folder = folder
        self.path = path
        self.scores = RunScores(context, resolved.sets, folder)
        self.trackers = Trackers(context.registry, path)

    def tokenise(self) -> None:
        """All rows for both models: what is wrong with the data shows before anything is trained."""
        for source in self.resolved.sets.values():
            for role in (self.context.student, self.context.teacher):
                build_examples(source.rows, None, role.encoder, None, False, source.address)
        self.corpus = self.for_both_models(self.resolved.distill.source, self.resolved.distill.losses.columns)
        for stage, role in (("teacher", self.context.teacher), ("sft", self.context.student)):
            alone = self.resolved.alone.get(stage)
            if alone is not None and alone.losses.columns:
                columns = alone.losses.columns
                build_examples(alone.source.rows, role.encoder, None, None, False, alone.source.address, columns)
        held_out = self.resolved.held_out
        self.held_out = None if held_out is None else self.for_both_models(held_out)
        for text in overview(self.context, self.resolved.distill.losses, self.corpus):
            self.print(text)

    def for_both_models(self, source: SourceRows, columns: Sequence[str] = ()) -> Corpus:
        student, teacher = self.context.student, self.context.teacher
        return tokenise(self.context, source, student=student, teacher=teacher, columns=columns)

    def data_fingerprints(self) -> dict[str, str]:
        """A hash of the rows of every source, by its place in the recipe."""
        train, columns = self.resolved.distill.source, self.resolved.distill.losses.columns
        found = {"data.train": train.fingerprint}
        if columns:
            found["data.train, columns"] = columns_fingerprint(train.rows, columns)
        if self.resolved.held_out is not None:
            found["data.held_out"] = self.resolved.held_out.fingerprint
        return found | {source.address: source.fingerprint for source in self.resolved.sets.values()}

    def train_and_evaluate(self) -> None:
        """The stages in their order, then every model on every set."""
        stages, scores, model = self.resolved.alone, self.scores, self.context.teacher.model
        teacher, teacher_key = Weights(model.folder, model.adapter), model.fingerprint
        if "teacher" in stages:
            trained = single_model(self.context, stages["teacher"], self.context.teacher, model.folder, self.log)
            teacher, teacher_key = Weights(trained), trained.name
            self.context = self.context.with_teacher_in(trained)
        student = self.context.student
        untrained, sft = student.model.folder, None
        if "sft" in stages:
            sft = single_model(self.context, stages["sft"], student, untrained, self.log)

        if self.resolved.answers is not None:
            self.answer(self.resolved.answers, teacher, teacher_key)
        self.distill(teacher, teacher_key, untrained, sft)

        scores.copy_inputs()
        scores.evaluate("teacher", teacher, self.context.teacher, teacher_key)
        scores.evaluate("untrained student", Weights(untrained), student, student.model.fingerprint)
        if sft is not None:
            scores.evaluate("student, data alone", Weights(sft), student, sft.name)
        scores.evaluate("student", self.exported(untrained), student, None)
        self.finish()

    def answer(self, stage: Answers, teacher: Weights, teacher_key: str) -> None:
        """Rows of `distill` get the teacher's own answers as their responses."""
        context, source = self.context, self.corpus.source

        def open_teacher() -> FrozenModel:
            model = open_frozen(context, teacher, always_sharded=False)
            self.scores.measure_teacher(model, source.rows)  # one that knows nothing has nothing to answer
            return model

        answered = self.answered = answered_rows(context, stage, source, teacher_key, open_teacher)
        self.log("answers", 1, answered.metrics())
        if self.folder is not None:
            self.folder.write_answers(answered.to_json())
        self.corpus = self.for_both_models(answered.source, self.resolved.distill.losses.columns)
        if not context.same_tokens:
            for text in of_rows(context, self.resolved.distill.losses, self.corpus):
                self.print(messages.with_answers(text))

    def distill(self, teacher_weights: Weights, teacher_key: str, untrained: Path, sft: Path | None) -> None:
        """The stage that all this is for: teacher and student together; leaves the trained student's folder."""
        context, student = self.context, self.context.student
        teacher = open_frozen(context, teacher_weights, always_sharded=True)
        self.scores.measure_teacher(teacher, self.resolved.distill.source.rows)
        artifacts = make_artifacts(context, self.resolved, teacher, teacher_key, self.log)
        inputs = StageInputs(student, untrained, teacher, self.corpus, artifacts)
        engine, _ = train_stage(context, self.resolved.distill, inputs, self.log, self.path / "checkpoints")
        state = engine.state("student.", trained_only=student.lora is not None)
        if rank() == 0:
            save_trained(self.path / "student", untrained, student, state, self.keeps_adapter)
        engine.close()
        del engine, state
        release()
        barrier()
        if self.held_out is not None:
            alone = {} if sft is None else {"student, data alone": Weights(sft)}
            self.scores.read_held_out({**alone, "student": self.exported(untrained)}, teacher, self.held_out)
        teacher.close()
        del teacher, inputs
        release()
        barrier()

    @property
    def keeps_adapter(self) -> bool:
        """Whether the run leaves the student's adapter by itself."""
        return self.recipe.student.lora is not None and self.recipe.student.lora.export == "adapter"

    def exported(self, untrained: Path) -> Weights:
        """The student as the run leaves it."""
        folder = self.path / "student"
        return Weights(untrained, folder) if self.keeps_adapter else Weights(folder)

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        if self.folder is not None:
            self.folder.log_step({"step": step, **metrics}, stage)
            self.trackers.step_logged(step, metrics, stage)

    def print(self, text: str) -> None:
        print_message(text, enabled=rank() == 0)

    def finish(self) -> None:
        """Scores, the student's card and the table, from rank 0."""
        if self.folder is None:
            return
        scores, context = self.scores.in_order, self.context
        self.folder.write_scores(scores)
        losses = [
            (term.name, term.entry.use, term.loss.paper, term.loss.formula, term.entry.weight)
            for term in self.resolved.distill.losses
        ]
        trained_on = self.resolved.distill.source
        train = trained_on.source
        write_model_card(
            self.folder.student,
            self.recipe.title,
            context.student.model.description,
            losses,
            self.loaded.path.name,
            scores,
            teacher=context.teacher.model.description,
            data=messages.trained_on(
                len(trained_on.rows),
                str(train.lab or train.set or train.jsonl or train.dataset),
                0 if self.answered is None else self.answered.replaced,
            ),
            base_model=self.recipe.student.name,
            lora=self.recipe.student.lora,
        )
        print_scores(scores)
        self.print(messages.run_folder(self.path))
