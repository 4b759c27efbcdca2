"""Pictures of a pair's findings, as PNG. Narrow enough to be read on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdzoo.report.findings import Contrast, Curve, PairFindings

WIDTH = 4.6
"""Inches: of 96 pixels on a page."""
DPI = 192
INK, PALE = "#222222", "#9a9a9a"
BETTER, WORSE, UNTOLD = "#1b7f4d", "#b3372f", "#6b6b6b"
# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
STYLE: dict[str, object] = {
    "font.size": 8.5,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
}
COLUMNS = 2
"""Of small pictures side by side."""


def differences(found: Sequence[Contrast], level: float) -> bytes:
    """Each method's difference with its intervals: over seeds and prompts thin, over prompts alone thick."""
    with _figure(0.7 + 0.26 * len(found)) as (figure, png):
        axes = figure.add_subplot()
        axes.axvline(0, color=PALE, linewidth=1, zorder=0)
        for row, one in enumerate(found):
            colour = _verdict(one, level)
            if one.difference.over is not None:
                axes.plot([one.difference.over.low, one.difference.over.high], [row, row], color=colour, linewidth=1.2)
            if one.difference.within is not None:
                inside = one.difference.within
                axes.plot([inside.low, inside.high], [row, row], color=colour, linewidth=4, alpha=0.45)
            axes.plot(one.difference.estimate, row, "o", color=colour, markersize=4)
        axes.set_yticks(range(len(found)), [one.recipe for one in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("difference in Rouge-L")
    return png.getvalue()


def _verdict(one: Contrast, level: float) -> str:
    if one.p_holm is None or one.p_holm >= level:
        return UNTOLD
    return BETTER if one.difference.estimate > 0 else WORSE


def learning_curves(curves: Mapping[str, Curve], against: Mapping[str, str], baseline: str) -> bytes:
    """Small pictures on one scale: each method, and grey what it is compared with."""
    shown = [recipe for recipe in curves if recipe != baseline] or [baseline]
    rows = -(-len(shown) // COLUMNS)
    with _figure(0.5 + 1.25 * rows) as (figure, png):
        grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
        flat: list[Axes] = list(grid.flat)
        for axes, recipe in zip(flat, shown, strict=False):
            other = curves.get(against.get(recipe, baseline))
            if other is not None and recipe != baseline:
                axes.plot(other.steps, other.values, color=PALE, linewidth=1.4)
            axes.plot(curves[recipe].steps, curves[recipe].values, color=COLOURS[0], linewidth=1.2)
            axes.set_title(recipe, fontsize=8.5, loc="left", pad=2)
            axes.set_yscale("log")
            axes.minorticks_off()
            # The end is what differs; a logarithm shows it beside the beginning.
            axes.set_yticks(*_ticks(curves))
        for axes in flat[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel("optimizer step", fontsize=8.5)
    return png.getvalue()


def _ticks(curves: Mapping[str, Curve]) -> tuple[list[float], list[str]]:
    values = [value for curve in curves.values() for value in curve.values]
    inside = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 3, 5, 8, 12, 20) if min(values) <= tick <= max(values)]
    ticks = [float(tick) for tick in inside or (min(values),)]
    return ticks, [f"{tick:g}" for tick in ticks]


def gradient_shares(shares: Mapping[str, Mapping[str, float]]) -> bytes:
    """Whose gradient reaches the student's last state, as bars of one length."""
    shown = {recipe: slots for recipe, slots in shares.items() if slots}
    slots = list(dict.fromkeys(slot for one in shown.values() for slot in one))
    with _figure(1.0 + 0.26 * len(shown)) as (figure, png):
        axes = figure.add_subplot()
        left = [0.0] * len(shown)
        for index, slot in enumerate(slots):
            widths = [100 * one.get(slot, 0.0) for one in shown.values()]
            axes.barh(range(len(shown)), widths, left=left, color=COLOURS[index % len(COLOURS)], height=0.7, label=slot)
            left = [begin + width for begin, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(shown)), list(shown))
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of the gradients' norms at the student's last state, %")
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return png.getvalue()


def has_gradients(pair: PairFindings) -> bool:
    return any(len(slots) > 1 for slots in pair.gradients.values())


@contextmanager
def _figure(height: float) -> Iterator[tuple[Figure, BytesIO]]:
    with rc_context(cast(Any, STYLE)):  # whose type lists every key that there is
        figure, png = Figure(figsize=(WIDTH, height), layout="constrained"), BytesIO()
        yield figure, png
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
