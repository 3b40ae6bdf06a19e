"""Data sets of the Hub: through the Hub's own client, its cache, and a server that speaks as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.data.hub import HubRevision, split_hub_uri
from raytune_ft.errors import DataError, SpecError
from raytune_ft.spec import parse_job

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    ".gitattributes": b"*.parquet filter=lfs\n",
    "README.md": b"# Sums\n",
    "main/test-00000-of-00001.jsonl": b'{"prompt": "9+9", "completion": "18"}\n',
    "main/train-00000-of-00002.jsonl": b'{"prompt": "1+1", "completion": "2"}\n',
    "main/train-00001-of-00002.jsonl": b'{"prompt": "2+2", "completion": "4"}\n',
}
LIST = """
import json, sys
from raytune_ft.data.access import open_object
from raytune_ft.data.sources import fingerprint, list_source
from raytune_ft.errors import DataError
try:
    found = list_source(sys.argv[1])
    texts = [open_object(each, 1).read().decode() for each in found.objects]
except DataError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({
        "uris": [each.uri for each in found.objects],
        "sizes": [each.size_bytes for each in found.objects],
        "skipped": found.skipped,
        "commit": found.commit,
        "texts": texts,
        "fingerprint": fingerprint(found.objects),
    }))
"""


def look(uri: str, home: Path, **environment: str) -> dict[str, Any]:
    """What listing and reading a source in a process of its own gives; the client reads its settings once."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": ""}
    settings = {**os.environ, **quiet, "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", LIST, uri]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=100, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def offline(uri: str, home: Path) -> dict[str, Any]:
    return look(uri, home, HF_HUB_OFFLINE="1")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A cache as `hf download` leaves it, without the list of files that newer clients keep."""
    folder = tmp_path / "home/hub/datasets--team--sums"
    for name, content in FILES.items():
        path = folder / "snapshots" / COMMIT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    return tmp_path / "home"


TRAIN = [name for name in FILES if "train" in name]


@pytest.mark.parametrize(
    "uri",
    [
        "hf://team/sums/main/train",
        "hf://datasets/team/sums/train",
        f"hf://team/sums@{COMMIT}/main/train-*",
        "hf://team/sums@main/**/train-*.jsonl",
    ],
)
def test_cache_is_read_offline_at_its_commit(home: Path, uri: str) -> None:
    found = offline(uri, home)
    assert found["uris"] == [f"hf://datasets/team/sums@{COMMIT}/{name}" for name in TRAIN]
    assert found["commit"] == COMMIT
    assert found["sizes"] == [len(FILES[name]) for name in TRAIN]
    assert found["texts"] == [FILES[name][1:].decode() for name in TRAIN]


def test_splits_and_other_files_are_those_of_a_folder(home: Path) -> None:
    found = offline("hf://team/sums", home)
    assert found == {
        "error": "hf://team/sums: holds the splits test, train; name the one that is meant, as in "
        "uri: hf://team/sums/train, or take the files of several by a glob"
    }


@pytest.mark.parametrize("uri", ["hf://team/other", "hf://team/sums@v2"])
def test_what_is_not_in_the_cache_is_said_offline(home: Path, uri: str) -> None:
    dataset, _ = split_hub_uri(uri)
    at = f" --revision {dataset.revision}" if dataset.revision else ""
    command = f"`hf download {dataset.id} --repo-type dataset{at}`"
    assert offline(uri, home) == {
        "error": f"{dataset}: not in this machine's cache, and the Hub cannot be reached; set "
        f"HF_HUB_OFFLINE=0, or fetch it first with {command}, or put it in a bucket"
    }


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that a client needs to list and fetch the files of `team/sums`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/datasets/team/sums/revision/main":
            self._send(json.dumps({"id": "team/sums", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/datasets/team/sums/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            self._send(json.dumps(tree).encode())
        elif (name := path.removeprefix(f"/datasets/team/sums/resolve/{COMMIT}/")) in FILES:
            self._send(FILES[name])
        else:
            self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        about = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        for name, value in {**about, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_first_read_fetches_and_later_ones_need_no_hub(endpoint: str, tmp_path: Path, home: Path) -> None:
    uri = "hf://team/sums/train"
    first = look(uri, tmp_path / "fresh", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
    assert first["texts"] == [FILES[name][1:].decode() for name in TRAIN]
    cached = {path.name for path in (tmp_path / "fresh").rglob("*.jsonl")}
    assert cached == {Path(name).name for name in TRAIN}
    # The list of all files is kept, so that offline a part of them is never taken for the whole.
    assert offline(uri, tmp_path / "fresh") == first
    assert offline(uri, home)["fingerprint"] == first["fingerprint"]
    unread = offline("hf://team/sums/test", tmp_path / "fresh")["error"]
    assert unread.startswith(f"hf://datasets/team/sums@{COMMIT}/main/test-00000-of-00001.jsonl: not in this")
    assert f"`hf download team/sums --repo-type dataset --revision {COMMIT}`" in unread


def test_name_that_the_hub_does_not_have(endpoint: str, tmp_path: Path) -> None:
    found = look("hf://team/sum", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")["error"]
    assert found.startswith("hf://datasets/team/sum: the Hub does not give it (RepositoryNotFoundError: ")
    assert found.endswith("; check the name, and HF_TOKEN where it is private or gated")
    assert "\n" not in found


def test_listing_is_sorted_and_versioned() -> None:
    revision = HubRevision(f"hf://datasets/a/b@{COMMIT}", {"b/2": 2, "a": 1, "b/10": 3})
    assert [each.key for each in revision.list("b/")] == ["b/10", "b/2"]
    assert [each.key for each in revision.list(limit=2)] == ["a", "b/10"]
    assert revision.info("c") is None
    assert {each.etag for each in revision.list()} == {COMMIT}


@pytest.mark.parametrize(
    "uri", ["hf://squad", "hf://datasets/squad", "hf://models/a/b", "hf://", "hf://a/b@", "hf://token@a/b"]
)
def test_other_uris_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a data set of the Hub; write hf://owner/name"):
        split_hub_uri(uri)
    job = {
        "name": "a",
        "model": {"path": str(tmp_path)},
        "data": {"sources": [{"uri": uri}]},
        "publish": {"catalog": str(tmp_path)},
    }
    with pytest.raises(SpecError, match=r"data\.sources\[0\]\.uri: write hf://owner/name for a data set"):
        parse_job(job)
    parse_job({**job, "data": {"sources": [{"uri": "hf://datasets/a/b@refs/convert/parquet/c/train"}]}})
    with pytest.raises(SpecError, match=r"publish\.catalog: scheme 'hf' is not supported"):
        parse_job({**job, "publish": {"catalog": "hf://a/b"}})
