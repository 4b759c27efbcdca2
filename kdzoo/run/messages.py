"""Every sentence that a run prints, as pure functions from data to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def one_tokenizer(rows: int) -> str:
    return f"{rows} training rows; teacher and student share one tokenizer"


def padded_heads(student: int, teacher: int, compared: int) -> str:
    """Sizes of both heads, and how many entries of them are compared."""
    return (
        f"their heads are padded, the student's to {student:,} entries and the teacher's to {teacher:,}; "
        f"the {compared:,} of the tokenizer are compared"
    )


def two_tokenizers(rows: int, in_spans: float, in_pairs: float, aligner: str, readers: Sequence[str]) -> str:
    """Shares of the student's response tokens, 0 to 1; `readers` are the losses that read pairs or spans."""
    read_by = f"read by {_quoted(readers)}" if readers else "no loss reads them"
    return (
        f"{rows} training rows; two tokenizers, {in_spans:.1%} of the student's response tokens lie in aligned spans "
        f"and {in_pairs:.1%} in pairs ('{aligner}'; {read_by})"
    )


def mapped_entries(model: str, mapped: int, entries: int, same_text: bool, readers: Sequence[str]) -> str:
    """How many entries of the model's vocabulary have a partner in the other model's, and which losses read that."""
    what = "are in both vocabularies" if same_text else "have one that is near"
    return f"entries: {mapped:,} of the {model}'s {entries:,} ({mapped / entries:.1%}) {what} ({_quoted(readers)})"


def unknown_family(family: str) -> str:
    return f"no model adapter knows the family '{family}': cross-entropy is not read"


def nothing_to_fuse(fusion: str) -> str:
    return f"fuse.{fusion}: the teacher is no mixture of experts; its own state is read"


def mixture(experts: int, states: Mapping[str, str | None]) -> str:
    """`states`: the fusion that makes the state that a loss reads; None: the teacher's own state."""
    read = [f"'{loss}' reads " + (f"'{fusion}'" if fusion else "its own state") for loss, fusion in states.items()]
    return "; ".join([f"teacher: a mixture of {experts} experts", *read])


def teacher_accuracy(accuracy: float) -> str:
    """Over response tokens of training rows, 0 to 1."""
    return f"teacher: wrong on {1 - accuracy:.1%} of the response tokens of the training rows"


def found_in_cache(stage: str, folder: Path) -> str:
    return f"{stage}: trained before, found in the cache ({folder})"


def answers_in_cache(found: int, parts: int) -> str:
    return f"answers: made before, found in the cache ({found} of {parts} {'part' if parts == 1 else 'parts'})"


def answers(rows: int, replaced: int, metrics: Mapping[str, float], max_new_tokens: int) -> Iterator[str]:
    """`metrics` as they are logged of the stage."""
    yield f"answers: {replaced:,} of {rows:,} rows have the teacher's answer as their response"
    yield (
        f"answers: {metrics['tokens']:.1f} tokens and a log-likelihood of {metrics['logprob_per_answer']:.2f} per "
        f"answer, {metrics['logprob_per_token']:.3f} per token"
    )
    if metrics["cut"]:
        yield f"answers: {metrics['cut']:.1%} cut after {max_new_tokens} tokens; no end is taught there"
    if metrics["empty"]:
        yield f"answers: {metrics['empty']:.1%} empty; these rows keep the data's response"


def with_answers(text: str) -> str:
    """What the overview says of the rows, once they have the teacher's answers."""
    return f"with the teacher's answers: {text}"


def trained_on(rows: int, name: str, replaced: int) -> str:
    """For the model card; `replaced` rows have the teacher's answer as their response."""
    found = f"{rows} rows of '{name}'"
    return f"{found}; {replaced} of them with the teacher's own answer as the response" if replaced else found


def artifact_report(stage: str, split: str, values: Mapping[str, float], cached: bool) -> str:
    """`values` by `<stage>/<name>`; `split` is "train" or "held_out"."""
    named = ", ".join(f"{key.partition('/')[2].replace('_', ' ')} {value:.3f}" for key, value in values.items())
    where = "held-out rows" if split == "held_out" else "training rows"
    return f"{stage}: on {where} {named}{' (cached)' if cached else ''}"


def tracker_disabled(name: str, error: Exception) -> str:
    return f"warning: the tracker '{name}' failed and was disabled for this run ({first_line(error)})"


def run_folder(path: Path) -> str:
    return f"run folder: {path}"


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
