"""The gate: which bounds there are, which hold, what it says, and which gates a job may have."""

import math
import operator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from stores import adapter_files, draft

from raytune_ft.catalog import AdapterRecord, BaseModelRef, Catalog, FileEntry
from raytune_ft.catalog.gate import Bound, as_of_now, refusal_message, refusals, verdict
from raytune_ft.cli.progress import print_result
from raytune_ft.errors import SpecError
from raytune_ft.evaluate.scores import score
from raytune_ft.report import outcome_texts, score_rows
from raytune_ft.spec import parse_job

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def record(scores: dict[str, float] | None, forgetting: float | None = None) -> AdapterRecord:
    return AdapterRecord(
        adapter="sums",
        base=BaseModelRef(path="base", digest="0"),
        method={},
        job={},
        data={},
        seed=0,
        steps=1,
        tokens=1,
        learned_tokens=1,
        loss=None,
        code_version="1",
        library_versions={},
        machine={},
        scores_before=None,
        scores_after=scores,
        forgetting=forgetting,
        version=3,
        publish_id="p",
        created_at="2026-01-01T00:00:00Z",
        files=(FileEntry(name="a.safetensors", sha256="0" * 64, size_bytes=1),),
    )


class TestBound:
    @given(
        sign=st.sampled_from(sorted(SIGNS)), limit=FINITE, value=st.floats(), space=st.sampled_from(["", " "])
    )
    def test_means_what_it_says(self, sign: str, limit: float, value: float, space: str) -> None:
        bound = Bound.parse(f"{sign}{space}{limit!r}")
        assert bound.limit == limit
        assert bound.holds(value) is SIGNS[sign](value, limit)

    @given(sign=st.sampled_from(sorted(SIGNS)), limit=FINITE, value=FINITE)
    def test_never_shows_a_refused_score_as_one_that_would_pass(
        self, sign: str, limit: float, value: float
    ) -> None:
        bound = Bound.parse(f"{sign} {limit!r}")
        refusal = bound.refusal("exact_match", value)
        assert (refusal is None) is bound.holds(value)
        if refusal is not None:
            assert not bound.holds(float(refusal.split()[2].removesuffix(",")))

    def test_a_score_that_is_no_number_never_holds(self) -> None:
        assert not any(Bound.parse(f"{sign} 0").holds(math.nan) for sign in SIGNS)

    @pytest.mark.parametrize(
        "text", ["", "0.8", "== 1", ">= x", ">= nan", "> 1 2", "=> 1", ">= 0.8%", ">\n1"]
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(SpecError, match="is no bound; write >=, <=, > or < and a number"):
            Bound.parse(text)


class TestRefusals:
    GATE = {"exact_match": ">= 0.8", "forgetting": "<= 0.05", "token_loss": "< 1.5"}  # noqa: RUF012

    def test_every_bound_has_to_hold(self) -> None:
        assert refusals(self.GATE, record({"exact_match": 0.8, "token_loss": 1.4}, 0.05)) == []
        assert refusals(self.GATE, record({"exact_match": 0.7125, "token_loss": 1.5}, -1.0)) == [
            "exact_match = 0.7125, and the gate asks for >= 0.8",
            "token_loss = 1.5, and the gate asks for < 1.5",
        ]

    def test_what_was_not_measured_does_not_hold(self) -> None:
        assert refusals(self.GATE, record(None)) == [
            "exact_match was not measured, and the gate asks for >= 0.8",
            "forgetting was not measured, and the gate asks for <= 0.05",
            "token_loss was not measured, and the gate asks for < 1.5",
        ]

    def test_a_score_of_the_same_name_is_not_forgetting(self) -> None:
        (reason,) = refusals({"forgetting": "< 1"}, record({"forgetting": 0.0}, 2.0))
        assert reason == "forgetting = 2, and the gate asks for < 1"


def result(old: int | None, *refused: str) -> dict[str, Any]:
    gate = {"alias": "production", "passed": not refused, "refused": list(refused), "alias_version": old}
    return {"adapter": "sums", "version": 3, "uri": "u", "steps": 1, "seconds": 1.0, "gate": gate}


class TestMessage:
    def test_says_what_was_refused_and_what_to_do(self) -> None:
        assert refusal_message(
            result(2, "a = 1, and the gate asks for > 1", "b was not measured"), "/my cat"
        ) == (
            "published sums@v3, but production was left at v2: a = 1, and the gate asks for > 1; "
            "b was not measured; look at it with raytune-ft catalog diff sums@v2 sums@v3 --catalog '/my cat'"
            ", or move the alias by hand: raytune-ft catalog promote sums@v3 production --catalog '/my cat'"
        )

    def test_an_alias_that_never_was_has_nothing_to_compare_with(self) -> None:
        message = refusal_message(result(None, "a = 1, and the gate asks for > 1"), "s3://c")
        assert message is not None
        assert "but production was not set: a = 1" in message
        assert "raytune-ft catalog show sums@v3 --catalog s3://c, or" in message

    def test_is_none_where_nothing_was_refused(self) -> None:
        assert refusal_message(result(3), "c") is None
        assert refusal_message({"adapter": "sums", "version": 3}, "c") is None


class TestVerdict:
    def test_a_decision_by_hand_counts(self) -> None:
        reasons = ["a = 1, and the gate asks for > 1"]
        refused = verdict("production", reasons, 3, 2)
        assert (refused["passed"], refused["alias_version"]) == (False, 2)
        by_hand = verdict("production", reasons, 3, 3)
        assert by_hand == {"alias": "production", "passed": True, "refused": reasons, "alias_version": 3}
        assert refusal_message({"adapter": "sums", "version": 3, "gate": by_hand}, "c") is None
        assert outcome_texts({"gate": by_hand}) == {
            "Gate": f"refused, but production was moved to v3 by hand: {reasons[0]}"
        }
        assert verdict("production", [], 3, 4)["passed"]

    def test_a_result_of_before_says_what_the_alias_means_now(self, tmp_path: Path) -> None:
        catalog = Catalog.at(str(tmp_path / "catalog"))
        for number in range(3):
            files = adapter_files(tmp_path / "files")
            catalog.publish(draft(adapter="sums"), files, publish_id=f"run-{number}")
        catalog.set_alias("sums", "production", 2)
        kept = result(2, "a = 1, and the gate asks for > 1")
        assert as_of_now(kept, catalog) == kept
        catalog.set_alias("sums", "production", 3)
        now = as_of_now(kept, catalog)
        assert (now["gate"]["passed"], now["gate"]["alias_version"]) == (True, 3)
        assert now["gate"]["refused"] == kept["gate"]["refused"]
        assert as_of_now({"adapter": "sums", "version": 3}, catalog) == {"adapter": "sums", "version": 3}


class TestShown:
    def test_in_words(self) -> None:
        assert outcome_texts({}) == {}
        assert outcome_texts({"forgetting": None, "gate": None}) == {}
        assert outcome_texts({"forgetting": -0.5, **result(3)}) == {
            "Forgetting": "-0.5000 in the token loss of other tasks",
            "Gate": "passed; production means v3",
        }
        assert outcome_texts(result(None, "a", "b")) == {"Gate": "refused, production was not set: a; b"}

    def test_at_the_end_of_a_run(self) -> None:
        console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
        with console.capture() as captured:
            print_result(console, {"forgetting": 0.25, **result(2, "a = 1")})
        lines = [" ".join(line.split()) for line in captured.get().splitlines()]
        assert "Forgetting +0.2500 in the token loss of other tasks" in lines
        assert "Gate refused, production was left at v2: a = 1" in lines

    def test_scores_of_other_tasks_are_read_on_their_own_scale(self) -> None:
        names = ("other_tasks/exact_match", "other_tasks/token_loss")
        rows = score_rows(dict.fromkeys(names, 0.5), dict.fromkeys(names, 0.25))
        assert [(row.label, row.after, row.better) for row in rows] == [
            ("Other tasks: Exact match", "25.0 %", False),
            ("Other tasks: Token loss", "0.2500", True),
        ]


def job(**sections: Any) -> dict[str, Any]:
    return {
        "name": "sums",
        "model": {"path": "base"},
        "data": {"sources": [{"uri": "data.jsonl"}]},
        **sections,
        "publish": {"catalog": "catalog", **sections.get("publish", {})},
    }


FORGETTING = {"forgetting": {"sources": [{"uri": "others.jsonl"}]}}


class TestJob:
    def test_measures_what_the_scores_are_called(self) -> None:
        metrics = ["exact_match", "rouge", "bleu", "chrf"]
        scores = score(metrics, ["a"], [["a"]])  # type: ignore[arg-type]  # a list of literals
        parsed = parse_job(job(evaluate={"metrics": metrics}))
        assert parsed.measured == (*scores, "token_loss")

    def test_a_gate_may_ask_for_all_that_is_measured(self) -> None:
        for metrics in (["exact_match", "rouge"], []):
            parsed = parse_job(job(evaluate={"metrics": metrics, **FORGETTING}))
            gate = dict.fromkeys(parsed.measured, "< 1")
            gated = parse_job(job(evaluate={"metrics": metrics, **FORGETTING}, publish={"gate": gate}))
            assert gated.publish.gate == gate
            assert parse_job(gated.resolved()) == gated

    def test_an_override_may_set_it(self) -> None:
        parsed = parse_job(job(), ['publish.gate.exact_match=">= 0.8"'])
        assert parsed.publish.gate == {"exact_match": ">= 0.8"}

    @pytest.mark.parametrize(
        ("sections", "line"),
        [
            (
                {"publish": {"gate": {"foo": "> 1"}}, "evaluate": {"metrics": ["chrf"]}},
                "publish.gate.foo: is not measured by this job; it measures chrf, token_loss; "
                "see evaluate.metrics and data.split.test",
            ),
            (
                {"publish": {"gate": {"forgetting": "< 1"}}, "evaluate": {"metrics": ["chrf"]}},
                "publish.gate.forgetting: is not measured by this job; it measures chrf, token_loss; "
                "set evaluate.forgetting",
            ),
            (
                {"publish": {"gate": {"token_loss": "< 1"}}, "evaluate": {"metrics": []}},
                "publish.gate.token_loss: is not measured by this job; it measures nothing; "
                "see evaluate.metrics and data.split.test",
            ),
            (
                {
                    "publish": {"gate": {"token_loss": "< 1"}},
                    "data": {"sources": [{"uri": "d"}], "split": {"test": 0}},
                },
                "publish.gate.token_loss: is not measured by this job; it measures nothing; "
                "see evaluate.metrics and data.split.test",
            ),
            (
                {"publish": {"gate": {"bleu": "> 1"}, "alias": None}},
                "publish: gate holds back an alias, and alias is null; name one, or remove gate",
            ),
            (
                {"publish": {"gate": {"bleu": 1, "token_loss": "< 1e999", "rouge1": "> 0"}}},
                "publish.gate: bleu = 1, token_loss = '< 1e999': must be >=, <=, > or < and a number, "
                "in quotes: '>= 0.8'",
            ),
            (
                {"publish": {"gate": {}}},
                "publish.gate: must be a mapping with at least one bound, such as {exact_match: '>= 0.8'}",
            ),
            (
                {"publish": {"gate": ">= 0.8"}},
                "publish.gate = '>= 0.8': must be a mapping with at least one bound, such as "
                "{exact_match: '>= 0.8'}",
            ),
            (
                {"evaluate": {"forgetting": {"sources": [{"uri": "o", "weight": 2}]}}},
                "evaluate.forgetting.sources[0].weight: no such field; did you mean data.sources.weight?",
            ),
        ],
    )
    def test_what_it_may_not_ask_for(self, sections: dict[str, Any], line: str) -> None:
        with pytest.raises(SpecError) as caught:
            parse_job(job(**sections))
        assert str(caught.value) == f"job has 1 problem:\n  {line}"
