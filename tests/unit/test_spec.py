"""The job file: what it accepts, and exactly what it says about the rest."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytune_ft.errors import BadInput, SpecError
from raytune_ft.spec import FullSpec, JobSpec, LoraSpec, parse_job, read_job
from raytune_ft.spec.values import uri_mistake
from raytune_ft.storage import split_uri


def job(**changes: Any) -> dict[str, Any]:
    """The shortest job."""
    return {
        "name": "capital",
        "model": {"path": "base"},
        "data": {"sources": [{"uri": "data.jsonl"}]},
        "publish": {"catalog": "catalog"},
        **changes,
    }


def test_only_four_things_have_no_default() -> None:
    resolved = parse_job(job())
    assert resolved.method == LoraSpec()
    assert resolved.adapter_name == "capital"
    assert resolved.model.weight_bits == 4
    assert parse_job(resolved.resolved()) == resolved


def test_the_documented_shape(tmp_path: Path) -> None:
    text = """
name: country-capital
model: {path: s3://models/tiny-llama, weight_bits: 4}
data:
  sources:
    - {uri: s3://datasets/task1146_country_capital.json, template: instruction, weight: 1.0}
  split: {validation: 0.05, test: 0.1}
  max_tokens: 512
  packing: true
  seed: 0
method: {kind: lora, rank: 16, alpha: 32, dropout: 0.0, targets: all-linear}
optimizer: {kind: adamw, learning_rate: 2.0e-4, weight_decay: 0.0, max_grad_norm: 1.0}
schedule: {epochs: 1, warmup: 0.03, decay: cosine}
batch: {sequences: 32, sequences_per_worker: auto}
cluster: {workers: 1, device: auto}
checkpoint: {every_steps: 100, keep: 2}
evaluate: {metrics: [exact_match, rouge, bleu], max_examples: 200, max_new_tokens: auto}
publish: {catalog: s3://adapters, adapter: country-capital, alias: candidate}
"""
    path = tmp_path / "job.yaml"
    path.write_text(text)
    read = read_job(path)
    jsonschema.validate(yaml.safe_load(text), JobSpec.model_json_schema())
    defaults = parse_job(job(name="country-capital"))
    assert read.method == defaults.method
    assert read.optimizer == defaults.optimizer
    assert read.evaluate == defaults.evaluate


PROBLEMS = [
    (["method.ranks=8"], "  method.ranks: no such field; did you mean method.rank?"),
    (["rank=8"], "  rank: no such field; did you mean method.rank?"),
    (["data.sources.0.urii=x"], "  data.sources[0].urii: no such field; did you mean data.sources[0].uri?"),
    (["model.weight_bits=5"], "  model.weight_bits = 5: must be 4, 8, 16 or 32"),
    (["method.rank=-1"], "  method.rank = -1: must be greater than 0"),
    (["optimizer.learning_rate=.inf"], "  optimizer.learning_rate = inf: must be a finite number"),
    (["optimizer.weight_decay=.nan"], "  optimizer.weight_decay = nan: must be a finite number"),
    (
        ["cluster.workers=40"],
        "  cluster.workers = 40 has more workers than a step has examples, batch.sequences = 32; use 32 "
        "workers or fewer",
    ),
    (
        ["cluster.elastic=[2, 40]"],
        "  cluster.elastic = [2, 40] has more workers than a step has examples, batch.sequences = 32; use 32 "
        "workers or fewer",
    ),
    (["method.kind=loraa"], "  method.kind = 'loraa': must be one of 'lora', 'full'"),
    (
        ["method.kind=full", "method.rank=3"],
        "  method.rank: no such field; the fields here are kind, train_only, unfreeze",
    ),
    (["method=3"], "  method = 3: must be a mapping, such as {kind: …}"),
    (
        ["batch.sequences=many"],
        "  batch.sequences = 'many': must be a valid integer, unable to parse string as an integer",
    ),
    (["batch=3"], "  batch = 3: must be a mapping, such as {sequences: …}"),
    (["data.sources=[]"], "  data.sources = []: must have at least 1 element"),
    (
        ["data.split.validation=0.95"],
        "  data.split: validation + test = 1.05 leaves no training data; the limit is 1",
    ),
    (["schedule.steps=3", "schedule.epochs=1"], "  schedule: give epochs or steps, not both"),
    (
        ["batch.sequences_per_worker=12"],
        "  batch.sequences = 32 is not a multiple of cluster.workers × batch.sequences_per_worker = 12; "
        "try 36",
    ),
    (
        ["method.kind=full"],
        "  method.kind = full trains every weight, and model.weight_bits = 4 holds them frozen; "
        "use 16 or 32, or method.kind = lora",
    ),
    (
        ["publish.catalog=gs://x"],
        "  publish.catalog: scheme 'gs' is not supported; use a folder, file:// or s3://",
    ),
    (
        ["publish.catalog=hdfs:/x"],
        "  publish.catalog: scheme 'hdfs' is not supported; use a folder, file:// or s3://",
    ),
    (
        ["publish.catalog=s3:/adapters"],
        "  publish.catalog: 's3:/adapters' is no uri; did you mean s3://adapters? "
        "The folder of that name is ./s3:/adapters",
    ),
    (["data.sources.0.uri=S3://b/x"], "  data.sources[0].uri: 'S3://b/x' is no uri; did you mean s3://b/x?"),
    (
        ["data.sources.0.uri=hf:/a/b"],
        "  data.sources[0].uri: 'hf:/a/b' is no uri; did you mean hf://a/b? "
        "The folder of that name is ./hf:/a/b",
    ),
    (
        ["model.path=file:/models/base"],
        "  model.path: 'file:/models/base' is no uri; did you mean file:///models/base? "
        "The folder of that name is ./file:/models/base",
    ),
    (["publish.catalog=s3://${NOT_SET}"], "  publish.catalog: environment variable NOT_SET is not set"),
    (
        ["name=A B"],
        "  name = 'A B': must be 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter or digit",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), PROBLEMS, ids=[p[0][0] for p in PROBLEMS])
def test_a_problem_says_place_value_limit_and_remedy(overrides: list[str], line: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(job(), overrides, place="jobs/x.yaml")
    assert str(caught.value) == f"jobs/x.yaml has 1 problem:\n{line}"
    assert caught.value.exit_code == 2


def test_all_problems_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(job(modle=1), ["model.weight_bits=5", "method.rank=0"], place="x")
    assert str(caught.value).startswith("x has 3 problems:\n")


def test_a_secret_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(job(), ["model.path=s3://AKIA:hunter2@bucket/x"])
    assert "holds credentials" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_secret_in_a_mistyped_uri_is_not_repeated() -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(job(), ["model.path=s3:/AKIA:hunter2@bucket/x"])
    assert str(caught.value).endswith("model.path: 's3:…' is no uri; did you mean s3://…?")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("s3:x", "s3://x"),
        ("s3//x/y", "s3://x/y"),
        ("s3:///x", "s3://x"),
        (" s3://x", "s3://x"),
        ("S3:/x", "s3://x"),
        ("s3a://x", "s3://x"),
        ("s3:\\\\x\\y", "s3://x/y"),
        ("file:/x", "file:///x"),
        ("FILE:///x", "file:///x"),
        ("file//x", "file:///x"),
        ("HF://a/b", "hf://a/b"),
    ],
)
def test_a_mistyped_uri_is_told_what_it_likely_means(text: str, meant: str) -> None:
    mistake = uri_mistake(text)
    assert mistake is not None
    assert f"is no uri; did you mean {meant}?" in mistake
    with pytest.raises(BadInput, match="did you mean"):
        split_uri(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://x",
        "file:///x",
        "file://x",
        "hf://a/b",
        "s3",
        "s3/x",
        "./s3:/x",
        "/a/s3:/x",
        "C:/x",
        "a:/b",
        "s3x:y",
    ],
)
def test_a_uri_and_a_path_are_no_mistakes(text: str) -> None:
    assert uri_mistake(text) is None


def test_a_relative_path_is_told_with_the_place_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        read_job("jobs/x.yaml")
    assert str(caught.value) == f"jobs/x.yaml: no such file (looked for {tmp_path}/jobs/x.yaml)"


def test_environment_variables_in_uris_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "b")
    values = job(publish={"catalog": "s3://${BUCKET}/catalog"})
    values["data"]["sources"][0] |= {"uri": "s3://${BUCKET}/d.jsonl", "template": "{{ prompt }} ${BUCKET}"}
    read = parse_job(values)
    assert read.publish.catalog == "s3://b/catalog"
    assert read.data.sources[0].uri == "s3://b/d.jsonl"
    assert read.data.sources[0].template == "{{ prompt }} ${BUCKET}"


def test_a_folder_is_the_same_from_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    read = parse_job(job())
    assert read.model.path == str(tmp_path / "base")
    assert read.data.sources[0].uri == str(tmp_path / "data.jsonl")
    assert read.publish.catalog == str(tmp_path / "catalog")
    assert parse_job(job(model={"path": "org/hub-id"})).model.path == "org/hub-id"


def test_overrides_reach_lists_and_absent_sections() -> None:
    read = parse_job(
        job(), ["data.sources.0.weight=2", "schedule.steps=7", "method={kind: full}", "model.weight_bits=32"]
    )
    assert read.data.sources[0].weight == 2
    assert read.schedule.steps == 7
    assert read.method == FullSpec()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank", "--set method.rank: write key=value, such as --set method.rank=8"),
        (
            "data.sources.3.uri=x",
            "--set data.sources.3.uri=x: '3' is not a place of the list, which has 0 to 0",
        ),
        ("name.x=1", "--set name.x=1: name is 'capital', not a section"),
    ],
)
def test_a_wrong_override(override: str, message: str) -> None:
    with pytest.raises(SpecError, match="^" + __import__("re").escape(message) + "$"):
        parse_job(job(), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "{path}: no such file"),
        (b"name: [", "{path}, line 1, column 8: not YAML: "),
        (
            b"- 1\n",
            "{path}: a job file is a mapping with name, model, data and publish, and this one is a list",
        ),
        (b"", "{path}: a job file is a mapping with name, model, data and publish, and this one is empty"),
        (b"name: \xff", "{path}: not UTF-8 at byte 6; save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_job(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        read_job(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_the_schema_is_json_schema_and_refuses_a_typo() -> None:
    schema = json.loads(json.dumps(JobSpec.model_json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job(), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job(method={"ranks": 3}), schema)
