"""What the catalog knows of a version, and the readable card that goes with its files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from raytune_ft.catalog.layout import numbered, versions_prefix
from raytune_ft.errors import CatalogError
from raytune_ft.spec.values import NAME, VERSION, Name
from raytune_ft.storage import join_uri

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 16 << 20
MOST_SOURCES = 1000
"""Versions that one may be merged from."""
FILE_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILE_SUFFIXES = (".safetensors", ".json", ".md", ".txt", ".model", ".jinja")
"""None of these runs code when it is loaded; pickles (.bin, .pt, .pkl) do."""
PUBLISH_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PART_CHARACTERS = 60
_MOST_NOTICES = 100
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_REFERENCE = re.compile(f"{NAME.pattern}@{VERSION.pattern}")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)")


def _matching(pattern: re.Pattern[str], expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"must be {expected}")
        return text

    return AfterValidator(check)


def file_name_problem(name: str) -> str | None:
    """Why a file may not be part of a version, or None."""
    if not FILE_NAME.fullmatch(name):
        return "must be 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-', with at most one folder"
    if not name.endswith(FILE_SUFFIXES):
        return f"must end with {', '.join(FILE_SUFFIXES[:-1])} or {FILE_SUFFIXES[-1]}; pickles are not"
    return None


def publishable_files(folder: Path) -> dict[str, Path]:
    """The files in a folder that may be part of a version, by name.

    A model that came with code is published without it: a catalog holds nothing that runs.
    """
    written = (file for file in sorted(folder.rglob("*")) if file.name.endswith(FILE_SUFFIXES))
    return {file.relative_to(folder).as_posix(): file for file in written}


def _check_file_name(name: str) -> str:
    problem = file_name_problem(name)
    if problem is not None:
        raise ValueError(problem)
    return name


Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""JSON has numbers of any length; whatever a count goes through later has not."""
Sha256 = Annotated[str, _matching(_SHA256, "64 of 0-9 and a-f")]
UtcTime = Annotated[str, _matching(_TIME, "an ISO time in UTC")]


class Entry(BaseModel):
    """Base of all that the catalog keeps as JSON: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class FileEntry(Entry):
    """One file of a version."""

    name: Annotated[str, AfterValidator(_check_file_name)]
    sha256: Sha256
    size_bytes: Count


class BaseModelRef(Entry):
    """The base that was trained on."""

    path: str
    """As the job gave it: a folder, uri or Hub id."""
    digest: str
    """Of its weights, so that another base under the same name is told apart."""
    tokenizer_digest: Sha256 | None = None
    """Of its tokenizer's files and chat template; None where an older version wrote it."""

    @property
    def is_earlier(self) -> bool:
        """Whether a version wrote it whose `digest` covers weight files that are not read, too."""
        return self.tokenizer_digest is None


class Origin(Entry):
    """The version that another catalog published first, of which this one is a copy."""

    catalog: str
    """Its uri there."""
    reference: Annotated[str, _matching(_REFERENCE, "a reference such as summarise@v3")]
    created_at: UtcTime
    """When it was published there."""


class Signature(Entry):
    """Who vouches for a record; see `signing`."""

    public_key: Annotated[str, _matching(_SHA256, "an ed25519 public key: 64 of 0-9 and a-f")]
    value: Annotated[str, _matching(_SIGNATURE, "an ed25519 signature: 128 of 0-9 and a-f")]


class BestStep(Entry):
    """Why a checkpoint was published: no other had a better value."""

    metric: str
    """Measured on the validation split: `validation_loss`, or a score."""
    value: FiniteFloat
    step: Count


class StoppedEarly(Entry):
    """Why training ended before its last step."""

    step: Count
    """Steps done by then."""
    metric: str
    patience: Count
    """Validations in a row that were no better than `best_value`."""
    best_value: FiniteFloat
    best_step: Count


class RecordDraft(Entry):
    """Where a trained adapter or model came from: all that is known before it is published."""

    adapter: Name
    kind: Literal["adapter", "model"] = "adapter"
    base: BaseModelRef
    method: dict[str, Any]
    """The job's `method`, resolved."""
    job: dict[str, Any]
    """The whole job, resolved."""
    data: dict[str, Any]
    """Fingerprint and counts of the training data."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
    steps: Count
    """That were trained; the weights may be those of an earlier one, see `published_step`."""
    tokens: Count
    """All tokens that were trained on, each time they were."""
    learned_tokens: Count
    """Those of them that had a label."""
    loss: FiniteFloat | None
    """Mean over the learned tokens of the published step; None where nothing was trained."""
    code_version: str
    library_versions: dict[str, str]
    machine: dict[str, str]
    scores_before: dict[str, FiniteFloat] | None
    """On the test split, with the bare base."""
    scores_after: dict[str, FiniteFloat] | None
    scored_examples: dict[str, Count] | None = None
    """How many examples each score was measured on, by its name; None where an older version wrote it."""
    max_new_tokens: dict[str, Count] | None = None
    """The longest answer in tokens, by what was asked about; None where no answer was generated."""
    notices: Annotated[tuple[str, ...], Field(max_length=_MOST_NOTICES)] = ()
    """What the scores do not tell by themselves, such as references that were longer than any answer."""
    forgetting: FiniteFloat | None = None
    """How much worse the model became at what it was not trained on; None where that was not measured."""
    published_step: Count | None = None
    """Whose weights these are, where a step was chosen; None: those of the last one."""
    best: BestStep | None = None
    """What it is the best by; None: it is the last step, or was named by hand."""
    stopped_early: StoppedEarly | None = None
    parent: str | None = None
    """Reference of the version that training began from, if any."""
    merged_from: Annotated[tuple[str, ...], Field(max_length=MOST_SOURCES)] = ()
    """References of the versions whose weights were combined, if it was not trained."""
    origin: Origin | None = None
    """Where a copy comes from; `parent` and `merged_from` mean that catalog then."""

    @property
    def selection(self) -> dict[str, Any]:
        """`steps`, `published_step`, `best` and `stopped_early` as plain values, where it has them."""
        fields = {"steps", "published_step", "best", "stopped_early"}
        return self.model_dump(include=fields, exclude_none=True)


class AdapterRecord(RecordDraft):
    """One published version."""

    schema_version: Literal[1] = 1
    version: Annotated[int, Field(ge=1, le=2**63 - 1)]
    publish_id: Annotated[str, _matching(PUBLISH_ID, "1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-'")]
    created_at: UtcTime
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    signature: Signature | None = None

    @model_validator(mode="after")
    def _files_fit_one_folder(self) -> "AdapterRecord":
        # Compared without case: some file systems know none, and one file would replace the other.
        names = [entry.name.casefold() for entry in self.files]
        folders = {name.partition("/")[0] for name in names if "/" in name}
        if len(set(names)) != len(names) or folders & set(names):
            raise ValueError("files: two of them have one name")
        return self

    @property
    def reference(self) -> str:
        """The name that always means this version, such as `summarise@v3`."""
        return f"{self.adapter}@v{self.version}"

    def uri(self, catalog: str) -> str:
        """Where this record stands in the catalog at a uri."""
        return join_uri(catalog, numbered(versions_prefix(self.adapter), self.version))

    def to_bytes(self) -> bytes:
        """As it is kept: JSON, with a line end."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def parse_record(content: bytes, adapter: str, version: int, place: str) -> AdapterRecord:
    """Read a record, trusting nothing in it.

    Args:
        content: the JSON.
        adapter: the name under which it was found.
        version: the number under which it was found.
        place: its uri, for messages.

    Raises:
        CatalogError: it is damaged, of another schema, or the record of another version.
    """
    try:
        record = AdapterRecord.model_validate_json(content)
    except ValidationError as error:
        schema = _field(content, "schema_version")
        if schema != SCHEMA_VERSION:
            raise CatalogError(
                f"{place}: has schema_version {schema!r:.40}, and this raytune-ft reads {SCHEMA_VERSION}; "
                "install the version that published it"
            ) from None
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(_part(str(part)) for part in first["loc"]) or "record"
        message = f"{place}: not a record of this catalog: {where}: {first['msg']}"
        raise CatalogError(f"{message}; the object was altered or damaged") from None
    if (record.adapter, record.version) != (adapter, version):
        raise CatalogError(
            f"{place}: holds the record of {record.reference}, not of {adapter}@v{version}; it was moved"
        )
    return record


def publish_id_of(content: bytes) -> object:
    """The publish id of a record, whatever else is wrong with it; None where there is none."""
    return _field(content, "publish_id")


def _part(text: str) -> str:
    """Part of a field's path, which may be any key that the JSON has."""
    return text if text.isprintable() and len(text) <= _PART_CHARACTERS else f"{text[:_PART_CHARACTERS]!r}…"


def _field(content: bytes, name: str) -> object:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value.get(name) if isinstance(value, dict) else None


def model_card(
    draft: RecordDraft, auto_class: str = "AutoModelForCausalLM", *, says_how_to_generate: bool = False
) -> str:
    """README.md of a version: what it is, from what, how good, and how to load it.

    Args:
        draft: what is known of it.
        auto_class: the class of transformers that loads it, or its base.
        says_how_to_generate: beside an adapter stand a tokenizer and a generation_config.json.
    """
    header = {
        "base_model": draft.base.path,
        "library_name": "peft" if draft.kind == "adapter" else "transformers",
        "tags": ["raytune-ft", str(draft.method.get("kind", draft.kind))],
    }
    # JSON is YAML, and quotes whatever a path may hold.
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    facts = {
        "Base": _code(draft.base.path),
        "Base digest": _code(draft.base.digest),
        "Method": _code(json.dumps(draft.method)),
        "Data fingerprint": _code(str(draft.data.get("fingerprint", ""))),
        "Steps": f"{draft.steps:,}",
        **selection_texts(draft.selection),
        "Tokens": f"{draft.tokens:,}, {draft.learned_tokens:,} of them learned",
        "Loss" if draft.published_step else "Final loss": "-" if draft.loss is None else f"{draft.loss:.4f}",
        "Seed": str(draft.seed),
        "raytune-ft": draft.code_version,
    }
    if draft.merged_from:
        facts["Merged from"] = _code(", ".join(draft.merged_from))
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    table = "\n".join(["| | |", "|---|---|", *lines])
    parts = [
        f"---\n{front_matter}\n---",
        f"# {draft.adapter}",
        table,
        _scores(draft),
        _loading(draft, auto_class, says_how_to_generate),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def selection_texts(said: Mapping[str, Any]) -> dict[str, str]:
    """Which step was published and why, and why training ended early, by their titles; those that apply.

    Args:
        said: `steps` of a record or a result as plain values, with `published_step`, `best` and
            `stopped_early` where it has them.

    >>> selection_texts({"steps": 16, "published_step": 8})
    {'Published step': '8, named by --publish-step'}
    """
    texts = {}
    if (step := said.get("published_step")) is not None:
        best = said.get("best")
        texts["Published step"] = (
            f"{step:,} of {said['steps']:,}, with the best {best['metric']}: {best['value']:.4g}"
            if best
            else f"{step:,}, named by --publish-step"
        )
    if (stopped := said.get("stopped_early")) is not None:
        waited = stopped["patience"]
        texts["Stopped early"] = (
            f"after step {stopped['step']:,}: in {waited} validation{'' if waited == 1 else 's'} "
            f"{stopped['metric']} was no better than {stopped['best_value']:.4g} of step "
            f"{stopped['best_step']:,}"
        )
    return texts


def _scores(draft: RecordDraft) -> str:
    before, after = draft.scores_before or {}, draft.scores_after or {}
    if not after and not before:
        return ""
    counts = draft.scored_examples or {}
    rows = [
        f"| {name} | {_score(before.get(name))} | {_score(after.get(name))} | {counts.get(name, '-')} |"
        for name in sorted({*before, *after})
    ]
    head = ["Scores on held-out examples:", "", "| metric | before | after | examples |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, *(f"\n{notice}." for notice in draft.notices)])


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _loading(draft: RecordDraft, auto_class: str, says_how_to_generate: bool) -> str:
    base, folder = json.dumps(draft.base.path), json.dumps(f"./{draft.adapter}")
    lines = [f"from transformers import {auto_class}", ""]
    labels = (draft.job.get("model") or {}).get("labels") or []
    classes = f", num_labels={len(labels)}" if labels else ""
    if draft.kind == "adapter":
        lines.insert(0, "from peft import PeftModel")
        lines += [f"base = {auto_class}.from_pretrained({base}{classes})"]
        lines += [f"model = PeftModel.from_pretrained(base, {folder})"]
        if says_how_to_generate:
            lines[1] += ", AutoTokenizer, GenerationConfig"
            lines += [
                f"tokenizer = AutoTokenizer.from_pretrained({folder})",
                f"model.generation_config = GenerationConfig.from_pretrained({folder})",
            ]
    else:
        lines += [f"model = {auto_class}.from_pretrained({folder})"]
    return "\n".join(["```python", *lines, "```"])


def _code(text: str) -> str:
    """Inline code that no text can break out of, nor out of its table cell."""
    plain = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return "`" + plain.replace("`", "'").replace("|", "\\|") + "`"
