"""What the losses of a run read of its rows and its teacher, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from kdzoo.run import messages
from kdzoo.run.context import RunContext, experts, shared_entries, sizes
from kdzoo.run.inputs import Corpus, aligned_shares
from kdzoo.run.losses import ResolvedLosses


def overview(context: RunContext, losses: ResolvedLosses, corpus: Corpus) -> Iterator[str]:
    yield from of_rows(context, losses, corpus)
    yield from _of_teacher(context, losses)


def of_rows(context: RunContext, losses: ResolvedLosses, corpus: Corpus) -> Iterator[str]:
    """How the tokens of both models meet, and which losses read that."""
    rows = len(corpus.examples)
    if not context.same_tokens:
        shares = aligned_shares(corpus.examples)
        readers = [term.name for term in losses if term.needs.aligned]
        yield messages.two_tokenizers(rows, shares.spans, shares.pairs, context.recipe.align.use, readers)
        return
    yield messages.one_tokenizer(rows)
    student, teacher = (sizes(role.model.folder, context).vocab_size for role in (context.student, context.teacher))
    if (entries := shared_entries(context, student, teacher)) is not None:
        yield messages.padded_heads(student, teacher, entries)


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
