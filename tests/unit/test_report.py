"""The report: whole, self-contained, safe to open, and true to its figures."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.chart import MOST_POINTS, can_be_drawn, chart, nice_ticks, smoothed, thin
from raytune_ft.report import (
    RunReport,
    SourceRow,
    duration_text,
    score_rows,
    source_rows,
    usage_commands,
    write_report,
)
from raytune_ft.spec import parse_job

HOSTILE = "</title><script>alert('1')</script><img src=x onerror=\"alert(2)\">{{ 7*7 }} & 'quotes'"
ADDRESSES = {"src", "href", "xlink:href", "action", "data", "srcset", "poster"}


def _entry(step: int, loss: float, **more: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 90,
        "seconds": 0.1,
    } | more


def _report(**changes: Any) -> RunReport:
    counts = {"objects": 1, "records": 1234, "bad": 0, "train": 1000, "test": 234, "tokens": 98765}
    job = parse_job(
        {
            "name": "sums",
            "model": {"path": "s3://models/tiny"},
            "data": {"sources": [{"uri": "s3://datasets/sums.jsonl"}]},
            "publish": {"catalog": "s3://adapters"},
        }
    )
    report = RunReport(
        title="sums",
        job=job.resolved(),
        result={
            "adapter": "sums",
            "version": 3,
            "uri": "s3://adapters/adapters/sums/3",
            "steps": 40,
            "loss": 0.125,
            "tokens_per_second": 8123.4,
            "peak_memory_bytes": 3 * 2**30,
            "seconds": 83.0,
        },
        history=[_entry(step, 5.0 / step) for step in range(1, 41)],
        scores_before={"exact_match": 0.02, "bleu": 0.5, "token_loss": 6.0},
        scores_after={"exact_match": 0.94, "bleu": 61.25, "token_loss": 0.08},
        samples=[
            {"prompt": "What is 2 plus 3?", "references": ["5", "five"], "before": "7", "after": " five"}
        ],
        data_counts={"sources": [{"uri": "s3://datasets/sums.jsonl", **counts}], "total": counts},
        machine={"system": "Linux", "device": "cpu"},
        versions={"torch": "2.13.0"},
    )
    return replace(report, **changes)


def _page(tmp_path: Path, report: RunReport) -> Page:
    write_report(report, tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_says_on_what_the_scores_were_measured(tmp_path: Path) -> None:
    report, notice = (
        _report(),
        "8 of 50 references of the test split are longer than evaluate.max_new_tokens = 32",
    )
    told = {"scored_examples": {"exact_match": 1357, "bleu": 1357}, "notices": [notice]}
    page = _page(tmp_path, replace(report, result={**report.result, **told}))
    assert "Exact match on 1,357 unseen examples" in page.text
    assert page.text.count("1,357") == 3
    assert notice in page.text


def test_the_page_shows_the_run(tmp_path: Path) -> None:
    page = _page(tmp_path, _report())
    for text in (
        *(
            "94.0 %",
            "before: 2.0 %",
            "+92.0",
            "61.2",
            "+60.8",
            "−5.9200",
            "0.125",
            "8,123",
            "3.00 GiB",
            "1 min 23 s",
        ),
        *(
            "What is 2 plus 3?",
            "5 / five",
            "1,234",
            "98,765",
            "s3://adapters/adapters/sums/3",
            "torch 2.13.0",
        ),
        "raytune-ft generate --adapter sums@v3 --catalog s3://adapters",
        "raytune-ft catalog pull sums@v3 --catalog s3://adapters --to sums",
    ):
        assert text in page.text, text


def test_the_job_stands_there_as_yaml_with_all_defaults(tmp_path: Path) -> None:
    page = _page(tmp_path, _report())
    job = _report().job
    start = page.text.index("name: sums\nmodel:")
    assert yaml.safe_load(page.text[start : page.text.index("system: Linux")]) == job


def test_right_and_wrong_answers_are_marked(tmp_path: Path) -> None:
    page = _page(tmp_path, _report())
    assert len(page.of_class("right")) == 1
    assert len(page.of_class("wrong")) == 1


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = _page(tmp_path, _report(title=HOSTILE))
    addresses = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ADDRESSES
    ]
    assert addresses == ["data:,"]
    assert "script" not in {tag for tag, _ in page.tags}
    style = (
        (tmp_path / "report.html")
        .read_text(encoding="utf-8")
        .partition("<style>")[2]
        .partition("</style>")[0]
    )
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    counts = {"records": 1}
    plain = _report()
    report = _report(
        title=HOSTILE,
        job={**plain.job, "name": HOSTILE, "model": {**plain.job["model"], "path": HOSTILE}},
        result={**plain.result, "uri": HOSTILE},
        samples=[{"prompt": HOSTILE, "references": [HOSTILE], "before": HOSTILE, "after": HOSTILE}],
        data_counts={"sources": [{"uri": HOSTILE, **counts}], "total": counts},
        machine={"device": HOSTILE},
        versions={HOSTILE: HOSTILE},
    )
    page = _page(tmp_path, report)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 11


@pytest.mark.parametrize(
    ("steps", "points"), [(1, 1), (40, 40), (MOST_POINTS, MOST_POINTS), (1203, MOST_POINTS)]
)
def test_every_curve_has_a_point_for_each_step(tmp_path: Path, steps: int, points: int) -> None:
    page = _page(tmp_path, _report(history=[_entry(step, 1.0) for step in range(1, steps + 1)]))
    curves = len(page.of_class("chart"))
    assert curves == 4
    assert len(page.of_class("point")) == curves * points


def test_points_say_their_step_and_value(tmp_path: Path) -> None:
    page = _page(tmp_path, _report(history=[_entry(1, 2.5), _entry(2, 0.123456, validation_loss=0.75)]))
    assert "step 2: 0.1235" in page.text
    assert [dot["title"] for dot in page.of_class("dot")] == ["step 2: 0.75"]


def test_the_chosen_step_and_the_scores_that_chose_it(tmp_path: Path) -> None:
    history = [_entry(1, 2.5), {**_entry(2, 1.5), "validation_scores": {"exact_match": 0.25}}, _entry(3, 1.0)]
    report = _report(history=history)
    chosen = {
        "steps": 3,
        "published_step": 2,
        "best": {"metric": "exact_match", "value": 0.25, "step": 2},
        "stopped_early": {
            "step": 3,
            "metric": "exact_match",
            "patience": 1,
            "best_value": 0.25,
            "best_step": 2,
        },
    }
    page = _page(tmp_path, replace(report, result={**report.result, **chosen}))
    assert "Exact match on the validation split" in page.text
    assert "2 of 3, with the best exact_match: 0.25" in page.text
    assert "after step 3: in 1 validation exact_match was no better than 0.25 of step 2" in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_break_the_curve_and_are_counted(tmp_path: Path, value: float) -> None:
    history = [_entry(1, 2.0), _entry(2, 1.0), _entry(3, value), _entry(4, 1.0, validation_loss=value)]
    page = _page(tmp_path, _report(history=history, scores_after={"exact_match": 0.5, "token_loss": value}))
    assert "1 not finite" in page.text
    assert f"step 3: {value}" in page.text
    drawn = [attributes["d"] for tag, attributes in page.tags if tag == "path"]
    assert len(drawn) == 5
    assert not [data for data in drawn if "nan" in str(data) or "inf" in str(data)]
    assert page.of_class("dot") == []


def test_a_run_without_evaluation_steps_or_answers_is_a_page_too(tmp_path: Path) -> None:
    page = _page(tmp_path, _report(history=[], samples=[], scores_before=None, scores_after=None))
    assert "Scores before and after" not in page.text
    assert "No step was taken." in page.text


def test_several_sources_have_a_sum(tmp_path: Path) -> None:
    sources = [{"uri": f"s3://d/{name}", "records": number} for name, number in (("a", 1111), ("b", 2222))]
    page = _page(tmp_path, _report(data_counts={"sources": sources, "total": {"records": 3333}}))
    assert "1,111" in page.text
    assert "3,333" in page.text


def _with_sources(count: int, **changes: Any) -> RunReport:
    """A report of a run on several sources, of which the second lost its last learned token on the way."""
    plain = _report()
    uris = [f"s3://d/{at}.jsonl" for at in range(count)]
    losses = [[2.0 + at for at in range(count)], [1.0 + at if at != 1 else None for at in range(count)]]
    entries = [
        _entry(step, 1.0) | ({"source_losses": losses[step // 5 - 1]} if step % 5 == 0 else {})
        for step in range(1, 11)
    ]
    sources = [{**plain.job["data"]["sources"][0], "uri": uri, "weight": 0.5} for uri in uris]
    counted = [{"uri": uri, "train": 1111 * (at + 1), "tokens": 77777} for at, uri in enumerate(uris)]
    return _report(
        job={**plain.job, "data": {**plain.job["data"], "sources": sources}},
        history=entries,
        data_counts={"sources": counted, "total": {"train": 1, "tokens": 2}},
        **changes,
    )


def test_several_sources_have_a_row_and_a_chart_each(tmp_path: Path) -> None:
    rows = source_rows(_with_sources(2, task_epochs=[0.25, 3]))
    assert rows == [
        SourceRow("s3://d/0.jsonl", "0.5", "1,111", "77,777", "0.25", "1.0000"),
        SourceRow("s3://d/1.jsonl", "0.5", "2,222", "77,777", "3.00", "3.0000"),
    ]
    page = _page(tmp_path, _with_sources(2, task_epochs=[0.25, 3]))
    assert "Loss of s3://d/1.jsonl" in page.text
    assert len(page.of_class("chart")) == 4 + 2
    assert len(page.of_class("point")) == 4 * 10 + 2 + 1


@pytest.mark.parametrize(("sources", "charts"), [(1, 0), (8, 8), (9, 0)])
def test_one_source_and_very_many_have_no_charts_of_their_own(
    tmp_path: Path, sources: int, charts: int
) -> None:
    report = _with_sources(sources)
    assert len(source_rows(report)) == (sources if sources > 1 else 0)
    assert len(_page(tmp_path, report).of_class("chart")) == 4 + charts


def test_a_run_without_steps_has_sources_without_a_loss(tmp_path: Path) -> None:
    report = replace(_with_sources(2), history=[])
    assert [(row.passes, row.loss) for row in source_rows(report)] == [("–", "–")] * 2
    assert len(_page(tmp_path, report).of_class("chart")) == 0


def test_a_page_that_is_there_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    assert "sums" in _page(tmp_path, _report()).text


def test_a_higher_score_and_a_lower_loss_are_better() -> None:
    before = {"exact_match": 0.5, "rougeL": 0.5, "bleu": 20.0, "token_loss": 1.0}
    rows = score_rows(
        before, {"exact_match": 0.75, "rougeL": 0.5, "bleu": 10.0, "token_loss": 0.5, "chrf": 30.0}
    )
    assert [row.better for row in rows] == [True, None, False, True, None]
    assert [row.change for row in rows] == ["+25.0", "0.0", "−10.0", "−0.5000", ""]
    assert [row.bar_after for row in rows] == [75.0, 50.0, 10.0, None, 30.0]


def test_commands_quote_what_a_shell_would_split() -> None:
    assert usage_commands({"adapter": "a", "version": 1, "catalog": "/my files/c"})[1] == (
        "raytune-ft catalog pull a@v1 --catalog '/my files/c' --to a"
    )


def test_durations() -> None:
    assert [duration_text(seconds) for seconds in (0, 9.94, 12.4, 59.6, 60, 3599.7)] == [
        *("0.0 s", "9.9 s", "12 s", "1 min 0 s", "1 min 0 s", "1 h 0 min")
    ]


finite = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(finite, finite)
def test_ticks_enclose_the_values_and_are_few(one: float, other: float) -> None:
    low, high = sorted([one, other])
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    slack = 1e-9 * max(abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_no_value_stops_a_chart(values: list[float]) -> None:
    drawn = chart("Loss", [_entry(step, value) for step, value in enumerate(values, 1)], "loss")
    assert drawn.missing == sum(not can_be_drawn(value) for value in values)
    places = [tick.percent for tick in drawn.values]
    assert all(-0.01 <= place <= 100.01 for place in places)
    numbers = [float(text) for line in drawn.lines for pair in line[1:].split("L") for text in pair.split()]
    assert all(-0.01 <= number <= 100.01 for number in numbers)


@given(st.integers(0, 5000), st.integers(2, 600))
def test_thinning_keeps_the_ends_and_the_order(count: int, most: int) -> None:
    kept = thin(count, most)
    assert len(kept) == min(count, most)
    assert kept == sorted(set(kept))
    assert not kept or (kept[0], kept[-1]) == (0, count - 1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_a_moving_average_stays_within_its_values_and_keeps_the_ends(values: list[float]) -> None:
    smooth = smoothed(values)
    assert len(smooth) == len(values)
    assert (smooth[0], smooth[-1]) == (values[0], values[-1])
    assert min(values) - 1e-6 <= min(smooth)
    assert max(smooth) <= max(values) + 1e-6


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60))
def test_every_history_has_a_chart_inside_its_box(losses: list[float]) -> None:
    drawn = chart("Loss", [_entry(step, loss) for step, loss in enumerate(losses, 1)], "loss")
    coordinates = [
        float(number) for line in drawn.lines for pair in line[1:].split("L") for number in pair.split()
    ]
    assert all(-0.01 <= number <= 100.01 for number in coordinates)
    assert len(drawn.strips) == len(losses)
    assert sum(strip.width for strip in drawn.strips) == pytest.approx(100 if losses else 0)
