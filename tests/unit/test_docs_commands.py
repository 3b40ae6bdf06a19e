"""The documents' commands exist, and those that can be run do what the pages show.

The convention is in CONTRIBUTING.md. In the workspace of these tests a bucket is a folder: `s3://name/` in a
command, a job file or a snippet stands for `s3/name/` there.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stores
import tiny
from pages import BLOCKS, PYPROJECT, ROOT, Block, make_targets, written_in
from typer.core import TyperGroup
from typer.main import get_command

from raytune_ft.catalog import BaseModelRef, Catalog
from raytune_ft.cli.main import app, main
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.model_files import base_digest
from raytune_ft.spec import JobSpec, read_job
from raytune_ft.train.publish import write_beside_weights

SAFE = {("schema",), ("data",), ("generate",), ("catalog", "ls"), ("catalog", "show"), ("catalog", "pull")}
"""Commands that are run wherever they stand; others only where their output is shown."""
WORKING_SNIPPETS = "docs/catalog.md"
"""The page whose Python is run, after its commands."""


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
    write_beside_weights(job, files, model, tiny.tokenizer(), [])
    (files / "README.md").write_text("# country-capital\n")
    (files / "job.json").write_text(json.dumps(job.resolved()))
    draft = stores.draft(
        adapter=job.adapter_name,
        base=BaseModelRef(path=job.model.path, digest=base_digest(Path(job.model.path))),
        method=job.method.model_dump(mode="json"),
        job=job.resolved(),
        data={"fingerprint": "f" * 64, "templates": ["instruction"]},
        scored_examples={"exact_match": 40},
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


def check_script(arguments: list[str]) -> None:
    source = (ROOT / arguments[0]).read_text(encoding="utf-8")
    assert "if __name__" in source
    for option in arguments[1:]:
        assert not option.startswith("-") or f'"{option}"' in source


def check_nothing(arguments: list[str]) -> None:
    """Commands of others, with what they are given."""
    assert arguments is not None


CHECKS = {
    "raytune-ft": check_raytune_ft,
    "make": check_make,
    "pip": check_pip,
    ".venv/bin/pytest": check_pytest,
    ".venv/bin/python": check_script,
    "tensorboard": lambda arguments: check_installed("tensorboard", arguments),
    "export": check_nothing,
    "openssl": check_nothing,
}


def check_installed(program: str, arguments: list[str]) -> None:
    assert (Path(sys.executable).parent / program).exists()
    assert arguments[0] == "--logdir"
