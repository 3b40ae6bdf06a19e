"""The command line as a program: exit codes, what goes to which stream, and how light it starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import stores
import tiny
import yaml
from commands import Ended, Run

from raytune_ft.catalog import BaseModelRef, Catalog
from raytune_ft.cli import main
from raytune_ft.methods.lora import add_lora, save_lora
from raytune_ft.model_files import base_digest, tokenizer_digest
from raytune_ft.spec import JobSpec, LoraSpec, parse_job

COMMANDS = [
    (),
    ("train",),
    ("fleet",),
    ("data",),
    ("plan",),
    ("schema",),
    ("generate",),
    ("catalog",),
    ("catalog", "ls"),
    ("catalog", "show"),
    ("catalog", "pull"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def job_file(base: Path, tmp_path: Path) -> Path:
    """A job that could be run."""
    records = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    values = {
        "name": "plus-one",
        "model": {"path": str(base), "weight_bits": 32},
        "data": {"sources": [{"uri": str(tmp_path / "data.jsonl")}], "max_tokens": 64},
        "publish": {"catalog": str(tmp_path / "catalog")},
    }
    path = tmp_path / "plus-one.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def catalog(base: Path, job_file: Path, tmp_path: Path) -> str:
    """A catalog with one adapter of `base`, as an untrained job would publish it; its uri."""
    job = parse_job(yaml.safe_load(job_file.read_text()))
    model = tiny.llama()
    add_lora(model, LoraSpec(), seed=0)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_lora(model, LoraSpec(), folder, str(base))
    draft = stores.draft(
        adapter="plus-one",
        base=BaseModelRef(path=str(base), digest=base_digest(base), tokenizer_digest=tokenizer_digest(base)),
        job=job.resolved(),
        data={"templates": ["plain"]},
    )
    files = {file.name: file for file in folder.iterdir()}
    Catalog.at(job.publish.catalog).publish(draft, files, publish_id="test")
    return job.publish.catalog


class TestBadInput:
    """Exit code 2, one message on standard error, and nothing on standard output."""

    @pytest.mark.parametrize("command", ["train", "data"])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{folder}/none.yaml"], "{folder}/none.yaml: no such file"),
            (["{folder}"], "{folder}: is a folder; name a job file"),
            (
                ["{job}", "--set", "method.ranks=8"],
                "{job} has 1 problem:\n  method.ranks: no such field; did you mean method.rank?",
            ),
            (
                ["{job}", "--set", "method.rank=x", "--set", "model.weight_bits=5"],
                "{job} has 2 problems:\n  model.weight_bits = 5: must be 4, 8, 16 or 32\n"
                "  method.rank = 'x': must be a valid integer, unable to parse string as an integer",
            ),
            (
                ["{job}", "--set", "method.rank"],
                "--set method.rank: write key=value, such as --set method.rank=8",
            ),
            (["{job}", "--set", "name.x=1"], "--set name.x=1: name is 'plus-one', not a section"),
        ],
    )
    def test_of_a_job_file(
        self, run: Run, job_file: Path, command: str, arguments: list[str], message: str
    ) -> None:
        names = {"job": job_file, "folder": job_file.parent}
        ended = run(command, *(argument.format(**names) for argument in arguments))
        assert ended == Ended(2, "", f"raytune-ft: {message.format(**names)}\n")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.path={folder}/none", "model.path = {folder}/none: no such folder, and not a Hub id"),
            (
                "model.path={folder}",
                "model.path = {folder}: no config.json; name the folder that holds the model's files",
            ),
            (
                "data.sources.0.uri={folder}/none.jsonl",
                "data.sources[0].uri = {folder}/none.jsonl: no such file, and no folder or glob with files",
            ),
        ],
    )
    @pytest.mark.parametrize("command", ["train", "data"])
    def test_found_before_any_work(
        self, run: Run, job_file: Path, tmp_path: Path, command: str, override: str, message: str
    ) -> None:
        output = ["--output", tmp_path / "out"] if command == "train" else []
        ended = run(command, job_file, "--json", "--set", override.format(folder=tmp_path), *output)
        assert (ended.code, ended.out) == (2, "")
        # What the job does goes to standard error, since standard output is a program's to read.
        *progress, last = ended.err.splitlines()
        assert last == f"raytune-ft: {message.format(folder=tmp_path)}"
        assert len(progress) == (1 if command == "train" else 0)
        assert not (tmp_path / "out").exists()

    def test_max_tokens_above_the_positions(self, run: Run, base: Path, job_file: Path) -> None:
        ended = run("train", job_file, "--set", "data.max_tokens=512")
        message = (
            f"data.max_tokens = 512 is above the 256 positions of {base}; set data.max_tokens: 256 or less"
        )
        assert (ended.code, ended.err) == (2, f"raytune-ft: {message}\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["catalog", "show", "nope"], "{catalog}: no adapter nope; it holds plus-one"),
            (["catalog", "pull", "nope@v1"], "{catalog}: no adapter nope; it holds plus-one"),
            (["generate", "1 + 1 = ", "--adapter", "nope"], "{catalog}: no adapter nope; it holds plus-one"),
            (
                ["generate", "1 + 1 = ", "--adapter", "plus-one@v7"],
                "{catalog}: plus-one has no version v7; it has v1",
            ),
            (
                ["generate", "1 + 1 = ", "--adapter", "plus-one@best"],
                "{catalog}: plus-one has no alias best; it has none",
            ),
        ],
    )
    def test_what_the_catalog_does_not_hold(
        self, run: Run, catalog: str, arguments: list[str], message: str
    ) -> None:
        ended = run(*arguments, "--catalog", catalog)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err == f"raytune-ft: {message.format(catalog=catalog)}\n"

    def test_a_base_that_was_replaced(self, run: Run, catalog: str, base: Path) -> None:
        (kept := base / "config.json").rename(base / "kept")
        kept.write_text((base / "kept").read_text().replace("1e-06", "1e-05"))
        ended = run("generate", "1 + 1 = ", "--adapter", "plus-one", "--catalog", catalog)
        (base / "kept").rename(kept)
        message = (
            f"plus-one@v1 was trained on another base than {base} holds now; "
            "put that base back, or train again"
        )
        assert ended == Ended(2, "", f"raytune-ft: {message}\n")

    def test_a_tokenizer_that_was_replaced(self, run: Run, catalog: str, base: Path) -> None:
        then, template = tokenizer_digest(base), base / "chat_template.jinja"
        template.write_text("{{ messages }}")
        now = tokenizer_digest(base)
        ended = run("generate", "1 + 1 = ", "--adapter", "plus-one", "--catalog", catalog)
        template.unlink()
        message = (
            f"plus-one@v1 was trained with another tokenizer than {base} holds now (digest {then[:12]}…, "
            f"found {now[:12]}…); put the tokenizer and chat template of then back, or train again"
        )
        assert ended == Ended(2, "", f"raytune-ft: {message}\n")

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["bogus"], "'bogus'"),
            (["catalog", "bogus"], "'bogus'"),
            (["train"], "'JOB.yaml'"),
            (["train", "a.yaml", "b.yaml"], "b.yaml"),
            (["train", "a.yaml", "--nope"], "--nope"),
            (["catalog", "ls"], "'--catalog' (env var: 'RAYTUNE_CATALOG')"),
            (["catalog", "show", "--catalog", "x"], "'NAME[@ALIAS|@vN]'"),
            (["generate", "hello", "--catalog", "x"], "'--adapter'"),
            (
                ["generate", "hello", "--catalog", "x", "--adapter", "y", "--max-new-tokens", "0"],
                "'--max-new-tokens'",
            ),
        ],
    )
    def test_usage(self, run: Run, arguments: list[str], named: str) -> None:
        ended = run(*arguments)
        assert (ended.code, ended.out) == (2, "")
        (line,) = ended.err.splitlines()
        assert line.startswith("raytune-ft: ")
        assert line.endswith(" See raytune-ft --help.")
        assert named in line

    def test_a_name_that_no_alias_can_have(self, run: Run, catalog: str) -> None:
        for alias in ("v3", "No Such"):
            ended = run("catalog", "ls", "--catalog", catalog, "--alias", alias)
            assert (ended.code, ended.out) == (2, "")

    def test_a_record_cannot_command_the_terminal_through_a_message(self, run: Run, catalog: str) -> None:
        path = Path(Catalog.at(catalog).resolve("plus-one").uri(catalog))
        said = json.loads(path.read_text())
        path.write_text(json.dumps({**said, "evil\x1b[2J\x1b]0;owned\x07\nraytune-ft: all is well": 1}))
        ended = run("catalog", "show", "plus-one", "--catalog", catalog)
        assert (ended.code, ended.out) == (2, "")
        (line,) = ended.err.splitlines()
        assert "not a record of this catalog: 'evil" in line
        assert line.isprintable()

    def test_an_answer_cannot_command_the_terminal(
        self, run: Run, catalog: str, base: Path, tmp_path: Path
    ) -> None:
        # A folder of its own: a tokenizer that was loaded before may be kept.
        other = shutil.copytree(base, tmp_path / "other")
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        attack = "\x1b]0;owned\x07\u202e\tone\ntwo"
        replaced = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": attack}
        tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], replaced]}
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        record = Path(Catalog.at(catalog).resolve("plus-one").uri(catalog))
        said = json.loads(record.read_text().replace(str(base), str(other)))
        said["base"]["tokenizer_digest"] = tokenizer_digest(other)
        record.write_text(json.dumps(said))
        asked = ("generate", "hello", "--adapter", "plus-one", "--catalog", catalog)
        shown, as_json = run(*asked), run(*asked, "--json")
        assert shown.code == 0, shown.err
        assert "\\x1b]0;owned\\x07\\u202e\tone\ntwo" in shown.out
        assert not set("\x1b\x07\u202e") & set(shown.out)
        assert attack in json.loads(as_json.out)["answer"]
        assert as_json.out.strip().isprintable()

    @pytest.mark.parametrize("name", ["size_bytes", "steps", "seed", "version", "merged_from"])
    def test_numbers_without_end(self, run: Run, catalog: str, name: str) -> None:
        path = Path(Catalog.at(catalog).resolve("plus-one").uri(catalog))
        said = json.loads(path.read_text())
        (said["files"][0] if name == "size_bytes" else said)[name] = (
            ["a@v1"] * 1001 if name == "merged_from" else 10**400
        )
        path.write_text(json.dumps(said))
        ended = run("catalog", "show", "plus-one", "--catalog", catalog)
        assert (ended.code, ended.out) == (2, "")
        assert "not a record of this catalog: " in ended.err
        assert name in ended.err

    def test_data_without_a_job_file(self, run: Run) -> None:
        message = "raytune-ft: raytune-ft data: name a job file, or ask for --templates\n"
        assert run("data") == Ended(2, "", message)


class TestStorageTrouble:
    """Exit code 4."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ["catalog", "ls"],
            ["catalog", "show", "plus-one"],
            ["catalog", "pull", "plus-one"],
            ["generate", "1 + 1 = ", "--adapter", "plus-one"],
        ],
        ids=" ".join,
    )
    def test_a_catalog_that_cannot_be_read(self, run: Run, tmp_path: Path, arguments: list[str]) -> None:
        (tmp_path / "file").touch()
        ended = run(*arguments, "--catalog", tmp_path / "file")
        assert (ended.code, ended.out) == (4, "")
        (line,) = ended.err.splitlines()
        assert line.startswith(f"raytune-ft: {tmp_path / 'file'}")

    def test_a_catalog_that_cannot_be_written(self, run: Run, job_file: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        ended = run("train", job_file, "--set", f"publish.catalog={tmp_path / 'file'}")
        assert ended.code == 4
        (line,) = ended.err.splitlines()
        assert line.startswith(f"raytune-ft: {tmp_path / 'file'}")

    def test_of_the_machine(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        folder = tmp_path / "gone"
        folder.mkdir()
        monkeypatch.chdir(folder)
        folder.rmdir()
        assert run("catalog", "ls", "--catalog", "catalog") == Ended(
            4, "", "raytune-ft: no such file or directory; check the file, the disk or the network\n"
        )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["catalog", "ls", "--catalog", "x"], "interrupted"),
        (["train", "x.yaml"], "interrupted; the same command goes on from the last checkpoint"),
        (
            ["fleet", "x.yaml"],
            "interrupted; the same command goes on, and trains nothing again that is done",
        ),
    ],
)
def test_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["raytune_ft.cli.main"], "read_job", interrupt)
    monkeypatch.setattr(sys.modules["raytune_ft.cli.main"], "read_fleet", interrupt)
    monkeypatch.setattr("raytune_ft.cli.catalog.look.open_catalog", interrupt)
    monkeypatch.setattr(sys, "argv", ["raytune-ft", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, f"raytune-ft: {said}\n")


class TestDone:
    """Exit code 0, and nothing on standard error."""

    def test_schema(self, run: Run, job_file: Path) -> None:
        ended = run("schema")
        assert (ended.code, ended.err) == (0, "")
        schema = json.loads(ended.out)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema == JobSpec.model_json_schema()
        jsonschema.validate(yaml.safe_load(job_file.read_text()), schema)

    @pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "raytune-ft")
    def test_help(self, run: Run, command: tuple[str, ...]) -> None:
        ended = run(*command, "--help")
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith(("Usage: raytune-ft", "\n Usage: raytune-ft"))
        if not command:
            assert {found[0] for found in COMMANDS if found} <= set(ended.out.split())

    @pytest.mark.parametrize(
        ("arguments", "keys"),
        [
            (["data", "{job}"], {"counts", "bad", "examples"}),
            (["catalog", "show", "plus-one", "--catalog", "{catalog}"], {"adapter", "version", "files"}),
            (
                ["catalog", "pull", "plus-one", "--catalog", "{catalog}", "--to", "{folder}/to"],
                {"adapter", "version", "to"},
            ),
            (
                ["generate", "1 + 1 = ", "--adapter", "plus-one", "--catalog", "{catalog}"],
                {"adapter", "prompt", "answer"},
            ),
        ],
    )
    def test_json_is_one_line(
        self, run: Run, job_file: Path, catalog: str, arguments: list[str], keys: set[str]
    ) -> None:
        names = {"job": job_file, "catalog": catalog, "folder": job_file.parent}
        ended = run(*(argument.format(**names) for argument in arguments), "--json")
        assert (ended.code, ended.err) == (0, "")
        (line,) = ended.out.splitlines()
        assert keys <= set(json.loads(line))

    def test_a_list_of_adapters_is_one_line(self, run: Run, catalog: str) -> None:
        (line,) = run("catalog", "ls", "--catalog", catalog, "--json").out.splitlines()
        assert [entry["adapter"] for entry in json.loads(line)] == ["plus-one"]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`raytune-ft` in a process of its own, as it is installed."""
    return python(str(Path(sys.executable).with_name("raytune-ft")), *map(str, arguments))


def test_start_up_loads_nothing_heavy() -> None:
    """A cluster's head, an editor's schema and an orchestrator's task must not wait for torch."""
    loaded = python("-c", "import raytune_ft.cli.main, sys; print(*sys.modules)").stdout.split()
    assert "raytune_ft.spec" in loaded
    assert not {"torch", "ray", "transformers", "boto3", "pyarrow", "jinja2"} & set(loaded)


def test_the_installed_program_answers(catalog: str) -> None:
    """Whole process: whatever a library prints while it is imported would stand here too."""
    ended = program("generate", "1 + 1 = ", "--adapter", "plus-one", "--catalog", catalog, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(ended.stdout)
    assert ended.stdout.count("\n") == 1
    assert answer["prompt"] == "1 + 1 = "


def test_a_terminal_without_the_letters(catalog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Catalog.at(catalog)
    store.set_alias("plus-one", "production", 1)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("COLUMNS", "300")
    ended = program("catalog", "ls", "--catalog", catalog)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "production ? v1" in ended.stdout


def test_the_installed_program_refuses(tmp_path: Path) -> None:
    ended = program("train", tmp_path / "none.yaml")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"raytune-ft: {tmp_path / 'none.yaml'}: no such file\n"


def test_a_step_that_is_not_kept_cannot_be_published(run: Run, job_file: Path, tmp_path: Path) -> None:
    ended = run("train", job_file, "--json", "--publish-step", "3", "--output", tmp_path / "out")
    assert (ended.code, ended.out) == (2, "")
    assert f"raytune-ft: --publish-step 3: {tmp_path}/catalog/runs/plus-one/" in ended.err
    assert "keeps no checkpoint of that step; none is kept; train the job first, with the model" in ended.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "catalog" / "runs").exists()


def test_a_run_is_not_forgotten_where_a_step_of_it_is_to_be_published(run: Run, job_file: Path) -> None:
    ended = run("train", job_file, "--restart", "--publish-step", "3")
    message = "--restart forgets the checkpoints that --publish-step publishes from; give one of them"
    assert ended == Ended(2, "", f"raytune-ft: {message}\n")
