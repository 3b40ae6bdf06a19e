"""Which step is published, and where training stops early: decided from the history of a run alone."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.errors import SpecError
from raytune_ft.spec import EarlyStoppingSpec, JobSpec, parse_job
from raytune_ft.train.selection import (
    Best,
    EarlyStop,
    Selection,
    best_of,
    check_best,
    choose,
    kept_text,
    ranking_value,
    stopped_early,
)

VALUES = st.lists(st.none() | st.sampled_from([0.25, 0.5, 0.75, 1.0, math.nan]), max_size=12)
LOSS = "validation_loss"


def history(values: list[float | None], metric: str = LOSS) -> list[dict[str, Any]]:
    """A step for each value; None: it was not measured there."""
    return [
        {"step": step}
        | (
            {}
            if value is None
            else {metric: value}
            if metric == LOSS
            else {"validation_scores": {metric: value}}
        )
        for step, value in enumerate(values, 1)
    ]


def job(**sections: Any) -> JobSpec:
    return parse_job(
        {
            "name": "j",
            "model": {"path": "base"},
            "data": {"sources": [{"uri": "d.jsonl"}]},
            "publish": {"catalog": "catalog"},
            **sections,
        }
    )


@given(VALUES, st.sampled_from([LOSS, "exact_match"]))
def test_the_best_is_the_first_of_the_best_values(values: list[float | None], metric: str) -> None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    found = best_of(history(values, metric), metric)
    if not finite:
        assert found is None
        return
    value = min(finite) if metric == LOSS else max(finite)
    assert found == Best(metric, value, values.index(value) + 1)


@given(VALUES, st.sampled_from([LOSS, "exact_match"]), st.integers(1, 4), st.sampled_from([0.0, 0.25]))
def test_training_stops_at_one_step_however_often_it_goes_on(
    values: list[float | None], metric: str, patience: int, min_delta: float
) -> None:
    spec = EarlyStoppingSpec(patience=patience, metric=metric, min_delta=min_delta)
    stops = [stopped_early(history(values[:end], metric), spec) for end in range(len(values) + 1)]
    first = next((stop for stop in stops if stop is not None), None)
    assert all(stop == (first if first and first.step <= end else None) for end, stop in enumerate(stops))
    if first is not None:
        since = [value for value in values[first.best_step : first.step] if value is not None]
        assert len(since) == patience
        sign = 1 if metric == LOSS else -1
        assert not any(sign * (first.best_value - value) > min_delta for value in since)


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "expected"),
    [
        ([3.0, 2.0, 2.5, 2.4], 2, 0.0, EarlyStop(4, LOSS, 2, 2.0, 2)),
        ([3.0, 2.0, 2.0], 1, 0.0, EarlyStop(3, LOSS, 1, 2.0, 2)),
        ([3.0, 2.9, 2.8, 2.7], 3, 0.25, None),
        ([3.0, 2.9, 2.8], 2, 0.25, EarlyStop(3, LOSS, 2, 3.0, 1)),
        ([3.0, None, 4.0, None, 2.0], 2, 0.0, None),
        ([math.nan, math.nan, 2.0], 1, 0.0, None),
        ([2.0, math.nan], 1, 0.0, EarlyStop(2, LOSS, 1, 2.0, 1)),
    ],
)
def test_patience_counts_validations_without_an_improvement(
    values: list[float | None], patience: int, min_delta: float, expected: EarlyStop | None
) -> None:
    spec = EarlyStoppingSpec(patience=patience, min_delta=min_delta)
    assert stopped_early(history(values), spec) == expected


@given(VALUES, st.sampled_from([LOSS, "exact_match"]))
def test_sorted_by_value_alone_the_best_comes_first(values: list[float | None], metric: str) -> None:
    """Of equals Ray Train keeps the newer."""
    steps = history(values, metric)
    ranked = [ranking_value(steps[: at + 1], metric) for at in range(len(steps))]
    sign = 1 if metric == LOSS else -1
    places = {step: sign * value for step, value in enumerate(ranked, 1)}
    best = best_of(steps, metric)
    if best is None:
        assert all(place == math.inf for place in places.values()), "what was not measured is never the best"
        return
    assert [step for step, place in places.items() if place == min(places.values())] == [best.step]
    assert json.loads(json.dumps(ranked)) == ranked, "what Ray keeps of it is exact"


def test_what_a_job_publishes() -> None:
    loss = history([3.0, 2.0, 2.5])
    assert choose(job(), loss, 3) == Selection(3)
    keeps = job(checkpoint={"keep_best": True})
    assert choose(keeps, loss, 3) == Selection(2, Best(LOSS, 2.0, 2))
    stops = job(schedule={"early_stopping": {"patience": 1}})
    stop = EarlyStop(3, LOSS, 1, 2.0, 2)
    assert choose(stops, loss, 9) == Selection(2, Best(LOSS, 2.0, 2), stop)
    assert choose(stops, loss, 3) == Selection(2, Best(LOSS, 2.0, 2)), "nothing was left to be done"
    both = job(
        schedule={"early_stopping": {"patience": 1}},
        checkpoint={"keep_best": True, "best_by": "exact_match"},
    )
    scored = [{**entry, "validation_scores": {"exact_match": 0.1 * entry["step"]}} for entry in loss]
    assert choose(both, scored, 9) == Selection(3, Best("exact_match", 0.1 * 3, 3), stop)
    with pytest.raises(SpecError, match="validation_loss was finite at no checkpoint"):
        choose(keeps, history([math.nan]), 1)


def test_a_run_that_began_without_keeping_the_best_is_told_what_it_keeps() -> None:
    loss = history([3.0, 2.0, 2.5])
    check_best(loss, LOSS, lambda: [2, 3])
    check_best(loss, None, lambda: [3])
    check_best([], LOSS, lambda: [])
    with pytest.raises(
        SpecError,
        match=r"step 2 has the best validation_loss of this run, 2, and its checkpoint was not kept "
        r"\(kept are steps 1 and 3\); publish one with --publish-step, set checkpoint.keep_best: false",
    ):
        check_best(loss, LOSS, lambda: [1, 3])
    with pytest.raises(SpecError, match="best_by = exact_match: this run began without measuring it"):
        check_best(loss, "exact_match", lambda: [1, 2, 3])


def test_many_kept_steps_are_not_all_named() -> None:
    assert kept_text([]) == "none is kept"
    assert kept_text([7]) == "kept is step 7"
    assert kept_text(range(1, 41)).count(",") < 22


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"checkpoint": {"keep_best": True, "best_by": "exakt"}},
            "checkpoint.best_by = 'exakt': 'exakt' is not measured on the validation split; use "
            "validation_loss, exact_match, rouge1",
        ),
        (
            {"checkpoint": {"best_by": "rougeL"}},
            "best_by = rougeL chooses among what keep_best keeps, and keep_best = false",
        ),
        (
            {"schedule": {"early_stopping": {"patience": 2}}, "split": 0.0},
            "schedule.early_stopping watches validation_loss, and data.split.validation = 0 measures none",
        ),
        (
            {"checkpoint": {"keep_best": True, "best_by": "exact_match"}, "split": 0.0},
            "checkpoint.keep_best chooses by exact_match, and data.split.validation = 0 measures none",
        ),
        ({"schedule": {"early_stopping": {"patience": 0}}}, "schedule.early_stopping.patience"),
        ({"schedule": {"early_stopping": {}}}, "schedule.early_stopping.patience: required"),
        ({"schedule": {"early_stopping": {"patience": 1, "min_delta": -1}}}, "min_delta"),
    ],
)
def test_what_cannot_be_measured_is_refused(sections: dict[str, Any], message: str) -> None:
    split = sections.pop("split", 0.1)
    data = {"sources": [{"uri": "d.jsonl"}], "split": {"validation": split}}
    with pytest.raises(SpecError) as caught:
        job(data=data, **sections)
    assert message in str(caught.value)
