"""A clean environment for every test, and the stores that they talk to."""

import os
import resource
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

# Before anything is imported that reads them: nothing of the person who runs the tests may leak in.
for _name in [name for name in os.environ if name.startswith(("AWS_", "RAYTUNE_", "RAY_ADDRESS"))]:
    del os.environ[_name]
_HOME = tempfile.TemporaryDirectory(prefix="raytune-ft-home-", ignore_cleanup_errors=True)
os.environ |= {
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "HOME": _HOME.name,
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

import boto3  # noqa: E402  after the environment is clean
import pytest  # noqa: E402
from botocore.config import Config  # noqa: E402
from commands import Ended, Run  # noqa: E402
from faultproxy import FaultProxy  # noqa: E402
from hypothesis import settings  # noqa: E402
from servers import S3Server, ServerUnavailable, run_s3  # noqa: E402

from raytune_ft.storage import Storage, open_storage  # noqa: E402

SMALL_DISK_BYTES = 1 << 20

# No example is too slow: how long one takes is the machine's affair. A commit's tests have one result, so the
# examples are always the same; `--hypothesis-profile search` looks for new ones.
settings.register_profile("any machine", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, started for the first test that needs one."""
    try:
        with run_s3(tmp_path_factory.mktemp("s3")) as server:
            yield server
    except ServerUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a new bucket, with the variables set by which every client finds it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex[:16]}"
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket=name)
    client.close()
    return name


@pytest.fixture
def fault_proxy(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, through which all clients go; it does no harm until it is told to."""
    assert bucket, "the bucket's variables must be set before AWS_ENDPOINT_URL is"
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty store of each kind."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "store"))
    return open_storage(f"s3://{request.getfixturevalue('bucket')}/some/prefix")


@pytest.fixture(params=["tmpfs", "rlimit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in which no file above 1 MiB can be written."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "rlimit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK_BYTES, before[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount, and not everywhere")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data sets and expected values that are too large for the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `raytune-ft` with the given arguments in this process."""

    def run_main(*arguments: object) -> Ended:
        from raytune_ft.cli import main

        monkeypatch.setattr(sys, "argv", ["raytune-ft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        # None is how a program says that all is well.
        return Ended(int(ended.value.code or 0), *capfd.readouterr())

    return run_main
