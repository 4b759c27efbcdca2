"""What the losses of a run read of its rows and its teacher, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from kdzoo.api.entries import EntryMap
from kdzoo.run import messages
from kdzoo.run.context import RunContext, experts, shared_entries
from kdzoo.run.inputs import Corpus, aligned_shares
from kdzoo.run.losses import ResolvedLosses, check_entries, entries_of


def overview(context: RunContext, losses: ResolvedLosses, corpus: Corpus) -> Iterator[str]:
    yield from of_rows(context, losses, corpus)
    yield from _of_teacher(context, losses)


def of_rows(context: RunContext, losses: ResolvedLosses, corpus: Corpus) -> Iterator[str]:
    """How the tokens of both models meet, and which losses read that."""
    rows = len(corpus.examples)
    if not context.same_tokens:
        shares = aligned_shares(corpus.examples)
        readers = [term.name for term in losses if term.reads_alignment]
        yield messages.two_tokenizers(rows, shares.spans, shares.pairs, context.recipe.align.use, readers)
        yield from _of_entries(context, losses)
        return
    yield messages.one_tokenizer(rows)
    student, teacher = _heads(context)
    if (entries := shared_entries(context, student, teacher)) is not None:
        yield messages.padded_heads(student, teacher, entries)


def _of_entries(context: RunContext, losses: ResolvedLosses) -> Iterator[str]:
    """How far the maps between two vocabularies reach, and which losses read them. Raises RecipeError: not at all."""
    names = sorted(frozenset[EntryMap]().union(*(term.needs.entries for term in losses)))
    if not names:
        return
    heads = _heads(context)
    maps = entries_of(context, context.student, names, heads)
    check_entries(losses, maps)
    for name in names:
        role, head = (context.student, heads[0]) if name == "nearest_in_teacher" else (context.teacher, heads[1])
        readers = [term.name for term in losses if name in term.needs.entries]
        entries = min(head, len(role.encoder.tokenizer))
        yield messages.mapped_entries(role.name, int((maps[name] >= 0).sum()), entries, name == "same_text", readers)


def _heads(context: RunContext) -> tuple[int, int]:
    """How many entries the heads of student and teacher have."""
    return context.models.student.vocab_size, context.models.teacher.vocab_size


def _of_teacher(context: RunContext, losses: ResolvedLosses) -> Iterator[str]:
    """Which losses read which state of a mixture of experts; a fusion that has nothing to fuse."""
    count, fuse = experts(context), context.recipe.fuse
    if not count:
        for name in sorted({term.entry.fuse for term in losses if term.entry.fuse is not None}):
            yield messages.nothing_to_fuse(name)
        return
    readers = [term for term in losses if term.needs.teacher]
    yield messages.mixture(
        count, {term.name: fuse[term.entry.fuse].use if term.entry.fuse else None for term in readers}
    )
