from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from kdzoo.evaluate import ModelScores
from kdzoo.run.progress import print_message, print_scores, stage_progress


def screen(terminal: bool = False, width: int = 80) -> Console:
    """A console that writes into memory; TERM is set, since a test may run without one."""
    return Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        _environ={"TERM": "xterm"},
    )


def shown(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_stage(console: Console, total: int, seconds: float, enabled: bool = True, first: int = 1) -> None:
    clock = Clock()
    with stage_progress("distill", total, enabled, console, clock) as progress:
        for step in range(first, total + 1):
            clock.now += seconds
            progress.update(step, loss=10 / step, rows_per_second=1204.4)


def test_without_a_terminal_a_line_stands_at_the_first_step_and_every_tenth():
    console = screen()
    run_stage(console, 400, 0.25)
    lines = shown(console)
    assert [line.split()[1] for line in lines[1:]] == [f"{n}/400" for n in range(40, 401, 40)]
    assert lines[0] == "distill    1/400  loss 10.000  1,204 rows/s"
    assert lines[3] == "distill  120/400  loss 0.083  1,204 rows/s  1:10 left"
    assert lines[-1] == "distill  400/400  loss 0.025  1,204 rows/s  took 1:40"


def test_a_slow_stage_tells_something_every_minute():
    console = screen()
    run_stage(console, 1000, 30.0)
    assert [line.split()[1] for line in shown(console)[:4]] == ["1/1000", "3/1000", "5/1000", "7/1000"]
    assert "8:14:30 left" in shown(console)[5]  # 989 steps of half a minute


def test_a_resumed_stage_does_not_count_the_steps_it_did_not_do():
    console = screen()
    run_stage(console, 400, 1.0, first=301)
    assert "360/400  loss 0.028  1,204 rows/s  0:40 left" in shown(console)[2]


def test_steps_without_loss_have_none():
    console = screen()
    with stage_progress("evaluate", 2, True, console, Clock()) as progress:
        progress.update(1)
        progress.update(2)
    assert shown(console) == ["evaluate  1/2", "evaluate  2/2  took 0:00"]


def test_a_loss_that_is_no_number_is_shown_as_such():
    console = screen()
    with stage_progress("distill", 1, True, console, Clock()) as progress:
        progress.update(1, loss=float("nan"))
    assert "loss nan" in shown(console)[0]


def test_other_ranks_show_nothing():
    for terminal in (False, True):
        console = screen(terminal)
        run_stage(console, 10, 1.0, enabled=False)
        print_message("hello", enabled=False, console=console)
        assert shown(console) == []


def test_on_a_terminal_there_is_a_bar_that_a_line_does_not_break():
    console = screen(terminal=True)
    with stage_progress("distill", 10, True, console, Clock()) as progress:
        progress.update(4, loss=2.3131, rows_per_second=1204)
        print_message("written: [student]", console=console)
        progress.update(10, loss=1.5, rows_per_second=1300)
    text = "\n".join(shown(console))
    assert "written: [student]" in text
    for part in ("distill", "━", "10/10", "loss 1.500", "1,300 rows/s"):
        assert part in text[text.index("written") :]


def test_a_bar_ends_with_the_last_step_however_fast_the_steps_are():
    console = screen(terminal=True)
    run_stage(console, 50, 0.0)
    assert "50/50" in "\n".join(shown(console))


def test_a_stage_that_fails_gives_the_screen_back():
    console = screen(terminal=True)
    with pytest.raises(ZeroDivisionError), stage_progress("distill", 10, True, console, Clock()):
        raise ZeroDivisionError
    run_stage(console, 2, 1.0)  # rich refuses a second live display where the first is still there
    assert shown(console)


def test_long_lines_are_not_wrapped_and_marks_are_text():
    console = screen(width=20)
    text = "[bold]a path that is longer than the screen/" + "x" * 50
    print_message(text, console=console)
    assert shown(console) == [text]


def test_progress_is_on_standard_error_and_the_table_on_standard_output(capsys):
    with stage_progress("distill", 1, True) as progress:
        progress.update(1, loss=1.0)
    print_message("hello")
    print_scores({"held_out": {"student": scored(greedy=[20.0])}})
    streams = capsys.readouterr()
    assert "distill  1/1  loss 1.000" in streams.err
    assert "hello" in streams.err
    assert "student" in streams.out
    assert "student" not in streams.err


def scored(entropy: float | None = None, accuracy: float | None = None, **per_seed: list[float]) -> ModelScores:
    rouge = {name: {"mean": sum(v) / len(v), "per_seed": v} for name, v in per_seed.items()}
    return ModelScores(rouge_l=rouge, cross_entropy=entropy, token_accuracy=accuracy)


MODELS = {
    "teacher": scored(1.2034, 0.7118, greedy=[41.204], sample=[38.0, 38.5, 39.0]),
    "untrained": scored(8.3, 0.01, greedy=[0.0], sample=[0.1, 0.1, 0.1]),
    "copy of the input": scored(greedy=[9.1]),
    "student": scored(2.1, 0.44, greedy=[23.3], sample=[22.0, 22.0, 22.6]),
}


def test_the_table_has_a_row_per_model_and_a_column_per_measure():
    console = screen()
    print_scores({"held_out": MODELS}, console)
    assert shown(console) == [
        "                   held_out",
        "                    Rouge-L       Rouge-L   cross-     token",
        "                     greedy        sample  entropy  accuracy",
        "teacher               41.20  38.50 ± 0.50    1.203     71.2%",
        "untrained              0.00   0.10 ± 0.00    8.300      1.0%",
        "copy of the input      9.10             –        –         –",
        "student               23.30  22.20 ± 0.35    2.100     44.0%",
        "",
        "Rouge-L: 0 to 100, higher is better.",
        "±: standard deviation over decoding seeds of one trained model.",
        "cross-entropy: nats per token of the model's own tokenizer, lower is better.",
        "token accuracy: response tokens that are the first choice, higher is better.",
    ]


def test_what_no_model_has_takes_no_place():
    console = screen()
    print_scores({"held_out": {"student": scored(greedy=[20.0])}}, console)
    assert shown(console) == [
        "         held_out",
        "          Rouge-L",
        "           greedy",
        "student     20.00",
        "",
        "Rouge-L: 0 to 100, higher is better.",
    ]


def test_sets_stand_side_by_side_while_they_fit():
    narrow = {"student": scored(2.0, 0.5, greedy=[20.0]), "teacher": scored(1.0, 0.7, greedy=[30.0])}
    scores = {"held_out": narrow, "other": narrow, "third": {"untrained": scored(9.0, greedy=[0.0])}}
    for width, tables in ((140, 1), (80, 2), (30, 3)):
        console = screen(width=width)
        print_scores(scores, console)
        heads = [line.split() for line in shown(console) if "Rouge-L" in line and "0 to 100" not in line]
        assert len(heads) == tables
        assert sum(head.count("Rouge-L") for head in heads) == 3


def test_a_model_without_scores_on_a_set_has_a_dash_there():
    console = screen()
    print_scores({"a": {"student": scored(greedy=[1.0])}, "b": {"teacher": scored(greedy=[2.0])}}, console)
    rows = {line.split()[0]: line.split()[1:] for line in shown(console)[3:5]}
    assert rows == {"student": ["1.00", "–"], "teacher": ["–", "2.00"]}


@pytest.mark.parametrize("terminal", [False, True])
def test_no_digit_is_lost_on_a_screen_that_is_too_narrow(terminal):
    console = screen(terminal, width=30)
    print_scores({"a_set_with_a_long_name": MODELS}, console)
    text = "\n".join(shown(console))
    assert "…" not in text
    assert "22.20 ± 0.35" in text
    assert "a_set_with_a_long_name" in text


def test_colour_is_for_terminals_and_no_color_is_respected():
    def written(make: Callable[[], Console]) -> str:
        console = make()
        print_scores({"held_out": MODELS}, console)
        return "\n".join(shown(console))

    assert "\x1b[" not in written(screen)
    assert "\x1b[1m" in written(lambda: screen(terminal=True))


def test_no_scores_print_nothing():
    console = screen()
    print_scores({}, console)
    assert shown(console) == []
