"""A report from its findings: which tables, sentences and figures, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from kdzoo.report import figures
from kdzoo.report.document import Block, Bullets, Document, Figure, Heading, Paragraph, Table
from kdzoo.report.findings import Decoded, Findings, GoldRow, PairFindings
from kdzoo.report.published import Published
from kdzoo.report.statistics import LEVEL
from kdzoo.report.wording import interval, number, p_value, sentence, signed, with_deviation

PIXELS = 96


def compose(title: str, made_from: list[str], findings: Sequence[Findings], published: Published) -> Document:
    """One suite after the other; `title` is the page's."""
    several = len(findings) > 1
    blocks: list[Block] = [Paragraph(HOW_TO_READ)]
    for file, found in zip(made_from, findings, strict=True):
        suite = file.removesuffix(".json")
        level = 2
        if several:
            blocks.append(Heading(level, found.suite.title))
            level += 1
        if found.suite.description:
            blocks.append(Paragraph(found.suite.description))
        if found.not_begun:
            blocks.append(Paragraph(f"Not run yet: {'; '.join(found.not_begun)}."))
        for pair in found.pairs:
            blocks += _pair(found, pair, published, level, suite)
    return Document(title, made_from, blocks)


HOW_TO_READ = (
    "Rouge-L is the F-measure of stemmed words against the best reference, times 100. "
    "“±” is the standard deviation over training seeds. Differences are paired: the same prompts, the same training "
    "seeds, the mean over sets. Intervals are of 95 %: that over prompts is of these very students, the other one "
    "of other training seeds and other prompts as well, and the p of a sentence belongs to it, after Holm's correction "
    "for all methods of the table."
)


def _pair(found: Findings, pair: PairFindings, published: Published, level: int, suite: str) -> Iterator[Block]:
    yield Heading(level, pair.models)
    yield Paragraph(_what_there_is(found, pair))
    if pair.warnings:
        yield Bullets([f"Warning: {warning}" for warning in pair.warnings])
    for count, decoded in enumerate(pair.decoded):
        yield Heading(level + 1, f"Rouge-L, {_decoding(decoded)}")
        if decoded.contrasts:
            yield Bullets([sentence(one) for one in decoded.contrasts])
        yield _rouge_table(decoded, pair, published if count == 0 else None)
        if decoded.contrasts:
            yield _difference_table(decoded)
            yield Figure(
                f"{suite}-{pair.name}-{decoded.decoding}",
                f"Differences, {decoded.decoding}: thick over prompts, thin over training seeds and prompts; green and "
                "red are told from what they are compared with after correction, grey are not.",
                partial(figures.differences, decoded.contrasts, LEVEL),
                _width(),
            )
    if pair.gold:
        yield Heading(level + 1, "Held-out gold responses")
        yield _gold_table(pair.gold)
    yield Heading(level + 1, "Training")
    yield _cost_table(found, pair)
    against = {recipe: other for recipe, other in found.suite.against.items() if other in pair.curves}
    yield Figure(
        f"{suite}-{pair.name}-curves",
        "Cross-entropy of the training rows, the mean over training seeds; grey is what the method is compared with.",
        partial(figures.learning_curves, pair.curves, against, found.suite.baseline),
        _width(),
    )
    if figures.has_gradients(pair):
        yield Figure(
            f"{suite}-{pair.name}-gradients",
            "Whose gradient reaches the student's last hidden state: shares of the norms, the mean over training.",
            partial(figures.gradient_shares, pair.gradients),
            _width(),
        )
    yield Paragraph(_where_from(pair))


def _width() -> int:
    return round(figures.WIDTH * PIXELS)


def _decoding(decoded: Decoded) -> str:
    seeds = ", ".join(str(seed) for seed in decoded.seeds)
    return f"`{decoded.decoding}`" + (f", decoding seeds {seeds}" if seeds else "")


def _what_there_is(found: Findings, pair: PairFindings) -> str:
    missing = sum(len(seeds) for seeds in pair.missing.values())
    seeds = ", ".join(str(seed) for seed in found.suite.seeds)
    prompts = ", ".join(f"{name} {count}" for name, count in pair.prompts.items())
    parts = [
        f"{pair.cells} of {pair.cells + missing} trained students; "
        f"training seed{'s' * (len(found.suite.seeds) > 1)} {seeds}."
    ]
    if len(found.suite.seeds) == 1:
        parts.append("One training seed: nothing here says what another one would have given.")
    if pair.missing:
        parts.append(
            "Not run yet: "
            + "; ".join(f"`{r}` seed {', '.join(str(s) for s in seeds)}" for r, seeds in pair.missing.items())
            + "."
        )
    for why in dict.fromkeys(pair.left_out.values()):
        names = ", ".join(f"`{name}`" for name, said in pair.left_out.items() if said == why)
        parts.append(f"Left out: {names}; each {why}.")
    parts.append(f"Prompts: {prompts}.")
    return " ".join(parts)


def _where_from(pair: PairFindings) -> str:
    data = ", ".join(f"{source} `{content}`" for source, content in pair.data.items())
    return f"Made with {'; '.join(pair.made_with)}. Hashes of the rows: {data}."


def _rouge_table(decoded: Decoded, pair: PairFindings, published: Published | None) -> Table:
    sets = list(pair.prompts)
    drawn = any(row.decoding_deviation is not None for row in decoded.rows)
    beside = pair.published if published else {}
    columns = ["", "seeds", "mean", *sets]
    columns += ["decoding ±"] if drawn else []
    columns += ["published"] if beside else []
    rows = []
    for row in decoded.rows:
        cells = [f"`{row.name}`" if row.seeds else row.name, str(row.seeds or ""), with_deviation(row.mean)]
        cells += [with_deviation(row.sets.get(name)) for name in sets]
        if drawn:
            cells.append("" if row.decoding_deviation is None else number(row.decoding_deviation))
        if beside:
            cells.append(number(beside[row.name]) if row.name in beside else "")
        rows.append(cells)
    notes = []
    if drawn:
        notes.append("“decoding ±”: the standard deviation of the mean over decoding seeds, of one trained student.")
    if beside and published:
        notes.append(f"“published”: {published.measure}; {published.source}.")
    return Table(columns, rows, notes)


def _difference_table(decoded: Decoded) -> Table:
    columns = ["", "against", "seeds", "difference", "over prompts", "over seeds and prompts", "p", "p, Holm"]
    rows = []
    for found in decoded.contrasts:
        one = found.difference
        rows.append(
            [
                f"`{found.recipe}`",
                f"`{found.against}`",
                str(one.seeds),
                signed(one.estimate),
                interval(one.within),
                interval(one.over),
                p_value(one.p),
                p_value(found.p_holm),
                "" if one.detectable is None else number(one.detectable),
            ]
        )
    return Table([*columns, "detectable"], rows, [DETECTABLE])


DETECTABLE = (
    "Intervals are of 95 %. “detectable”: the smallest true difference that four of five such comparisons would find, "
    "before correction."
)


def _gold_table(gold: Sequence[GoldRow]) -> Table:
    columns = ["", "cross-entropy", "teacher right", "teacher wrong", "token accuracy, %", "lower by", "95 % interval"]
    rows = [
        [
            f"`{row.name}`" if row.seeds else row.name,
            with_deviation(row.cross_entropy, 3),
            with_deviation(row.right, 3),
            with_deviation(row.wrong, 3),
            with_deviation(row.accuracy, 1),
            "" if row.lower_by is None else signed(row.lower_by.mean, 3),
            interval(row.interval, 3),
        ]
        for row in gold
    ]
    notes = [
        "Nats per token of the model's own tokenizer, on rows that no stage trains on; “teacher right” and “teacher "
        "wrong” are the tokens where the teacher's first choice is gold, and the others. “lower by”: than the recipe "
        "that the method is compared with, with Student's interval over training seeds."
    ]
    return Table(columns, rows, notes)


def _cost_table(found: Findings, pair: PairFindings) -> Table:
    rows = [
        [
            f"`{row.name}`",
            with_deviation(row.seconds, 1),
            with_deviation(row.rows_per_second, 0),
            "" if row.speed is None else f"{number(100 * row.speed, 0)} %",
            number(row.memory_gb),
        ]
        for row in pair.costs
    ]
    notes = [
        "Of the last stage: seconds of its steps, response tokens per second, the speed beside "
        f"`{found.suite.baseline}`'s, and the most memory that rank 0 held."
    ]
    return Table(["", "seconds", "tokens/s", "speed", "GiB"], rows, notes)
