"""The documents say what is so: their examples parse, their tables, trees and messages are the code's."""

import ast
import json
import re
import stat
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pages import PAGES, PYPROJECT, ROOT, Block, make_targets, section, written_in
from pydantic import BaseModel

from raytune_ft import errors
from raytune_ft.cli.main import INTERRUPTED
from raytune_ft.spec import FleetSpec, JobSpec, parse_fleet, parse_job, read_job
from raytune_ft.train.engine import Engine


class TestSnippets:
    @pytest.mark.parametrize("block", written_in("yaml"), ids=str)
    def test_yaml_is_a_job_or_a_fleet(self, block: Block) -> None:
        values = yaml.safe_load(block.text)
        if {"jobs", "for_each"} & values.keys():
            parse_fleet(values, place=str(block))
            return
        least = {
            "name": "least",
            "model": {"path": "base"},
            "data": {"sources": [{"uri": "data.jsonl"}]},
            "publish": {"catalog": "catalog"},
        }
        parse_job({**least, **values}, place=str(block))

    @pytest.mark.parametrize("block", written_in("json"), ids=str)
    def test_json_is_json(self, block: Block) -> None:
        assert isinstance(json.loads(block.text), dict)

    @pytest.mark.parametrize("block", written_in("python"), ids=str)
    def test_python_compiles(self, block: Block) -> None:
        compile(block.text, str(block), "exec")


class TestNames:
    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_links_and_pictures_exist(self, page: Path) -> None:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target.partition("#")[0]).exists(), target

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_make_targets_exist(self, page: Path) -> None:
        for targets in re.findall(r"`make ([a-z ]+)`", page.read_text(encoding="utf-8")):
            assert set(targets.split()) <= make_targets()

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_code_that_is_named_exists(self, page: Path) -> None:
        for path in re.findall(
            r"`((?:raytune_ft|tests|jobs|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), path

    @pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
    def test_nothing_is_left_to_do(self, page: Path) -> None:
        assert not re.search(r"\b(TODO|FIXME|TBD|XXX)\b", page.read_text(encoding="utf-8"))

    def test_pictures_are_small(self) -> None:
        pictures = [*(ROOT / "docs" / "images").glob("*.png"), *(ROOT / "docs" / "images").glob("*.svg")]
        assert {picture.name for picture in pictures} == {"train.svg", "report.png", "catalog.png"}
        assert all(picture.stat().st_size < 200_000 for picture in pictures)


class TestReadme:
    TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

    def test_names_the_test_command_that_ci_runs(self) -> None:
        (command,) = re.findall(r"^\$ (make .*)$", section("README.md", "Tests"), flags=re.MULTILINE)
        ci = ROOT / ".ci" / "run"
        assert f"exec {command}\n" in ci.read_text()
        assert ci.stat().st_mode & stat.S_IXUSR

    def test_names_every_extra(self) -> None:
        install = section("README.md", "Install")
        for extra in PYPROJECT["project"]["optional-dependencies"]:
            assert f"`{extra}`" in install

    def test_the_short_tree_is_there(self) -> None:
        (tree,) = re.findall(r"```text\n(.*?)```", section("README.md", "Where things are"), flags=re.DOTALL)
        for path in tree_paths(tree):
            assert (ROOT / path).exists(), path

    def test_shows_the_job_that_comes_with_it(self) -> None:
        shown, *_ = [block for block in written_in("yaml") if block.page == "README.md"]
        shipped = read_job(ROOT / "jobs" / "country-capital.yaml")
        assert parse_job(yaml.safe_load(shown.text)) == shipped

    @pytest.mark.parametrize("page", ["README.md", "docs/errors.md"])
    def test_lists_every_exit_code(self, page: str) -> None:
        codes = {
            int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / page).read_text(), flags=re.MULTILINE)
        }
        raised = {
            kind.exit_code
            for kind in vars(errors).values()
            if isinstance(kind, type) and hasattr(kind, "exit_code")
        }
        assert codes == raised | {0, INTERRUPTED}


def tree_paths(tree: str) -> list[str]:
    """Paths of an indented tree, in which every line has a description; folders end with '/'."""
    paths: list[str] = []
    above: list[str] = []
    for line in tree.splitlines():
        indent, name, description = re.fullmatch(r"((?:  )*)(\S+)\s{2,}(\S.*)", line).groups()  # type: ignore[union-attr]  # a line that does not match shall fail
        assert description
        above = [*above[: len(indent) // 2], name]
        paths.append("".join(above))
    return paths


class TestArchitecture:
    def test_the_tree_is_the_repositorys(self) -> None:
        (tree,) = re.findall(r"```text\n(.*?)```", section("ARCHITECTURE.md", "Files"), flags=re.DOTALL)
        named = {f"{path}__init__.py" if path.endswith("/") else path for path in tree_paths(tree)}
        assert named == {str(file.relative_to(ROOT)) for file in (ROOT / "raytune_ft").rglob("*.py")}

    def test_the_layers_are_those_that_are_enforced(self) -> None:
        (layers,) = re.findall(r"```text\n(.*?)```", section("ARCHITECTURE.md", "Layers"), flags=re.DOTALL)
        (enforced,) = [c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
        assert layers.splitlines() == enforced["layers"]

    def test_the_engine_is_the_protocol(self) -> None:
        (shown,) = [block for block in written_in("python") if block.page == "ARCHITECTURE.md"]
        source = (ROOT / "raytune_ft" / "train" / "engine.py").read_text()
        assert signatures(shown.text, Engine.__name__) == signatures(source, Engine.__name__)


def signatures(source: str, name: str) -> dict[str, str]:
    (found,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    return {
        method.name: f"({ast.unparse(method.args)}) -> {ast.unparse(method.returns or ast.Constant(None))}"
        for method in found.body
        if isinstance(method, ast.FunctionDef)
    }


class TestJobFile:
    @pytest.mark.parametrize(("page", "spec"), [("job-file.md", JobSpec), ("fleet-file.md", FleetSpec)])
    def test_every_field_stands_there_with_its_default(self, page: str, spec: type[BaseModel]) -> None:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        rows = re.findall(r"^\| `([\w.\[\]]+)` \| (\S.*?) \| \S.* \|$", text, flags=re.MULTILINE)
        assert len(rows) == len(dict(rows))
        assert dict(rows) == dict(fields_of(spec))


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every leaf of a section, and its default as the page writes it; of alternatives the first wins."""
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = list(sections_in(field.annotation))
        is_list = get_origin(field.annotation) is tuple
        if not inner or is_list:
            found[prefix + name] = "required" if field.is_required() else f"`{as_written(field.default)}`"
        for one in inner:
            found = fields_of(one, f"{prefix}{name}{'[]' if is_list else ''}.") | found
    return found


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, tuple) or hasattr(annotation, "__metadata__"):
        for argument in get_args(annotation):
            yield from sections_in(argument)


def as_written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_written, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


class TestErrors:
    def test_every_message_is_in_the_source(self) -> None:
        text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
        messages = re.findall(r"^\| `(.+?)` \| .*\|$", text, flags=re.MULTILINE)
        assert len(messages) > 40
        sources = list(source_texts())
        assert not [message for message in messages if not any(says(text, message) for text in sources)]


def says(text: str, message: str) -> bool:
    """Whether the parts of a message, around each "…", follow each other in a text."""
    at = 0
    for part in message.split("…"):
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def source_texts() -> Iterator[str]:
    """Every text of the package; what is filled in stands as a NUL."""
    for file in (ROOT / "raytune_ft").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_changelog_is_kept() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{PYPROJECT['project']['version']}]" in text


def test_pages_are_found() -> None:
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {
        page.name for page in PAGES
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme
