"""What a ledger says: every number of a report, before it is put into words, tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from kdzoo.compare.ledger import Answers, Cell, Compared, Gold, Ledger, Model, PairLedger
from kdzoo.errors import KdzooError
from kdzoo.evaluate import HELD_OUT
from kdzoo.report.published import Published
from kdzoo.report.statistics import Difference, Floats, Interval, deviation, difference, holm, mean_interval


@dataclass(frozen=True)
class Number:
    """A mean over training seeds."""

    mean: float
    deviation: float | None
    """The standard deviation over training seeds; none for one."""


@dataclass(frozen=True)
class RougeRow:
    """Rouge-L of one model, 0 to 100."""

    name: str
    seeds: int | None
    """Trained students; none for a reference model."""
    mean: Number
    """Of the means of the sets."""
    sets: dict[str, Number]
    decoding_deviation: float | None
    """The standard deviation of `mean` over decoding seeds, each student's own, pooled; none for one decoding seed."""


@dataclass(frozen=True)
class Contrast:
    """A method beside what it is compared with."""

    recipe: str
    against: str
    difference: Difference
    p_holm: float | None
    """Corrected for all methods of the table."""


@dataclass(frozen=True)
class Decoded:
    """All answers under one decoding."""

    decoding: str
    seeds: list[int]
    """Decoding seeds; empty where nothing is drawn."""
    rows: list[RougeRow]
    contrasts: list[Contrast]


@dataclass(frozen=True)
class GoldRow:
    """How a model reads the gold responses of the held-out rows."""

    name: str
    seeds: int | None
    cross_entropy: Number
    """Nats per token of the model's own tokenizer."""
    right: Number | None
    """Where the teacher's first choice is gold ..."""
    wrong: Number | None
    """... and elsewhere."""
    accuracy: Number
    """0 to 100."""
    against: str | None
    lower_by: Number | None
    """What it is compared with, minus this: above zero is better. Paired by training seeds."""
    interval: Interval | None
    """Of `lower_by`, over training seeds."""


@dataclass(frozen=True)
class CostRow:
    name: str
    seconds: Number
    rows_per_second: Number
    speed: float | None
    """Rows per second, over those of the baseline."""
    memory_gb: float


@dataclass(frozen=True)
class Curve:
    """A metric over optimizer steps, its mean over training seeds."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class PairFindings:
    name: str
    models: str
    prompts: dict[str, int]
    """Set -> how many prompts."""
    cells: int
    missing: dict[str, list[int]]
    """Recipe -> training seeds that have not run."""
    left_out: dict[str, str]
    warnings: list[str]
    made_with: list[str]
    data: dict[str, str]
    """Source -> a hash of its rows."""
    decoded: list[Decoded]
    gold: list[GoldRow]
    costs: list[CostRow]
    published: dict[str, float]
    curves: dict[str, Curve]
    """Recipe -> the cross-entropy of the training rows."""
    gradients: dict[str, dict[str, float]]
    """Recipe -> loss slot -> its share of the gradients at the student's last state, 0 to 1."""


@dataclass(frozen=True)
class Findings:
    suite: Compared
    pairs: list[PairFindings]
    not_begun: list[str]
    """Pairs of which no cell has run yet, in words."""


def find(ledger: Ledger, published: Published) -> Findings:
    """Raises KdzooError where cells of a pair have seen different rows: their numbers do not compare."""
    pairs = [_pair(ledger.suite, name, pair, published.of(name)) for name, pair in ledger.pairs.items() if pair.cells]
    if not pairs:
        raise KdzooError(f"'{ledger.suite.title}': no run has finished yet; start them with 'kdzoo compare'")
    return Findings(
        ledger.suite, pairs, [ledger.suite.pairs[name] for name, pair in ledger.pairs.items() if not pair.cells]
    )


def _pair(suite: Compared, name: str, pair: PairLedger, published: Mapping[str, float]) -> PairFindings:
    cells = [cell for by_seed in pair.cells.values() for cell in by_seed.values()]
    left_out = suite.left_out.get(name, {})
    fitting = [recipe for recipe in suite.recipes if recipe not in left_out]
    missing = {recipe: [s for s in suite.seeds if s not in pair.cells.get(recipe, {})] for recipe in fitting}
    answers = cells[0].student.answers
    decodings = dict.fromkeys(decoding for by_decoding in answers.values() for decoding in by_decoding)
    return PairFindings(
        name=name,
        models=suite.pairs[name],
        prompts={set_name: len(next(iter(found.values()))[0].texts) for set_name, found in answers.items() if found},
        cells=len(cells),
        missing={recipe: seeds for recipe, seeds in missing.items() if seeds},
        left_out=left_out,
        warnings=_warnings(cells),
        made_with=_made_with(cells),
        data=_same_data(name, cells),
        decoded=[_decoded(decoding, suite, pair) for decoding in decodings],
        gold=_gold(suite, pair),
        costs=_costs(suite, pair),
        published={
            model: score for model, score in published.items() if model in pair.cells or model in pair.reference_models
        },
        curves={recipe: _curve(by_seed.values()) for recipe, by_seed in pair.cells.items()},
        gradients={recipe: _gradients(by_seed.values()) for recipe, by_seed in pair.cells.items()},
    )


# Where the numbers come from


def _same_data(pair: str, cells: Sequence[Cell]) -> dict[str, str]:
    first = cells[0]
    data: dict[str, str] = first.environment["data"]
    for cell in cells:
        for source in data.keys() | cell.environment["data"].keys():
            if cell.environment["data"].get(source) != data.get(source):
                raise KdzooError(
                    f"{pair}: '{cell.recipe}' of seed {cell.seed} and '{first.recipe}' of seed {first.seed} used "
                    f"different rows of {source}; remove one of them from the ledger and run it again"
                )
    return data


def _warnings(cells: Sequence[Cell]) -> list[str]:
    """What differs between cells and might move a number."""
    commits = _values(cells, lambda cell: str(cell.environment["commit"]["commit"])[:7])
    dirty = [f"`{cell.recipe}-{cell.seed}`" for cell in cells if cell.environment["commit"]["dirty"]]
    found = []
    if len(commits) > 1:
        found.append(f"The cells were run at {len(commits)} commits: {', '.join(commits)}.")
    if dirty:
        found.append(f"Files were changed and not committed when these were run: {', '.join(dirty)}.")
    packages = dict.fromkeys(name for cell in cells for name in cell.environment["packages"])
    for package in packages:
        versions = list(dict.fromkeys(str(cell.environment["packages"].get(package)) for cell in cells))
        if len(versions) > 1:
            found.append(f"The cells were run with different versions of {package}: {', '.join(versions)}.")
    devices = _values(cells, _device)
    if len(devices) > 1:
        found.append(f"The cells were run on different machines: {'; '.join(devices)}. Costs do not compare.")
    return found


def _made_with(cells: Sequence[Cell]) -> list[str]:
    commits = _values(cells, lambda cell: str(cell.environment["commit"]["commit"])[:7])
    packages = cells[0].environment["packages"]
    shown = [f"{name} {packages[name]}" for name in ("kdzoo", "torch", "deepspeed", "transformers") if name in packages]
    return [f"commit {', '.join(commits)}", *shown, f"Python {cells[0].environment['python']}", _device(cells[0])]


def _device(cell: Cell) -> str:
    device, ranks = cell.environment["device"], cell.environment["ranks"]
    parts = [str(device.get("name", device["type"]))]
    parts += [f"{device['threads']} thread{'s' * (device['threads'] != 1)}"] if "threads" in device else []
    return ", ".join([*parts, f"{ranks} rank{'s' * (ranks != 1)}"])


def _values(cells: Sequence[Cell], of: Callable[[Cell], str]) -> list[str]:
    return list(dict.fromkeys(of(cell) for cell in cells))


# Rouge-L


def _decoded(decoding: str, suite: Compared, pair: PairLedger) -> Decoded:
    rows = [
        _rouge_row(name, [model], decoding, None)
        for name, model in pair.reference_models.items()
        if _has(model, decoding)
    ]
    for recipe, by_seed in pair.cells.items():
        rows.append(_rouge_row(recipe, [cell.student for cell in by_seed.values()], decoding, len(by_seed)))
    some = next(iter(next(iter(pair.cells.values())).values())).student
    seeds = [one.seed for one in _answers(some, decoding)[next(iter(_answers(some, decoding)))]]
    return Decoded(decoding, [seed for seed in seeds if seed is not None], rows, _contrasts(decoding, suite, pair))


def _contrasts(decoding: str, suite: Compared, pair: PairLedger) -> list[Contrast]:
    found: list[tuple[str, str, Difference]] = []
    for recipe, against, seeds in _compared(suite, pair):
        ours, theirs = pair.cells[recipe], pair.cells[against]
        by_set = [
            np.array(
                [
                    _by_prompt(_answers(ours[seed].student, decoding)[name])
                    - _by_prompt(_answers(theirs[seed].student, decoding)[name])
                    for seed in seeds
                ]
            )
            for name in _answers(ours[seeds[0]].student, decoding)
        ]
        found.append((recipe, against, difference(by_set)))
    tested = [(recipe, one.p) for recipe, _, one in found if one.p is not None]
    corrected = dict(zip([recipe for recipe, _ in tested], holm([p for _, p in tested]), strict=True))
    return [Contrast(recipe, against, one, corrected.get(recipe)) for recipe, against, one in found]


def _compared(suite: Compared, pair: PairLedger) -> list[tuple[str, str, list[int]]]:
    """Recipe, what it is compared with, and the training seeds that both have."""
    found = []
    for recipe, by_seed in pair.cells.items():
        against = suite.against.get(recipe, suite.baseline)
        seeds = [seed for seed in by_seed if seed in pair.cells.get(against, {})]
        if recipe != against and seeds:
            found.append((recipe, against, seeds))
    return found


def _answers(model: Model, decoding: str) -> dict[str, list[Answers]]:
    """Set -> answers, of the sets that are decoded so."""
    return {name: found[decoding] for name, found in model.answers.items() if decoding in found}


def _has(model: Model, decoding: str) -> bool:
    return bool(_answers(model, decoding))


def _by_prompt(answers: Sequence[Answers]) -> Floats:
    """Rouge-L [prompts], the mean over decoding seeds."""
    return np.mean([one.rouge_l for one in answers], axis=0)


def _rouge_row(name: str, models: Sequence[Model], decoding: str, seeds: int | None) -> RougeRow:
    by_model = [
        {set_name: [fmean(one.rouge_l) for one in found] for set_name, found in _answers(model, decoding).items()}
        for model in models
    ]  # set -> one mean per decoding seed
    return RougeRow(
        name,
        seeds,
        mean=_number(fmean(fmean(scores) for scores in sets.values()) for sets in by_model),
        sets={set_name: _number(fmean(sets[set_name]) for sets in by_model) for set_name in by_model[0]},
        decoding_deviation=_pooled([fmean(scores) for scores in zip(*sets.values(), strict=True)] for sets in by_model),
    )


def _number(values: Iterable[float]) -> Number:
    values = list(values)
    return Number(fmean(values), deviation(values))


def _pooled(groups: Iterable[Sequence[float]]) -> float | None:
    deviations = [deviation(group) for group in groups]
    squares = [one**2 for one in deviations if one is not None]
    return float(np.sqrt(fmean(squares))) if squares else None


# Gold responses


def _gold(suite: Compared, pair: PairLedger) -> list[GoldRow]:
    compared = {recipe: (against, seeds) for recipe, against, seeds in _compared(suite, pair)}
    rows = []
    for name, model in pair.reference_models.items():
        if HELD_OUT in model.gold:
            rows.append(_gold_row(name, None, [model.gold[HELD_OUT]]))
    for recipe, by_seed in pair.cells.items():
        read = {seed: cell.student.gold[HELD_OUT] for seed, cell in by_seed.items() if HELD_OUT in cell.student.gold}
        if not read:
            continue
        row = _gold_row(recipe, len(read), list(read.values()))
        if recipe in compared:
            against, seeds = compared[recipe]
            lower = [
                pair.cells[against][seed].student.gold[HELD_OUT].cross_entropy - read[seed].cross_entropy
                for seed in seeds
            ]
            row = replace(row, against=against, lower_by=_number(lower), interval=mean_interval(lower))
        rows.append(row)
    return rows


def _gold_row(name: str, seeds: int | None, read: Sequence[Gold]) -> GoldRow:
    right = [one.right for one in read if one.right is not None]
    wrong = [one.wrong for one in read if one.wrong is not None]
    return GoldRow(
        name,
        seeds,
        cross_entropy=_number(one.cross_entropy for one in read),
        right=_number(right) if right else None,
        wrong=_number(wrong) if wrong else None,
        accuracy=_number(100 * one.token_accuracy for one in read),
        against=None,
        lower_by=None,
        interval=None,
    )


# Training


def _costs(suite: Compared, pair: PairLedger) -> list[CostRow]:
    speeds = {r: _number(cell.cost.rows_per_second for cell in cells.values()) for r, cells in pair.cells.items()}
    baseline = speeds.get(suite.baseline)
    return [
        CostRow(
            recipe,
            seconds=_number(cell.cost.seconds for cell in cells.values()),
            rows_per_second=speeds[recipe],
            speed=speeds[recipe].mean / baseline.mean if baseline else None,
            memory_gb=max(cell.cost.memory_gb for cell in cells.values()),
        )
        for recipe, cells in pair.cells.items()
    ]


CROSS_ENTROPY = "/cross_entropy"
GRADIENT = "/gradient_at_state"


def _curve(cells: Iterable[Cell]) -> Curve:
    """The first cross-entropy of the training rows that the recipe has as a loss."""
    curves = [cell.curve for cell in cells]
    name = next((name for name in curves[0] if name.endswith(CROSS_ENTROPY)), "loss")
    points = zip(curves[0]["step"], *(curve[name] for curve in curves), strict=True)
    whole = [(step, [v for v in values if v is not None]) for step, *values in points]
    kept = [(step, values) for step, values in whole if step is not None and values]
    return Curve([step for step, _ in kept], [fmean(values) for _, values in kept])


def _gradients(cells: Iterable[Cell]) -> dict[str, float]:
    norms: dict[str, list[float]] = {}
    for cell in cells:
        for name, values in cell.curve.items():
            if name.endswith(GRADIENT):
                norms.setdefault(name.removesuffix(GRADIENT), []).extend(v for v in values if v is not None)
    means = {slot: fmean(values) for slot, values in norms.items() if values}
    whole = sum(means.values())
    return {slot: mean / whole for slot, mean in means.items()} if whole else {}
