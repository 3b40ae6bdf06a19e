"""The catalog's page in Chromium: search, sort, details, links, narrow, dark, and without scripts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium.browser import Browser, ChromiumUnavailable, run_chromium
from stores import draft

from raytune_ft.catalog import AdapterRecord, BaseModelRef, FileEntry
from raytune_ft.catalog.listing import Histories, History
from raytune_ft.catalog_page import CatalogPage, write_catalog_page

ATTACK = (
    "</script><script>console.log('ran')</script><img src=http://127.0.0.1:9/x onerror=console.log('ran')>"
)
NAMES = """[...document.querySelectorAll('#_adapters > tbody:not([hidden])')].map(body => body.id)"""
WIDTH, HEIGHT = 1200, 800
ENTER = ("\r", 13)


def history(name: str, scores: list[float | None], size_bytes: int, **changes: Any) -> History:
    """An adapter with a version for each score, the oldest first."""
    records = [
        AdapterRecord(
            **{
                **dict(draft(adapter=name)),
                "scores_before": None,
                "scores_after": None if score is None else {"exact_match": score},
                "version": version,
                "publish_id": f"{name}-{version}",
                "created_at": f"2026-01-0{version}T00:00:00Z",
                "files": (FileEntry(name="a.safetensors", sha256="a" * 64, size_bytes=size_bytes),),
                **changes,
            }
        )
        for version, score in enumerate(scores, start=1)
    ]
    return History(tuple(reversed(records)), len(records), {"production": 1})


HISTORIES = (
    history("capital", [0.2, 0.9], 2_000_000),
    history("german", [0.095], 900, base=BaseModelRef(path="s3://models/other", digest="e" * 64)),
    history("merged", [0.5], 10_000_000, merged_from=("capital@v1", "gone@v1")),
    history("unscored", [None], 30_000, base=BaseModelRef(path=ATTACK, digest=ATTACK), method={ATTACK: 1}),
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with run_chromium(tmp_path_factory.mktemp("chromium")) as browser:
            yield browser
    except ChromiumUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "catalog.html"
    found = Histories(HISTORIES, damaged=(ATTACK,), notes=())
    write_catalog_page(CatalogPage("s3://adapters", found, "2026-03-02T09:30:00Z", "raytune-ft"), path)
    return path.as_uri()


@pytest.fixture
def browser(chromium: Browser, uri: str) -> Iterator[Browser]:
    """The page, freshly opened; at the end nothing else was asked for and nothing was complained of."""
    chromium.requests.clear()
    chromium.complaints.clear()
    chromium.emulate(WIDTH, HEIGHT, scheme="light")
    chromium.open(uri)
    yield chromium
    chromium.allow_scripts(True)
    assert {request.partition("#")[0] for request in chromium.requests} == {uri}
    assert chromium.complaints == []


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({selector!r}).click()")


def search(browser: Browser, text: str) -> list[str]:
    browser.evaluate(
        "document.getElementById('_search').value = ''; document.getElementById('_search').focus()"
    )
    browser.type(text)
    return list(browser.evaluate(NAMES))


def test_hostile_texts_are_texts(browser: Browser) -> None:
    assert ATTACK in browser.evaluate("document.getElementById('unscored').textContent")
    assert browser.evaluate("document.images.length + document.scripts.length") == 1


def test_search(browser: Browser) -> None:
    assert search(browser, "GERM") == ["german"]
    assert browser.evaluate("document.getElementById('_count').textContent") == "1 of 4 adapters"
    assert search(browser, "models/other production") == ["german"]
    assert search(browser, "none such") == []


def test_sort(browser: Browser) -> None:
    def sort(column: int) -> list[str]:
        click(browser, f"#_adapters thead th:nth-child({column}) button")
        return list(browser.evaluate(NAMES))

    score, size, name = 5, 6, 1
    # 9.5 % is below 50.0 %, which a sort of texts denies; what has no score is last in both orders.
    assert sort(score) == ["capital", "merged", "german", "unscored"]
    assert sort(score) == ["german", "merged", "capital", "unscored"]
    sorts = "[...document.querySelectorAll('#_adapters > thead th')].map(cell => cell.ariaSort)"
    assert browser.evaluate(sorts)[4] == "ascending"
    assert browser.evaluate(sorts).count("none") == 6
    assert sort(size) == ["merged", "capital", "unscored", "german"]
    assert sort(name) == ["capital", "german", "merged", "unscored"]
    assert search(browser, "models/tiny") == ["capital", "merged"]


def test_details_open_by_the_keyboard(browser: Browser) -> None:
    shown = "document.getElementById('capital').rows[1].offsetHeight > 0"
    button = "document.querySelector('#capital button')"
    assert browser.evaluate(f"{button}.ariaExpanded") == "false"
    assert not browser.evaluate(shown)
    browser.evaluate(f"{button}.focus()")
    browser.press(*ENTER)
    assert browser.evaluate(f"{button}.ariaExpanded") == "true"
    assert browser.evaluate(shown)
    titles = "[...document.querySelectorAll('#capital circle')].map(point => point.textContent)"
    assert browser.evaluate(titles) == ["v1: 20.0 %", "v2: 90.0 %"]
    browser.press(*ENTER)
    assert not browser.evaluate(shown)


def test_a_link_opens_the_version_that_it_names(browser: Browser) -> None:
    assert search(browser, "merged") == ["merged"]
    browser.evaluate(
        "new Promise(done => { addEventListener('hashchange', () => setTimeout(done));"
        " document.querySelector('#merged a').click() })"
    )
    assert browser.evaluate("location.hash") == "#capital@v1"
    place = browser.evaluate("document.getElementById('capital@v1').getBoundingClientRect().toJSON()")
    assert 0 < place["top"] < HEIGHT
    assert place["height"] > 0


def test_a_page_opens_at_a_version(browser: Browser, uri: str) -> None:
    browser.open(f"{uri}#capital@v1")
    assert browser.evaluate("document.getElementById('capital@v1').offsetHeight") > 0


@pytest.mark.parametrize("width", [400, 700, 1200])
def test_nothing_is_wider_than_the_window(browser: Browser, width: int) -> None:
    browser.emulate(width, HEIGHT, scheme="light")
    click(browser, "#capital button")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    card = "document.querySelector('.all')"
    assert browser.evaluate(f"{card}.scrollWidth - {card}.clientWidth") <= 0


def test_it_is_as_dark_as_its_reader_likes(browser: Browser) -> None:
    colours = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    light = browser.evaluate(colours)
    browser.emulate(WIDTH, HEIGHT, scheme="dark")
    dark = browser.evaluate(colours)
    assert [sum(map(int, colour[4:-1].split(","))) > 384 for colour in (*light, *dark)] == [
        True,
        False,
        False,
        True,
    ]


def test_it_works_without_scripts(browser: Browser, uri: str) -> None:
    browser.allow_scripts(False)
    browser.open(uri)
    summary = "document.querySelector('#capital summary')"
    assert browser.evaluate("[document.querySelectorAll('button').length, location.hash]") == [1, ""]
    assert browser.evaluate("document.getElementById('_bar').offsetHeight") == 0
    assert browser.evaluate(f"{summary}.offsetHeight") > 0
    browser.evaluate(f"{summary}.click()")
    assert browser.evaluate("document.getElementById('capital@v1').offsetHeight") > 0


def test_many_rows_are_shown_by_and_by(chromium: Browser, tmp_path: Path) -> None:
    histories = tuple(history(f"adapter-{number:03}", [0.5], 900) for number in range(510))
    path = tmp_path / "many.html"
    found = Histories(histories, damaged=(), notes=())
    write_catalog_page(CatalogPage("s3://adapters", found, "2026-03-02T09:30:00Z", "raytune-ft"), path)
    chromium.open(path.as_uri())
    count = "document.getElementById('_count').textContent"
    assert (len(chromium.evaluate(NAMES)), chromium.evaluate(count)) == (
        500,
        "510 adapters, the first 500 shown",
    )
    chromium.open(f"{path.as_uri()}#adapter-509")
    assert chromium.evaluate("document.getElementById('adapter-509').offsetHeight") > 0
    assert search(chromium, "adapter-50") == [f"adapter-50{number}" for number in range(10)]
    search(chromium, " ")
    click(chromium, "#_all")
    assert len(chromium.evaluate(NAMES)) == 510
