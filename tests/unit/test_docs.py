"""The documents say what is so: their commands run, their examples parse, their tables are complete.

The convention is in CONTRIBUTING.md. In the workspace of these tests a bucket is a folder: `s3://name/` in a
command, a job file or a snippet stands for `s3/name/` there.
"""

import ast
import json
import re
import shlex
import stat
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import stores
import tiny
import yaml
from pydantic import BaseModel
from typer.core import TyperGroup
from typer.main import get_command

from raytune_ft import errors
from raytune_ft.catalog import BaseModelRef, Catalog
from raytune_ft.cli.main import INTERRUPTED, app, main
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.models import base_digest
from raytune_ft.spec import JobSpec, parse_job, read_job
from raytune_ft.train.engine import Engine

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SAFE = {("schema",), ("data",), ("generate",), ("catalog", "ls"), ("catalog", "show"), ("catalog", "pull")}
"""Commands that are run wherever they stand; others only where their output is shown."""
WORKING_SNIPPETS = "docs/catalog.md"
"""The page whose Python is run, after its commands."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(str(page.relative_to(ROOT)), line, found[1], found[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def written_in(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


@dataclass(frozen=True)
class Command:
    """A line after `$`, and what the page shows below it."""

    place: Block
    text: str
    shown: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """Without leading assignments."""
        words = shlex.split(self.text)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        return words


def commands_of(block: Block) -> Iterator[Command]:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        text, *shown = part.replace("\\\n", " ").splitlines()
        yield Command(block, text, tuple(line for line in shown if line.strip()))


COMMANDS = [command for block in written_in("console", "bash") for command in commands_of(block)]


def section(page: str, title: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.split(r"^## ", text.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


class TestCommands:
    def test_every_block_is_of_a_language_that_is_checked(self) -> None:
        assert {block.language for block in BLOCKS} <= {"console", "yaml", "json", "python", "text"}
        assert all(block.text.startswith("$ ") for block in written_in("console"))

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place}: {command.text[:40]}")
    def test_it_exists(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        # Pages may set it once for all commands that follow.
        monkeypatch.setenv("RAYTUNE_CATALOG", "s3://adapters")
        program, *arguments = command.words or ["export"]
        CHECKS[program](arguments)

    @pytest.mark.parametrize(
        "page", sorted({command.place.page for command in COMMANDS if command.words[:1] == ["raytune-ft"]})
    )
    def test_it_does_what_the_page_shows(
        self, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        workspace = build_workspace(tmp_path / "w")
        monkeypatch.chdir(workspace)
        monkeypatch.setenv("COLUMNS", "200")
        for command in [command for command in COMMANDS if command.place.page == page]:
            words = [local(word, workspace) for word in command.words]
            if words[0] == "export":
                monkeypatch.setenv(*words[1].split("=", 1))
            elif words[0] == "raytune-ft" and (command.shown or find_command(words[1:])[0] in SAFE):
                monkeypatch.setattr(sys, "argv", words)
                printed = run(capsys).replace(f"{workspace}/s3/", "s3://")
                check_shown(command, printed)
        if page == WORKING_SNIPPETS:
            for block in written_in("python"):
                if block.page == page:
                    exec(compile(local(block.text, workspace), str(block), "exec"), {})
            assert "country-capital@v1 {'exact_match': 0.75}" in capsys.readouterr().out


def run(capsys: pytest.CaptureFixture[str]) -> str:
    """Output of the command in `sys.argv`; it succeeds, or is one message."""
    capsys.readouterr()
    try:
        main()
    except SystemExit as ended:
        found = capsys.readouterr()
        if ended.code:
            assert found.out == ""
            assert found.err.startswith("raytune-ft: ")
            return found.err
        return found.out
    raise AssertionError("the command line always exits")


def check_shown(command: Command, printed: str) -> None:
    """The shown lines stand in the output in their order; `…` is anything, also a number of lines."""
    lines = iter([plain(line) for line in printed.splitlines()])
    for shown in command.shown:
        pattern = ".*".join(re.escape(part) for part in plain(shown).split("…"))
        assert any(re.fullmatch(pattern, line) for line in lines), (
            f"{command.place}: {command.text}: no line {shown!r} in\n{printed}"
        )


def plain(line: str) -> str:
    """A line without what depends on a width."""
    return " ".join(re.sub(r"[─━]+", "─", line).split())


def local(text: str, workspace: Path) -> str:
    return text.replace("s3://", f"{workspace}/s3/")


def build_workspace(folder: Path) -> Path:
    """What the pages speak of: a base, data, job files, and a catalog with an adapter."""
    tiny.save_base(folder / "s3" / "models" / "tiny-llama")
    (folder / "models").symlink_to(folder / "s3" / "models")
    (folder / "jobs").mkdir()
    for file in (ROOT / "jobs").glob("*.yaml"):
        (folder / "jobs" / file.name).write_text(local(file.read_text(), folder))
    (folder / "jobs" / "x.yaml").write_text(
        "{name: x, model: {path: a, weight_bits: 5}, data: {sources: [{uri: b}]}, method: {ranks: 8}, "
        "batch: {sequences: 0}, publish: {catalog: c}}"
    )
    capitals = [("Peru", "Lima"), *((f"Country {number}", f"City {number}") for number in range(40))]
    task = {
        "Definition": ["Name the capital of the country."],
        "Instances": [{"input": country, "output": [city]} for country, city in capitals],
    }
    (folder / "s3" / "datasets").mkdir()
    (folder / "s3" / "datasets" / "task1146_country_capital.json").write_text(json.dumps(task))
    publish(read_job(folder / "jobs" / "country-capital.yaml"), folder / "files")
    return folder


def publish(job: JobSpec, files: Path) -> None:
    """Publish an adapter of the job, as it is before the first step."""
    files.mkdir()
    model = tiny.llama()
    add_lora(model, job.method, seed=0)
    save_lora(model, job.method, files, job.model.path)  # type: ignore[arg-type]  # the job's method is LoRA
    (files / "README.md").write_text("# country-capital\n")
    (files / "job.json").write_text(json.dumps(job.resolved()))
    draft = stores.draft(
        adapter=job.adapter_name,
        base=BaseModelRef(path=job.model.path, digest=base_digest(Path(job.model.path))),
        method=job.method.model_dump(mode="json"),
        job=job.resolved(),
        data={"fingerprint": "f" * 64, "templates": ["instruction"]},
    )
    catalog = Catalog.at(job.publish.catalog)
    record = catalog.publish(draft, {file.name: file for file in files.iterdir()}, publish_id="docs")
    catalog.set_alias(record.adapter, "candidate", record.version)


def find_command(arguments: list[str]) -> tuple[tuple[str, ...], Any, list[str]]:
    """Path of a command of `raytune-ft`, the command, and its own arguments."""
    command: Any = get_command(app)
    path: tuple[str, ...] = ()
    rest = list(arguments)
    while isinstance(command, TyperGroup):
        path = (*path, rest.pop(0))
        command = command.commands[path[-1]]
    return path, command, rest


def check_raytune_ft(arguments: list[str]) -> None:
    """Parse, but do not run: an unknown option or a missing argument raises."""
    _, command, rest = find_command(arguments)
    command.make_context(command.name, rest)


def check_make(arguments: list[str]) -> None:
    assert arguments
    assert set(arguments) <= make_targets()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for extra in re.findall(r"\[(.*?)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])


def check_pytest(arguments: list[str]) -> None:
    markers = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "-m":
            assert set(re.findall(r"\w+", argument)) - {"not", "and", "or"} <= markers
        elif argument != "-m":
            assert (ROOT / argument).exists()


def check_nothing(arguments: list[str]) -> None:
    """Commands of others, with what they are given."""
    assert arguments is not None


CHECKS = {
    "raytune-ft": check_raytune_ft,
    "make": check_make,
    "pip": check_pip,
    ".venv/bin/pytest": check_pytest,
    "tensorboard": lambda arguments: check_installed("tensorboard", arguments),
    "export": check_nothing,
}


def check_installed(program: str, arguments: list[str]) -> None:
    assert (Path(sys.executable).parent / program).exists()
    assert arguments[0] == "--logdir"


class TestSnippets:
    @pytest.mark.parametrize("block", written_in("yaml"), ids=str)
    def test_yaml_is_a_job(self, block: Block) -> None:
        values = yaml.safe_load(block.text)
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
        assert {picture.name for picture in pictures} == {"train.svg", "report.png"}
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
        (shown,) = [block for block in written_in("yaml") if block.page == "README.md"]
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
    def test_every_field_stands_there_with_its_default(self) -> None:
        text = (ROOT / "docs" / "job-file.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| `([\w.\[\]]+)` \| (\S.*?) \| \S.* \|$", text, flags=re.MULTILINE)
        assert len(rows) == len(dict(rows))
        assert dict(rows) == dict(fields_of(JobSpec))


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
        patterns = {
            message: re.compile(".*".join(re.escape(part) for part in message.split("…")), flags=re.DOTALL)
            for message in messages
        }
        assert not [m for m, pattern in patterns.items() if not any(map(pattern.search, sources))]


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
