"""Which files of a folder hold records, and which split each belongs to, by their names alone.

Pure functions over keys. What is listed by them is a folder that a person named; a glob or an exact file
is taken as it is.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_KINDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words for the three kinds of splits: those of the `datasets` library."""
_DATA_SUFFIXES = re.compile(
    r"(\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather|txt|gz|gzip|zst|bz2|xz|zip))+$", re.IGNORECASE
)
_SHARD = re.compile(r"([-_. ]\d+([-_. ]of[-_. ]\d+(-[0-9a-f]{16})?)?)+$")
"""Numbers at the end of a name; the Hub's own files have a hash after them."""
_OTHER_SUFFIXES = (
    *(".md", ".rst", ".html", ".css", ".pdf", ".bib", ".cff"),
    *(".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"),
    *(".py", ".ipynb", ".sh", ".js", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".lock"),
)
"""Files with these names are never records."""
_OTHER_NAMES = re.compile(
    r"(read_?me|licen[cs]e|copying|notice|citation|authors|changelog|requirements|makefile|dockerfile)"
    r"([-_][\w-]*)?(\.txt)?",
    re.IGNORECASE,
)
_DATASET_DICT, _DATASET_INFO, _STATE = "dataset_dict.json", "dataset_info.json", "state.json"
_METADATA = (_DATASET_DICT, _DATASET_INFO, "dataset_infos.json")
"""Files that the `datasets` library writes beside its data."""


class Split(NamedTuple):
    """What the name of a file says of its split."""

    name: str
    """As it is written, without the number of a shard: `train`, `test_sft`, `gsm8k_train`."""
    kind: str
    """`train`, `validation` or `test`; of a saved `DatasetDict` with other names the name itself."""


@dataclass(frozen=True)
class Folder:
    """The files of a folder, divided."""

    data: tuple[str, ...]
    """Keys that may hold records, in the order given."""
    skipped: tuple[str, ...]
    """Names that were left out: of files, or of whole hidden folders with a '/' at the end."""


def sort_out(keys: Iterable[str]) -> Folder:
    """Tell the files of a folder that may hold records from those that do not, by their names.

    Left out are hidden files and folders (names that begin with '.' or '_'), descriptions, licences,
    pictures and programs, and what the `datasets` library writes beside its data.

    >>> sort_out(["README.md", "a.json", ".git/HEAD", ".git/config", "deep/LICENSE", "notes.txt"])
    Folder(data=('a.json', 'notes.txt'), skipped=('README.md', '.git/', 'deep/LICENSE'))
    """
    listed = list(keys)
    saved = {_folder(key) for key in listed if key.rpartition("/")[2] == _DATASET_INFO}
    data, skipped = [], dict[str, None]()
    for key in listed:
        hidden = re.match(r"(?:.*?/)??[._][^/]*/?", key)
        if hidden:
            skipped[hidden[0]] = None
        elif _is_other(key, saved):
            skipped[key] = None
        else:
            data.append(key)
    return Folder(tuple(data), tuple(skipped))


def _is_other(key: str, saved: Collection[str]) -> bool:
    name = key.rpartition("/")[2]
    if _folder(key) in saved and (name == _STATE or re.fullmatch(r"cache-.*\.arrow", name)):
        return True  # `datasets` keeps what it computed of the data beside it.
    return (
        name in _METADATA
        or name.lower().endswith(_OTHER_SUFFIXES)
        or _OTHER_NAMES.fullmatch(name) is not None
    )


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def split_of(key: str) -> Split | None:
    """The split that a file belongs to by its name or a folder's on the way, None where they name none.

    A folder counts where its whole name is such a word. A file's counts where its first or its last word is
    one; the numbers of shards are no words.

    >>> split_of("main/train-00000-of-00002.parquet"), split_of("dev/a.json")
    (Split(name='train', kind='train'), Split(name='dev', kind='validation'))
    >>> split_of("data/test_sft-00000-of-00001.parquet"), split_of("gsm8k_train.jsonl.gz")
    (Split(name='test_sft', kind='test'), Split(name='gsm8k_train', kind='train'))
    >>> split_of("contest.json"), split_of("a_test_of_wits.json")
    (None, None)
    """
    *folders, file = key.split("/")
    for folder in folders:
        if kind := _KINDS.get(folder.lower()):
            return Split(folder, kind)
    stem = _SHARD.sub("", _DATA_SUFFIXES.sub("", file))
    return Split(stem, kind) if (kind := kind_of(stem)) else None


def kind_of(name: str) -> str | None:
    """The kind of split that a name without suffixes says, None where it says none."""
    words = re.split(r"[-_. ]", name.lower())
    return _KINDS.get(words[0]) or _KINDS.get(words[-1])


def splits(keys: Sequence[str], all_keys: Collection[str]) -> Mapping[Split, list[str]]:
    """The keys of each split, by the splits' names. Keys that name none are left out.

    Args:
        keys: of the files that may hold records.
        all_keys: of these and of those that were left out, which tell a saved `DatasetDict`.
    """
    saved = {_folder(key) for key in all_keys if key.rpartition("/")[2] == _DATASET_DICT}
    found: dict[Split, list[str]] = {}
    for key in keys:
        if split := _saved_split(key, saved) or split_of(key):
            found.setdefault(split, []).append(key)
    return dict(sorted(found.items()))


def _saved_split(key: str, saved: Collection[str]) -> Split | None:
    """The split of a file of a `DatasetDict`: the name of the folder below that of `dataset_dict.json`."""
    folders = key.split("/")[:-1]
    for depth, name in enumerate(folders):
        if "/".join(folders[:depth]) in saved:
            return Split(name, _KINDS.get(name.lower(), name))
    return None


def must_choose(found: Collection[Split]) -> bool:
    """Whether a folder with these splits has to say which one is meant: they are of several kinds.

    Names of one kind alone tell nothing: they may be those of ordinary files.
    """
    return len({split.kind for split in found}) > 1
