"""Filters of the list, what differs between versions, and where they came from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import InterruptedStorage, adapter_files, draft
from typer.testing import CliRunner

from raytune_ft.catalog import (
    AdapterRecord,
    BaseModelRef,
    Catalog,
    Change,
    FileEntry,
    Filter,
    compare_records,
    lineage_of,
    list_catalog,
    roll_back,
)
from raytune_ft.cli.catalog import app
from raytune_ft.errors import CatalogError
from raytune_ft.storage import Storage


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    return adapter_files(tmp_path / "files")


@pytest.fixture
def catalog(storage: Storage, files: Mapping[str, Path]) -> Catalog:
    """Three adapters: `capital` of two versions and two aliases, `sum-a` and `sum-b` of one version."""
    catalog = Catalog(storage)
    other = BaseModelRef(path="s3://models/other", digest="e" * 64)
    drafts = [
        draft(),
        draft(scores_after={"exact_match": 0.5, "rouge": 0.1}, parent="capital@v1"),
        draft(adapter="sum-a", base=other),
        draft(adapter="sum-b", scores_after=None),
    ]
    for number, one in enumerate(drafts):
        catalog.publish(one, files, publish_id=f"run-{number}")
    catalog.set_alias("capital", "production", 1)
    catalog.set_alias("capital", "candidate", 2)
    catalog.set_alias("sum-a", "production", 1)
    return catalog


class TestList:
    @pytest.mark.parametrize(
        ("only", "names"),
        [
            (Filter(), ["capital@v2", "sum-a@v1", "sum-b@v1"]),
            (Filter(adapter="sum-*"), ["sum-a@v1", "sum-b@v1"]),
            (Filter(adapter="SUM-*"), []),
            (Filter(base="models/other"), ["sum-a@v1"]),
            (Filter(base="eeee"), ["sum-a@v1"]),
            (Filter(alias="production"), ["capital@v1", "sum-a@v1"]),
            (Filter(alias="best"), []),
            (Filter(min_scores={"exact_match": 0.75}), ["sum-a@v1"]),
            (Filter(min_scores={"exact_match": 0.5, "rouge": 0.1}), ["capital@v2"]),
            (Filter(adapter="c*", alias="production", min_scores={"exact_match": 0.6}), ["capital@v1"]),
        ],
    )
    def test_filters(self, catalog: Catalog, only: Filter, names: list[str]) -> None:
        listing = list_catalog(catalog, only)
        assert [record.reference for record, _ in listing.rows] == names
        assert listing.damaged == ()

    def test_a_damaged_record_stops_no_other(self, tmp_path: Path, files: Mapping[str, Path]) -> None:
        catalog = Catalog.at(str(tmp_path / "catalog"))
        for name in ("a", "b", "c"):
            catalog.publish(draft(adapter=name), files, publish_id=name)
        catalog.set_alias("c", "production", 1)
        catalog.storage.write("adapters/a/versions/9999999998.json", b"{")
        catalog.storage.write("adapters/c/aliases/production/9999999998.json", b"\x1b{\n")
        out, err = run("ls", "--json", "--catalog", catalog.uri)
        assert [entry["adapter"] for entry in json.loads(out)] == ["b"]
        first, second = err.splitlines()
        assert first.startswith(f"note: left out: {catalog.uri}/adapters/a/versions/9999999998.json: ")
        assert second.startswith(f"note: left out: {catalog.uri}/adapters/c/aliases/production/")

    def test_command(self, tmp_path: Path, files: Mapping[str, Path]) -> None:
        catalog = Catalog.at(str(tmp_path / "catalog"))
        catalog.publish(draft(), files, publish_id="run")
        at = ("ls", "--catalog", catalog.uri)
        for option in ("--adapter=x*", "--base=llama", "--alias=best", "--min-score=exact_match=0.8"):
            assert run(*at, option)[0] == f"{catalog.uri} holds no adapter that passes\n"
        passing = ("--adapter=cap*", "--base=tiny", "--min-score=exact_match=0.75")
        assert "capital" in run(*at, *passing)[0]
        for wrong in ("exact_match", "=1", "exact_match=high", "exact_match=nan", "exact_match=inf"):
            with pytest.raises(
                CatalogError, match=r"^--min-score .*: write METRIC=VALUE, such as exact_match"
            ):
                run(*at, "--min-score", wrong)


def record(version: int = 1, **changes: Any) -> AdapterRecord:
    return AdapterRecord(
        **dict(draft(**changes)),
        version=version,
        publish_id=f"run-{version}",
        created_at="2026-01-01T00:00:00.000Z",
        files=(FileEntry(name="a.safetensors", sha256="a" * 64, size_bytes=1),),
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
SECTION = st.dictionaries(st.sampled_from("xyz"), JSON, max_size=3)


class TestDiff:
    def test_every_part(self) -> None:
        source = {"uri": "s3://data/a"}
        old = record(
            method={"kind": "lora", "rank": 8},
            job={"name": "capital", "method": {"rank": 8}, "data": {"sources": [source]}},
        )
        new = record(
            2,
            base=BaseModelRef(path="s3://models/tiny", digest="e" * 64),
            method={"kind": "lora", "rank": 16},
            job={"name": "capital", "method": {"rank": 16}, "data": {"sources": [source, {"uri": "b"}]}},
            data={"fingerprint": "f" * 64, "counts": {"train": 5}},
            scores_after={"exact_match": 0.5},
            scores_before=None,
            library_versions={"torch": "2.14.0"},
        )
        assert compare_records(old, new) == [
            Change("base.digest", "d" * 64, "e" * 64, None, None),
            Change("method.rank", 8, 16, None, 8.0),
            Change("data.counts.train", 3, 5, None, 2.0),
            Change("scores_before.exact_match", 0.0, None, "old", None),
            Change("scores_after.exact_match", 0.75, 0.5, None, -0.25),
            Change("library_versions.torch", "2.13.0", "2.14.0", None, None),
            Change("job.data.sources[1].uri", None, "b", "new", None),
        ]

    @settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(SECTION, SECTION)
    def test_a_change_is_found_from_both_sides(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        first, second = record(job=one), record(job=other)
        assert compare_records(first, first) == []
        there = {(c.path, repr(c.old), repr(c.new)) for c in compare_records(first, second)}
        back = {(c.path, repr(c.new), repr(c.old)) for c in compare_records(second, first)}
        assert there == back
        assert bool(there) or one == other

    def test_numbers_of_any_size(self) -> None:
        (change,) = compare_records(record(job={"a": 10**400}), record(job={"a": 0.5}))
        assert (change.path, change.difference) == ("job.a", None)

    def test_command(self, catalog: Catalog) -> None:
        at = ("--catalog", catalog.uri)
        shown = run("diff", "capital@v1", "capital@v2", *at)[0]
        assert "scores_after.exact_match │ 0.75       │ 0.5        │ -0.25" in shown
        found = json.loads(run("diff", "capital@production", "capital", "--json", *at)[0])
        assert (found["old"], found["new"]) == ("capital@v1", "capital@v2")
        assert found["changes"][1] == {
            "path": "scores_after.rouge",
            "old": None,
            "new": 0.1,
            "only": "new",
            "difference": None,
        }
        assert run("diff", "capital", "capital@v2", *at)[0] == (
            "capital@v2 and capital@v2 were made alike, and score alike\n"
        )


class TestLineage:
    def test_parents_and_aliases_over_time(self, catalog: Catalog) -> None:
        catalog.set_alias("capital", "production", 2)
        roll_back(catalog, "capital", "production")
        found = lineage_of(catalog, "capital")
        assert found.broken is None
        second, first = found.chain
        assert (second.record.reference, first.record.reference) == ("capital@v2", "capital@v1")
        assert [(p.alias, p.until is None) for p in second.periods] == [
            ("candidate", True),
            ("production", False),
        ]
        early, late = first.periods
        assert early.since <= (early.until or "") == second.periods[1].since
        assert (late.since, late.until) == (second.periods[1].until, None)

    @pytest.mark.parametrize(
        ("parent", "message"),
        [
            ("gone@v1", "gone@v1: is not in "),
            ("gone", "no adapter gone"),
            ("../../etc", "not a reference"),
            ("loop@v1", "loop@v1: is its own ancestor; a record was altered or damaged"),
        ],
    )
    def test_a_broken_chain_says_where(
        self, catalog: Catalog, files: Mapping[str, Path], parent: str, message: str
    ) -> None:
        catalog.publish(draft(adapter="loop", parent=parent), files, publish_id="loop")
        found = lineage_of(catalog, "loop")
        assert [ancestor.record.reference for ancestor in found.chain] == ["loop@v1"]
        assert message in (found.broken or "")

    def test_many_that_are_gone_and_many_of_one_name_take_few_requests(
        self, tmp_path: Path, files: Mapping[str, Path]
    ) -> None:
        catalog = Catalog.at(str(tmp_path / "catalog"))
        gone = tuple(f"gone-{number}@v1" for number in range(50))
        catalog.publish(draft(adapter="merged", merged_from=gone), files, publish_id="merged")
        for number in range(1, 6):
            parent = f"capital@v{number - 1}" if number > 1 else None
            catalog.publish(draft(parent=parent), files, publish_id=f"run-{number}")
            catalog.set_alias("capital", "production", number)
        counting = InterruptedStorage(catalog.storage, -1, lambda: None)
        (merged,) = lineage_of(Catalog(counting), "merged").chain
        assert [source.broken for source in merged.merged_from] == [
            f"{reference}: is not in {catalog.uri}" for reference in gone
        ]
        assert counting.requests < len(gone) + 10
        counting = InterruptedStorage(catalog.storage, -1, lambda: None)
        assert len(lineage_of(Catalog(counting), "capital").chain) == 5
        moves = [key for key in counting.keys if "/aliases/production/" in key]
        assert len(moves) == len(set(moves)) == 5

    def test_command(self, catalog: Catalog) -> None:
        at = ("--catalog", catalog.uri)
        lines = run("lineage", "capital", *at)[0].splitlines()
        assert lines[0] == "capital@v2"
        assert any("parent: capital@v1" in line for line in lines)
        assert any("alias production: from 20" in line and "until now" in line for line in lines)
        found = json.loads(run("lineage", "capital", "--json", *at)[0])
        assert [one["reference"] for one in found["chain"]] == ["capital@v2", "capital@v1"]
        assert found["chain"][1]["aliases"][0]["alias"] == "production"
        assert found["broken"] is None
