"""Data sets of the Hugging Face Hub, read through the Hub's own client and cache at one revision.

A listing resolves the revision to a commit and keeps it in the uri of each object: every machine that reads
the object, now or later, reads that commit. Each machine has a cache of its own (`HF_HOME`), which it fills
file by file with what it reads.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from raytune_ft.errors import DataError
from raytune_ft.spec.values import HUB_URI
from raytune_ft.storage import ObjectInfo

SCHEME = "hf://"
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTION = ("README.md", ".gitattributes")
"""Small files of which every data set has one: fetching them fetches the list of all files."""


@dataclass(frozen=True)
class Dataset:
    """A data set of the Hub, as a uri names it."""

    id: str
    """`owner/name`."""
    revision: str | None = None
    """A branch, tag or commit; None: the main branch."""

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{SCHEME}datasets/{self.id}{at}"


@dataclass(frozen=True)
class HubRevision:
    """The files of a data set at one commit. Lists like a storage."""

    uri: str
    """`hf://datasets/owner/name@commit`."""
    sizes_bytes: Mapping[str, int]
    """Of each file, by its key."""

    def list(self, prefix: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Files whose keys begin with `prefix`, sorted by key as UTF-8 bytes, at most `limit`."""
        keys = sorted((key for key in self.sizes_bytes if key.startswith(prefix)), key=str.encode)
        return (self._describe(key) for key in keys[:limit])

    def info(self, key: str) -> ObjectInfo | None:
        """One file, or None where there is none."""
        return self._describe(key) if key in self.sizes_bytes else None

    def _describe(self, key: str) -> ObjectInfo:
        # The content of a file of a commit never changes, so the commit is its version.
        return ObjectInfo(key, self.sizes_bytes[key], self.uri.rpartition("@")[2], 0.0)


def is_hub(uri: str) -> bool:
    """Whether a uri means a data set of the Hub."""
    return uri.startswith(SCHEME)


def split_hub_uri(uri: str) -> tuple[Dataset, str]:
    """The data set that a uri names, and the file, folder or glob in it; '' is all of it.

    Raises:
        DataError: the uri has another form.

    >>> split_hub_uri("hf://openai/gsm8k/main/train-*.parquet")
    (Dataset(id='openai/gsm8k', revision=None), 'main/train-*.parquet')
    >>> split_hub_uri("hf://datasets/openai/gsm8k@refs/convert/parquet/main")
    (Dataset(id='openai/gsm8k', revision='refs/convert/parquet'), 'main')
    """
    found = HUB_URI.fullmatch(uri)
    if found is None:
        raise DataError(
            f"{uri}: not a data set of the Hub; write hf://owner/name, or hf://owner/name@revision"
        )
    revision = found["revision"]
    return Dataset(found["id"], None if revision is None else unquote(revision)), found["key"] or ""


def open_revision(dataset: Dataset) -> HubRevision:
    """The files of a data set at the commit that its revision means now, or meant when it was cached.

    Raises:
        DataError: the Hub does not give it, and it is not in this machine's cache.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError

    with _hub_errors(dataset):
        try:
            snapshot = Path(
                snapshot_download(
                    dataset.id,
                    repo_type="dataset",
                    revision=dataset.revision,
                    allow_patterns=list(_DESCRIPTION),
                )
            )
        except IncompleteSnapshotError as error:
            snapshot = Path(error.snapshot_path)  # Its data may be there all the same.
        try:
            tree = get_cached_repo_tree(dataset.id, repo_type="dataset", revision=snapshot.name)
            sizes = {file.path: file.size for file in tree}
        except CachedRepoTreeNotFoundError:  # Of an older client's download only the files are known.
            sizes = {
                path.relative_to(snapshot).as_posix(): path.stat().st_size
                for path in snapshot.rglob("*")
                if path.is_file()
            }
    return HubRevision(str(Dataset(dataset.id, snapshot.name)), sizes)


def local_copy(root: str, key: str) -> Path:
    """A file of a commit in this machine's cache, downloaded where it is not there yet.

    Args:
        root: `HubRevision.uri`.
        key: the file's.

    Raises:
        DataError: the Hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    dataset, _ = split_hub_uri(root)
    with _hub_errors(dataset, key):
        return Path(hf_hub_download(dataset.id, key, repo_type="dataset", revision=dataset.revision))


@contextmanager
def _hub_errors(dataset: Dataset, key: str = "") -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = "" if dataset.revision is None else f" --revision {dataset.revision}"
    place = f"{dataset}/{key}" if key else f"{dataset}"
    try:
        yield
    except LocalEntryNotFoundError:
        raise DataError(
            f"{place}: not in this machine's cache, and the Hub cannot be reached; set HF_HUB_OFFLINE=0, or "
            f"fetch it first with `hf download {dataset.id} --repo-type dataset{at}`, or put it in a bucket"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{place}: the Hub does not give it ({type(error).__name__}: {reason}); check the name, and "
            "HF_TOKEN where it is private or gated"
        ) from None
