"""The catalog's page: whole, self-contained, safe to open, and true to the records."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from stores import adapter_files, draft
from typer.testing import CliRunner

# Registers the command.
from raytune_ft.cli.catalog.page import app  # isort: skip
from raytune_ft.catalog import AdapterRecord, BaseModelRef, Catalog, FileEntry
from raytune_ft.catalog.listing import Histories, History
from raytune_ft.catalog_page import CatalogPage, adapter_rows, write_catalog_page
from raytune_ft.errors import CatalogError, StorageError

HOSTILE = (
    "</script></style></title><script>alert('1')</script><img src=x onerror=\"alert(2)\">{{ 7*7 }} & 'q'"
)
VOID = {"meta", "link", "br", "img", "input"}
ADDRESSES = {"src", "href", "xlink:href", "action", "data", "srcset", "poster", "formaction"}


class Page(HTMLParser):
    """Collects what a page holds, and checks that its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return "".join("".join(texts) for tag, texts in self.texts.items() if tag not in ("script", "style"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._open[-1] if self._open else "", []).append(data)

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


def record(adapter: str = "sums", version: int = 1, **changes: Any) -> AdapterRecord:
    values: dict[str, Any] = {
        "version": version,
        "publish_id": f"{adapter}-{version}",
        "created_at": "2026-01-02T03:04:05Z",
        "files": (FileEntry(name="adapter_model.safetensors", sha256="a" * 64, size_bytes=41_250_000),),
        **changes,
    }
    return AdapterRecord(**{**dict(draft(adapter=adapter)), **values})


def page_of(*histories: History, damaged: tuple[str, ...] = ()) -> CatalogPage:
    found = Histories(histories, damaged=damaged, notes=())
    return CatalogPage("s3://adapters", found, "2026-03-02T09:30:00+00:00", "raytune-ft 0.1.0")


def written(page: CatalogPage, folder: Path) -> Page:
    write_catalog_page(page, folder / "catalog.html")
    return Page((folder / "catalog.html").read_text(encoding="utf-8"))


def one(*records: AdapterRecord, aliases: Mapping[str, int] | None = None) -> History:
    return History(records, len(records), dict(aliases or {}))


def test_it_shows_what_the_records_say(tmp_path: Path) -> None:
    newest = record(
        version=2,
        scores_after={"exact_match": 0.75},
        scored_examples={"exact_match": 40},
        notices=("3 references are cut",),
        parent="sums@v1",
        forgetting=0.0123,
    )
    page = written(page_of(one(newest, record(), aliases={"production": 1})), tmp_path)
    shown = ("1 adapter, 2 versions", "production → v1", "75.0 %", "+75.0", "39.3 MiB", "s3://models/tiny")
    for text in (
        *shown,
        "kind lora, rank 8",
        "f" * 16,
        "0.0123",
        "2026-01-02 03:04",
        "sums@v1",
        "of 40",
        "3 references are cut",
    ):
        assert text in page.text
    assert "raytune-ft catalog pull sums@v2 --catalog s3://adapters" in page.text


def test_nothing_leaves_it_and_only_its_own_script_may_run(tmp_path: Path) -> None:
    page = written(page_of(one(record(version=2), record())), tmp_path)
    for _, attributes in page.tags:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        for name in ADDRESSES & set(attributes):
            assert re.match("#|data:,$", str(attributes[name]))
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in page.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        (content,) = page.texts[kind]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_no_text_of_a_record_becomes_markup(tmp_path: Path) -> None:
    hostile = record(
        base=BaseModelRef(path=HOSTILE, digest=HOSTILE),
        method={HOSTILE: HOSTILE, "rank": [HOSTILE]},
        data={"fingerprint": HOSTILE},
        scores_before={HOSTILE: 0.1},
        scores_after={HOSTILE: 0.2},
        parent=HOSTILE,
        merged_from=(HOSTILE, "sums@v1"),
        code_version=HOSTILE,
    )
    plain = written(page_of(one(record(version=2), record())), tmp_path)
    page = written(
        page_of(one(hostile.model_copy(update={"version": 2}), hostile), damaged=(HOSTILE,)), tmp_path
    )
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"h2", "ul", "li", "a"}
    assert (len(page.texts["script"]), len(page.texts["style"])) == (1, 1)
    assert "alert" not in page.texts["script"][0]
    assert HOSTILE in page.text


def test_half_a_character_stops_nothing(tmp_path: Path) -> None:
    assert "?" in written(page_of(one(record(data={"fingerprint": "\ud800"}))), tmp_path).text


def test_every_link_has_its_place_and_every_place_one_name(tmp_path: Path) -> None:
    page = written(
        page_of(
            one(record("base")),
            one(record("merged", merged_from=("base@v1", "sums@v2", "gone@v1"))),
            one(record("sums", 2, parent="base@v1"), record("sums", parent="sums@v0")),
            one(record("other", parent="sums@v9")),
        ),
        tmp_path,
    )
    assert len(set(page.ids())) == len(page.ids())
    links = [str(of["href"]) for tag, of in page.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= set(page.ids())
    assert {"#base@v1", "#sums@v2", "#sums", "#merged@v1"} <= set(links)
    assert "gone@v1" in page.text


def test_an_adapter_is_never_taken_for_a_part_of_the_page(tmp_path: Path) -> None:
    names = ("search", "adapters", "bar", "count", "all")
    ids = written(page_of(*(one(record(name)) for name in names)), tmp_path).ids()
    assert len(set(ids)) == len(ids)


def test_charts_are_of_several_versions(tmp_path: Path) -> None:
    scores = [{"exact_match": 0.5, "bleu": 20.0}, {"exact_match": 0.25}, None]
    records = [record(version=3 - at, scores_after=each) for at, each in enumerate(scores)]
    (row,) = adapter_rows(page_of(one(*records)))
    assert row.metrics == ("exact_match", "bleu")
    assert [[text for _, _, text in chart.points] for chart in row.charts] == [
        ["v2: 25.0 %", "v3: 50.0 %"],
        ["v3: 20.0"],
    ]
    assert written(page_of(one(*records)), tmp_path).text.count("v2: 25.0 %") == 1
    assert not [tag for tag, _ in written(page_of(one(record())), tmp_path).tags if tag == "svg"]


def test_what_is_not_shown_is_said(tmp_path: Path) -> None:
    page = written(page_of(History((record(version=9),), 9, {}), damaged=("s3://a/b: damaged",)), tmp_path)
    assert "and 8 more" in page.text
    assert "s3://a/b: damaged" in page.text


def test_an_empty_catalog(tmp_path: Path) -> None:
    assert "It holds no adapter yet" in written(page_of(), tmp_path).text


def test_no_number_stops_the_page(tmp_path: Path) -> None:
    odd = {"tiny": 5e-324, "large": 1.7e308, "other": -1.7e308, "none": 0.0}
    flipped = {name: -value for name, value in odd.items()}
    size = FileEntry(name="a.safetensors", sha256="a" * 64, size_bytes=2**63 - 1)
    records = [
        record(version=2 - at, scores_before=flipped, scores_after=scores, files=(size,), loss=1.7e308)
        for at, scores in enumerate((odd, flipped))
    ]
    page = written(page_of(one(*records)), tmp_path)
    assert "8,589,934,592.0 GiB" in page.text
    coordinates = [str(of["d"]) for tag, of in page.tags if tag == "path"]
    assert coordinates
    assert not any("nan" in path or "inf" in path for path in coordinates)


def test_more_aliases_than_points(tmp_path: Path) -> None:
    records = [record(version=600 - at, scores_after={"bleu": float(at)}) for at in range(600)]
    (row,) = adapter_rows(page_of(one(*records)))
    assert [text.partition(":")[0] for _, _, text in row.charts[0].points][-1] == "v600"


def test_metrics_without_end_are_cut() -> None:
    many = {f"m{number}": 1.0 for number in range(5000)}
    (row,) = adapter_rows(page_of(one(record(version=2, scores_after=many), record(scores_after=many))))
    assert (len(row.metrics), len(row.charts), len(row.versions[0].scores)) == (20, 20, 20)


def test_scores_of_other_tasks_have_their_name(tmp_path: Path) -> None:
    scores = {"exact_match": 0.5, "other_tasks/rougeL": 0.4}
    page = written(
        page_of(one(record(version=2, scores_after=scores), record(scores_after=scores))), tmp_path
    )
    assert "Other tasks: ROUGE-L" in page.text
    assert "Other tasks/rougel" not in page.text
    assert "v2: 40.0 %" in page.text


class TestCommand:
    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["report", *arguments])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Catalog:
        catalog = Catalog.at(str(tmp_path / "catalog"))
        for number in range(2):
            catalog.publish(draft(), adapter_files(tmp_path / "files"), publish_id=f"run-{number}")
        return catalog

    def test_writes_the_page(self, catalog: Catalog, tmp_path: Path) -> None:
        path = tmp_path / "catalog.html"
        path.write_text("an older one")
        assert self.run("--catalog", catalog.uri, "--to", str(path)) == f"{path} shows 1 adapter\n"
        page = Page(path.read_text())
        assert {"capital", "capital@v1", "capital@v2"} <= set(page.ids())
        assert [found.name for found in tmp_path.iterdir() if found.name.startswith(".")] == []

    def test_for_programs(self, catalog: Catalog, tmp_path: Path) -> None:
        path = tmp_path / "catalog.html"
        answer = json.loads(self.run("--catalog", catalog.uri, "--to", str(path), "--json"))
        assert answer == {"to": str(path), "adapters": 1, "left_out": 0}

    def test_a_folder_that_is_not_there(self, catalog: Catalog, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="no such file; check the name"):
            self.run("--catalog", catalog.uri, "--to", str(tmp_path / "none" / "catalog.html"))

    @pytest.mark.parametrize("name", [".", "/", "folder"])
    def test_a_folder(
        self, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        (tmp_path / "folder").mkdir()
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(CatalogError, match=r"is a folder; name a file in it, such as catalog\.html$"):
            self.run("--catalog", catalog.uri, "--to", name)
        assert sorted(tmp_path.iterdir()) == before
