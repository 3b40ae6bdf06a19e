"""What every store must do, asked of each; then what only S3 can get wrong."""

import json
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from faultproxy import Fault, FaultProxy, Request
from servers import S3Server

from raytune_ft.errors import StorageChanged, StorageDenied, StorageError, StorageMissing
from raytune_ft.storage import Storage, arrow_filesystem, conditional_writes_hold, open_storage
from raytune_ft.storage.s3 import PART_BYTES
from raytune_ft.storage.s3_requests import Transient, connect, retry

s3 = pytest.mark.s3


def test_what_is_written_is_read(storage: Storage, tmp_path: Path) -> None:
    storage.write("a/b.bin", b"\0\xff" * 1000)
    assert storage.read("a/b.bin") == b"\0\xff" * 1000
    storage.write("a/b.bin", b"")
    assert storage.read("a/b.bin") == b""
    local = tmp_path / "local"
    local.write_bytes(b"from a file")
    storage.write("file", local)
    assert storage.read_or_none("file") == b"from a file"
    storage.download("file", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == b"from a file"
    assert os.listdir(tmp_path / "new") == ["copy"]


def test_a_part_is_read(storage: Storage) -> None:
    content = bytes(range(256)) * 4000
    storage.write("a", content)
    storage.write("empty", b"")
    last = len(content)
    for start, stop in (
        (0, None),
        (0, 10),
        (5, None),
        (300_000, 900_001),
        (last - 3, last + 9),
        (7, 7),
        (9, 3),
    ):
        with storage.open("a", start, stop) as stream:
            assert stream.read() == content[start:stop]
    for start in (last, last + 5):
        for stop in (None, last + 7):
            with storage.open("a", start, stop) as stream:
                assert stream.read() == b""
    for start, stop in ((0, None), (0, 10), (3, None), (3, 10), (0, 0)):
        with storage.open("empty", start, stop) as stream:
            assert stream.read() == b""


def test_another_version_is_refused(storage: Storage) -> None:
    storage.write("a", b"1" * 1000)
    first = storage.info("a")
    assert first is not None
    with storage.open("a", 10, 20, etag=first.etag) as stream:
        assert stream.read() == b"1" * 10
    storage.write("a", b"2" * 1001)
    for start, stop in ((0, None), (0, 10), (10, 20), (5, 5), (1000, None), (5000, 6000)):
        with pytest.raises(
            StorageChanged, match=rf"^{storage.uri}/a: changed: not version {first.etag} any more"
        ):
            storage.open("a", start, stop, etag=first.etag)
    storage.delete("a")
    with pytest.raises(StorageMissing, match=f"^{storage.uri}/a: no such"):
        storage.open("a", 10, 20, etag=first.etag)


def test_what_is_not_there(storage: Storage, tmp_path: Path) -> None:
    assert storage.read_or_none("nothing") is None
    assert storage.info("nothing") is None
    assert list(storage.list()) == []
    storage.delete("nothing")
    for read in (storage.read, storage.open, lambda key: storage.download(key, tmp_path / "x")):
        with pytest.raises(StorageMissing, match=f"^{storage.uri}/nothing: no such"):
            read("nothing")
    assert not (tmp_path / "x").exists()


def test_deleted_is_gone(storage: Storage) -> None:
    storage.write("a", b"1")
    storage.delete("a")
    assert storage.read_or_none("a") is None


def test_a_listing_is_sorted_by_whole_keys_and_filtered_by_prefix(storage: Storage) -> None:
    keys = ["A", "a-b/1", "a.json", "a/1", "a/b/c", "b/é", "b/z", "ab"]
    for key in keys:
        storage.write(key, key.encode())
    ordered = sorted(keys, key=str.encode)
    assert [found.key for found in storage.list()] == ordered
    assert [found.size_bytes for found in storage.list()] == [len(key.encode()) for key in ordered]
    assert [found.key for found in storage.list("a/")] == ["a/1", "a/b/c"]
    assert [found.key for found in storage.list("a")] == [key for key in ordered if key.startswith("a")]
    assert [found.key for found in storage.list("a/b")] == ["a/b/c"]
    assert [found.key for found in storage.list(limit=2)] == ordered[:2]
    assert list(storage.list("nothing/")) == []


def test_an_etag_changes_with_the_content_alone(storage: Storage) -> None:
    storage.write("a", b"1")
    first = storage.info("a")
    assert first is not None
    assert first == storage.info("a") == next(storage.list("a"))
    storage.write("a", b"2")
    second = storage.info("a")
    assert second is not None
    assert second.etag != first.etag


def test_one_of_many_creates(storage: Storage) -> None:
    """Eight writers at once, ten times: one is told that it created the object, and its content stands."""
    for round_ in range(10):
        barrier = threading.Barrier(8)

        def create(writer: int, key: str = f"race/{round_}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.write_once(key, str(writer).encode() * 1000)

        with ThreadPoolExecutor(8) as writers:
            created = list(writers.map(create, range(8)))
        assert created.count(True) == 1
        assert storage.read(f"race/{round_}") == str(created.index(True)).encode() * 1000


def test_conditional_writes_are_probed_without_a_trace(storage: Storage) -> None:
    assert conditional_writes_hold(storage)
    assert list(storage.list()) == []


@s3
def test_no_right_to_delete_is_needed(s3_server: S3Server, bucket: str) -> None:
    if s3_server.kind == "moto":
        pytest.skip("moto lets everybody do everything")
    denied = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:DeleteObject",
        "Resource": f"arn:aws:s3:::{bucket}/*",
    }
    client = boto3.client("s3")
    client.put_bucket_policy(
        Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denied]})
    )
    client.close()
    storage = open_storage(f"s3://{bucket}")
    assert conditional_writes_hold(storage)
    (probe,) = storage.list()
    with pytest.raises(StorageDenied):
        storage.delete(probe.key)


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\\b", "a\0b", ".tmp-1", "a/.tmp-1"]
)
def test_keys_that_lead_elsewhere_are_refused(storage: Storage, key: str) -> None:
    for act in (storage.read, storage.info, storage.delete, storage.open):
        with pytest.raises(ValueError, match=r"^key "):
            act(key)
    for write in (storage.write, storage.write_once):
        with pytest.raises(ValueError, match=r"^key "):
            write(key, b"")


def test_a_storage_travels_to_other_processes(storage: Storage) -> None:
    storage.write("a", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


def test_arrow_writes_and_reads_what_the_storage_does(storage: Storage) -> None:
    filesystem, path = arrow_filesystem(storage.uri)
    storage.write("there", b"x")
    filesystem.create_dir(f"{path}/new")
    with filesystem.open_output_stream(f"{path}/new/a.bin") as stream:
        stream.write(b"arrow")
    assert storage.read("new/a.bin") == b"arrow"


@s3
def test_a_large_file_goes_in_parts(bucket: str, tmp_path: Path) -> None:
    content = os.urandom(PART_BYTES + 12345)
    (tmp_path / "large").write_bytes(content)
    storage = open_storage(f"s3://{bucket}")
    storage.write("large", tmp_path / "large")
    found = storage.info("large")
    assert found is not None
    assert (found.size_bytes, found.etag.endswith("-2")) == (len(content), True)
    storage.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


@s3
@pytest.mark.parametrize("fault", list(Fault))
def test_every_operation_survives_every_fault(fault_proxy: FaultProxy, bucket: str, fault: Fault) -> None:
    """Every other request fails; what is written is written, and nothing is read in part."""
    fault_proxy.plan = lambda request: fault if request.number % 2 == 0 else None
    storage = open_storage(f"s3://{bucket}/p")
    content = os.urandom(300_000)
    storage.write("a", content)
    assert storage.read("a") == content
    created = storage.write_once("once", b"mine")
    assert storage.read("once") == b"mine"
    assert created or fault is Fault.LOST_ANSWER
    assert not storage.write_once("once", b"another's")
    assert [found.key for found in storage.list()] == ["a", "once"]
    storage.delete("a")
    assert storage.info("a") is None
    assert fault in fault_proxy.faults


@s3
def test_a_stream_goes_on_where_it_broke(fault_proxy: FaultProxy, bucket: str) -> None:
    content = os.urandom(3_000_000)
    storage = open_storage(f"s3://{bucket}")
    storage.write("a", content)
    fault_proxy.plan = lambda _: Fault.TRUNCATED if len(fault_proxy.faults) < 3 else None
    with storage.open("a") as stream:
        got = b"".join(iter(lambda: stream.read(100_000), b""))
    assert got == content
    assert len([request for request in fault_proxy.requests if request.method == "GET"]) == 4


@s3
def test_a_part_goes_on_where_it_broke(fault_proxy: FaultProxy, bucket: str) -> None:
    content = os.urandom(3_000_000)
    storage = open_storage(f"s3://{bucket}")
    storage.write("a", content)
    found = storage.info("a")
    assert found is not None
    fault_proxy.plan = lambda _: Fault.TRUNCATED if len(fault_proxy.faults) < 3 else None
    with storage.open("a", 1_000_001, 2_900_000, etag=found.etag) as stream:
        assert stream.read() == content[1_000_001:2_900_000]
    fault_proxy.plan = lambda request: Fault.TRUNCATED if request.method == "GET" else None
    with storage.open("a", 1_000_001, 2_900_000, etag=found.etag) as stream:
        stream.read(1000)
        storage.write("a", os.urandom(3_000_000))
        with pytest.raises(
            StorageChanged, match=rf"^s3://{bucket}/a: changed: not version {found.etag} any more"
        ):
            stream.read()


@s3
def test_a_stream_never_mixes_two_contents(fault_proxy: FaultProxy, bucket: str) -> None:
    storage = open_storage(f"s3://{bucket}")
    storage.write("a", b"1" * 3_000_000)
    fault_proxy.plan = lambda request: Fault.TRUNCATED if request.method == "GET" else None
    with storage.open("a") as stream:
        stream.read(1000)
        storage.write("a", b"2" * 3_000_000)
        with pytest.raises(
            StorageChanged, match=rf"^s3://{bucket}/a: changed while it was being read; run again$"
        ):
            stream.read()


@s3
def test_a_lost_answer_to_the_end_of_an_upload(fault_proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(PART_BYTES + 1))
    lost: list[Request] = []

    def lose_first_completion(request: Request) -> Fault | None:
        if request.method == "POST" and "uploadId=" in request.path and not lost:
            lost.append(request)
            return Fault.LOST_ANSWER
        return None

    fault_proxy.plan = lose_first_completion
    storage = open_storage(f"s3://{bucket}")
    storage.write("large", tmp_path / "large")
    assert storage.read("large") == (tmp_path / "large").read_bytes()
    assert lost


@s3
@pytest.mark.parametrize("seconds", [5.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_an_outage_is_survived(fault_proxy: FaultProxy, bucket: str, seconds: float) -> None:
    storage = open_storage(f"s3://{bucket}")
    end = time.monotonic() + seconds
    fault_proxy.plan = lambda _: Fault.RESET if time.monotonic() < end else None
    assert storage.write_once("a", b"1")
    assert storage.read("a") == b"1"
    assert time.monotonic() > end


def test_retries_end_with_what_to_do() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise Transient("http://store answered 503 SlowDown")

    expected = (
        r"^s3://b/k: the store did not work for 1 s; last: http://store answered 503 SlowDown; "
        r"check AWS_ENDPOINT_URL and that the store is up, and run again$"
    )
    with pytest.raises(StorageError, match=expected) as caught:
        retry(fail, "s3://b/k", outage_s=1.0)
    assert len(calls) > 2
    assert type(pickle.loads(pickle.dumps(caught.value))) is StorageError


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:my-password@127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("raytune_ft.storage.s3.CHECK_OUTAGE_S", 0.5)
    with pytest.raises(StorageError) as caught:
        open_storage("s3://bucket").check()
    assert str(caught.value) == (
        "s3://bucket: the store did not work for 0 s; last: no answer from http://127.0.0.1:1 "
        "(EndpointConnectionError); check AWS_ENDPOINT_URL and that the store is up, and run again"
    )


@s3
@pytest.mark.parametrize(
    ("variable", "value", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "unknownkey", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "SignatureDoesNotMatch"),
    ],
)
def test_refused_credentials(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, code: str
) -> None:
    if s3_server.kind == "moto":
        pytest.skip("moto takes any credentials")
    monkeypatch.setenv(variable, value)
    with pytest.raises(StorageDenied) as caught:
        open_storage(f"s3://{bucket}/adapters").check()
    assert str(caught.value) == (
        f"s3://{bucket}/adapters: {s3_server.endpoint} refused the credentials ({code}); check "
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN"
    )


@s3
def test_no_credentials(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageDenied) as caught:
        open_storage(f"s3://{bucket}").check()
    assert str(caught.value) == (
        f"s3://{bucket}: no credentials for {s3_server.endpoint}; "
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    )


def test_an_unknown_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageDenied, match=r"\(nobody\) could not be found; correct AWS_PROFILE"):
        open_storage("s3://bucket").check()


def test_an_endpoint_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "me:my-password@nowhere")
    with pytest.raises(StorageError, match=r"^AWS_ENDPOINT_URL .* is not valid; write http://host:port$"):
        open_storage("s3://bucket").check()


@s3
def test_a_bucket_that_is_not_there(s3_server: S3Server, bucket: str) -> None:
    assert bucket
    expected = (
        f"s3://no-such-bucket/a: no bucket no-such-bucket at {s3_server.endpoint}; "
        "create it or correct the name"
    )
    with pytest.raises(StorageMissing) as caught:
        open_storage("s3://no-such-bucket/a").check()
    assert str(caught.value) == expected
    with pytest.raises(StorageMissing) as caught:
        open_storage("s3://no-such-bucket").read_or_none("a")
    assert str(caught.value) == expected


@s3
def test_folder_marks_are_no_objects(bucket: str) -> None:
    storage = open_storage(f"s3://{bucket}")
    storage.write("a/b", b"1")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="a/", Body=b"")
    client.close()
    assert [found.key for found in storage.list()] == ["a/b"]


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_is_taken_from_either_variable(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "eu-west-3")
    client = connect()
    assert client.api.meta.region_name == "eu-west-3"
    assert client.endpoint == "https://s3.eu-west-3.amazonaws.com"


@s3
def test_what_a_killed_upload_left_is_found(bucket: str, tmp_path: Path) -> None:
    client = boto3.client("s3")
    for key in ("prefix/large", "elsewhere"):
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100)
    client.close()
    storage = open_storage(f"s3://{bucket}/prefix")
    storage.write("small", b"1")
    began = storage.info("small")
    assert began is not None
    assert storage.discard_unfinished(began.modified_at - 3600) == []
    later = began.modified_at + 3600
    (left,) = storage.discard_unfinished(later, dry_run=True)
    assert left.startswith(f"s3://{bucket}/prefix/large (upload ")
    assert storage.discard_unfinished(later) == [left]
    assert storage.discard_unfinished(later) == []
    (other,) = open_storage(f"s3://{bucket}").discard_unfinished(later)
    assert other.startswith(f"s3://{bucket}/elsewhere (upload ")
    assert storage.read("small") == b"1"
