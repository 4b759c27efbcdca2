"""Numbers and findings in words."""

from __future__ import annotations

from kdzoo.report.findings import Contrast, Number
from kdzoo.report.statistics import LEVEL, Interval

MINUS = "−"


def number(value: float, digits: int = 2) -> str:
    """With a real minus, and never a minus before nothing but zeros."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    text = number(value, digits)
    return text if text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def with_deviation(value: Number | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return number(value.mean, digits) + ("" if value.deviation is None else f" ± {number(value.deviation, digits)}")


def interval(value: Interval | None, digits: int = 2) -> str:
    return "" if value is None else f"{number(value.low, digits)} to {number(value.high, digits)}"


def p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def sentence(found: Contrast) -> str:
    """What one comparison says, and no more than it says. In Rouge-L, 0 to 100."""
    one, against = found.difference, f"`{found.against}`"
    size = number(abs(one.estimate))
    name = f"`{found.recipe}`"
    if one.over is None or found.p_holm is None:
        over_prompts = f" (interval over prompts {interval(one.within)})" if one.within else ""
        side = "above" if one.estimate >= 0 else "below"
        return f"{name}: {size} {side} {against}{over_prompts}; of one trained student each, others may differ."
    given = f"interval {interval(one.over)}, p = {p_value(found.p_holm)}".replace("= <", "<")
    if found.p_holm < LEVEL:
        return f"{name} is {'better' if one.estimate > 0 else 'worse'} than {against} by {size} ({given})."
    unseen = (
        "" if one.detectable is None else f" A true difference below {number(one.detectable)} would often be missed."
    )
    if one.over.low > 0 or one.over.high < 0:
        side = "above" if one.estimate > 0 else "below"
        return f"{name} is {side} {against} by {size} ({given}), not certain among so many comparisons.{unseen}"
    return f"{name} cannot be told from {against}: {signed(one.estimate)} ({given}).{unseen}"
