"""What a person sees while a job runs: a live line on a terminal, few plain lines elsewhere."""

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from raytune_ft.cli import progress
from raytune_ft.cli.progress import PLAIN_LINE_EVERY_S, ProgressDisplay, print_result

RESULT: dict[str, Any] = {
    "adapter": "sums",
    "version": 3,
    "uri": "s3://adapters/adapters/sums/3",
    "steps": 600,
    "loss": 0.0312,
    "scores_before": {"exact_match": 0.02, "token_loss": 6.0},
    "scores_after": {"exact_match": 0.94, "bleu": 61.25, "token_loss": 0.08},
    "tokens_per_second": 8123.4,
    "peak_memory_bytes": 3 * 2**30,
    "seconds": 83.0,
}


class Clock:
    """Stands still until it is set."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def _plain() -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(file=file, force_terminal=False, width=80), file


def _step(step: int, **more: Any) -> dict[str, Any]:
    return {"phase": "train", "step": step, "steps": 100, **more}


def test_each_phase_has_one_plain_line(clock: Clock) -> None:
    console, file = _plain()
    with ProgressDisplay(console) as display:
        for phase in (*progress.PHASES, "something new"):
            display.update({"phase": phase})
            display.update({"phase": phase})
    assert file.getvalue().splitlines() == [
        "Checking the job",
        "Reading the data",
        "Starting the worker",
        "Loading the model",
        "Scores before",
        "Training",
        "Scores after",
        "Publishing",
        "Nothing to do: this job was done on this data; --restart trains again",
        "something new",
    ]


def test_steps_have_a_plain_line_every_few_seconds_and_at_the_end(clock: Clock) -> None:
    console, file = _plain()
    with ProgressDisplay(console) as display:
        for step in range(101):
            display.update(_step(step))
            clock.now_s += PLAIN_LINE_EVERY_S / 20
    steps = [int(found) for found in re.findall(r"step (\d+)/100", file.getvalue())]
    assert steps == [0, 20, 40, 60, 80, 100]


def test_a_plain_line_has_all_figures_and_is_never_broken(clock: Clock) -> None:
    console, file = _plain()
    with ProgressDisplay(console) as display:
        display.update(_step(0))
        clock.now_s += 50
        display.update(_step(25, loss=0.41237, tokens_per_second=8123.4, memory_bytes=1.25 * 2**30))
    assert file.getvalue().splitlines()[-1] == (
        "Training  step 25/100  loss 0.4124  8,123 tokens/s  1.2 GiB  2 min 30 s left"
    )


def test_the_time_left_of_a_run_that_goes_on_counts_from_where_it_goes_on(clock: Clock) -> None:
    console, file = _plain()
    with ProgressDisplay(console) as display:
        display.update(_step(60))
        clock.now_s += 10
        display.update(_step(80))
    assert "10 s left" in file.getvalue()


def test_figures_that_are_not_known_are_left_out(clock: Clock) -> None:
    console, file = _plain()
    with ProgressDisplay(console) as display:
        display.update({"phase": "train", "step": 7, "loss": None, "memory_bytes": 0})
    assert file.getvalue() == "Training  step 7\n"


def test_a_loss_that_is_not_a_number_is_shown_as_it_is(clock: Clock) -> None:
    console, file = _plain()
    with ProgressDisplay(console) as display:
        display.update(_step(1, loss=float("nan")))
    assert "loss nan" in file.getvalue()


def test_quiet_keeps_standard_output_for_the_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(quiet=True) as display:
        display.update({"phase": "data"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "Reading the data\n"


def test_without_quiet_lines_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as display:
        display.update({"phase": "data"})
    assert capsys.readouterr().out == "Reading the data\n"


def _terminal() -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(file=file, force_terminal=True, width=120, color_system=None), file


def test_a_terminal_has_a_live_line_and_a_tick_for_each_phase_that_ended(clock: Clock) -> None:
    console, file = _terminal()
    with ProgressDisplay(console) as display:
        display.update({"phase": "load"})
        clock.now_s += 4
        display.update(_step(1, loss=2.5))
        clock.now_s += 90
        display.update(_step(100, loss=0.25))
    text = file.getvalue()
    assert "✓ Loading the model 4.0 s" in text
    assert "✓ Training 1 min 30 s" in text


def test_the_live_line_shows_bar_and_figures(clock: Clock) -> None:
    console, file = _terminal()
    with ProgressDisplay(console) as display:
        display.update(_step(0))
        clock.now_s += 10
        display.update(_step(50, loss=0.5, tokens_per_second=900.0))
        display._live.refresh()  # type: ignore[union-attr]  # drawn now, not a tenth of a second later
    assert "━" in file.getvalue()
    assert "step 50/100  loss 0.5000  900 tokens/s  10 s left" in file.getvalue()


def test_a_run_that_fails_leaves_no_tick_for_its_phase(clock: Clock) -> None:
    console, file = _terminal()

    def fail() -> None:
        with ProgressDisplay(console) as display:
            display.update({"phase": "load"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "✓" not in file.getvalue()


def test_the_result_has_scores_place_and_commands() -> None:
    console, file = _plain()
    print_result(console, {**RESULT, "catalog": "s3://adapters", "report": "runs/sums/report.html"})
    lines = [re.sub(r" {2,}", "  ", line.strip()) for line in file.getvalue().splitlines() if line.strip()]
    assert lines == [
        "before  after",
        "Exact match  2.0 %  94.0 %",
        "BLEU  –  61.2",
        "Token loss  6.0000  0.0800",
        "Adapter  sums version 3, s3://adapters/adapters/sums/3",
        "Trained  600 steps in 1 min 23 s, loss 0.0312, 8,123 tokens/s, peak 3.0 GiB",
        "Report  runs/sums/report.html",
        "Use it  raytune-ft generate --adapter sums@v3 --catalog s3://adapters 'YOUR PROMPT'",
        "raytune-ft catalog pull sums@v3 --catalog s3://adapters --to sums",
    ]


def test_a_result_says_on_what_it_was_measured() -> None:
    console, file = _plain()
    notice = "8 of 50 references of the test split are longer than evaluate.max_new_tokens = 32"
    told = {"scored_examples": {"exact_match": 50, "token_loss": 1200}, "notices": [notice]}
    print_result(console, {**RESULT, **told})
    lines = [re.sub(r" {2,}", "  ", line.strip()) for line in file.getvalue().splitlines() if line.strip()]
    assert lines[:4] == [
        "before  after  examples",
        "Exact match  2.0 %  94.0 %  50",
        "BLEU  –  61.2  –",
        "Token loss  6.0000  0.0800  1,200",
    ]
    assert f"Notice  {notice}" in lines


def test_a_result_without_scores_has_no_table() -> None:
    console, file = _plain()
    print_result(console, {**RESULT, "scores_before": None, "scores_after": None})
    assert "before" not in file.getvalue()
    assert "raytune-ft generate --adapter sums@v3 'YOUR PROMPT'" in file.getvalue()


def test_square_brackets_are_text() -> None:
    console, file = _plain()
    print_result(console, {**RESULT, "uri": "/tmp/[bold]x[/bold]"})
    assert "/tmp/[bold]x[/bold]" in file.getvalue()
