"""S3 servers for the tests: a real Ceph gateway where its packages can be had, moto elsewhere."""

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_TESTS = Path(__file__).parent
_CEPH_ROOT = _TESTS.parent / ".cache" / "ceph" / "root"
_START_TIMEOUT_S = 120.0
_CLUSTER_ID = "11111111-2222-3333-4444-555555555555"
_OSD_ID = "22222222-2222-3333-4444-555555555555"

# One monitor, one OSD, one gateway; loopback only, no authentication between them. What a killed gateway
# watched is dropped soon: changes of buckets wait for its answer until then.
_CEPH_CONFIG = """
[global]
fsid = {cluster_id}
mon host = [v2:127.0.0.1:{monitor_port}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
auth_allow_insecure_global_id_reclaim = false
ms mon client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
run dir = {data}/run
admin socket = {data}/run/$name.asok
log file = {data}/log/$name.log
log to stderr = false
setuser match path =
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
crash dir = {data}/crash
[mon.a]
mon data = {data}/mon
host = localhost
[osd.0]
osd data = {data}/osd
osd objectstore = {object_store}
memstore device bytes = 4294967296
bluestore block size = 4294967296
osd memory target = 939524096
osd client watch timeout = 3
host = localhost
[client.rgw]
rgw data = {data}/rgw
rgw frontends = beast endpoint=127.0.0.1:{gateway_port} tcp_nodelay=1
rgw thread pool size = 64
rgw num rados handles = 1
rgw_crypt_require_ssl = false
"""


class ServerUnavailable(Exception):
    """No S3 server can be started here; the message says why."""


@dataclass
class Daemon:
    """One process of a server."""

    command: list[str]
    environment: Mapping[str, str]
    output: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again on the data that it left."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdout=output,
                stderr=output,
                preexec_fn=_end_with_parent,
            )

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class S3Server:
    """A running server and the only account it knows."""

    kind: str
    endpoint: str
    access_key: str
    secret_key: str
    daemons: tuple[Daemon, ...] = ()
    """Those that lose nothing when they are killed, in the order in which they start."""

    def kill(self) -> None:
        """SIGKILL to all that lose nothing."""
        for daemon in reversed(self.daemons):
            daemon.kill()

    def start(self) -> None:
        """Start what was killed, on the same data and port."""
        for daemon in self.daemons:
            daemon.start()
        _wait_for(self.endpoint)

    def environment(self) -> dict[str, str]:
        """The variables through which every client finds and enters this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def run_s3(folder: Path) -> Iterator[S3Server]:
    """Start the best server that can be had, with its data in `folder`; stop it at the end.

    Raises:
        ServerUnavailable: neither Ceph nor moto is here.
    """
    subprocess.run([_TESTS / "ceph" / "install.sh"], capture_output=True, check=True)
    if (_CEPH_ROOT.parent / "complete").exists():
        with run_ceph(folder) as server:
            yield server
    elif importlib.util.find_spec("moto"):
        with _run_moto() as server:
            yield server
    else:
        reason = (_CEPH_ROOT.parent / "unavailable").read_text().strip()
        raise ServerUnavailable(f"no Ceph ({reason}) and no moto")


@contextmanager
def run_ceph(folder: Path, *, on_disk: bool = False) -> Iterator[S3Server]:
    """Run a Ceph cluster of three processes that `tests/ceph/install.sh` has unpacked.

    Args:
        folder: for all that it writes.
        on_disk: keep objects in `folder`, so that all three may be killed; else in memory, which starts
            sooner, and only the gateway may be.
    """
    libraries = _CEPH_ROOT / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"
    monitor_port, gateway_port = free_ports(2)
    for name in ("mon", "osd", "rgw", "run", "log", "crash"):
        (folder / name).mkdir(parents=True)
    config = folder / "ceph.conf"
    config.write_text(
        _CEPH_CONFIG.format(
            cluster_id=_CLUSTER_ID,
            monitor_port=monitor_port,
            gateway_port=gateway_port,
            data=folder,
            libraries=libraries,
            object_store="bluestore" if on_disk else "memstore",
        )
    )
    ceph = _Ceph(config, libraries)
    monitor = ceph.daemon("ceph-mon", "-i", "a")
    store = ceph.daemon("ceph-osd", "-i", "0")
    gateway = ceph.daemon("radosgw", "-n", "client.rgw")
    safe_to_kill = (monitor, store, gateway) if on_disk else (gateway,)
    server = S3Server("ceph", f"http://127.0.0.1:{gateway_port}", "testkey", "testsecret", safe_to_kill)
    with ExitStack() as daemons:
        # The data is temporary: at the end there is nothing to flush.
        monitors, mapped = f"[v2:127.0.0.1:{monitor_port}]", str(folder / "monmap")
        ceph.call("monmaptool", "--create", "--fsid", _CLUSTER_ID, "--addv", "a", monitors, mapped)
        ceph.call("ceph-mon", "--mkfs", "-i", "a", "--monmap", mapped)
        daemons.callback(monitor.kill)
        monitor.start()
        ceph.control("osd", "new", _OSD_ID)
        ceph.call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", _OSD_ID)
        daemons.callback(store.kill)
        store.start()
        user = ("--uid=test", "--display-name=test", "--access-key=testkey", "--secret-key=testsecret")
        ceph.call("radosgw-admin", "-n", "client.rgw", "user", "create", *user)
        daemons.callback(gateway.kill)
        gateway.start()
        _wait_for(server.endpoint)
        yield server


@dataclass(frozen=True)
class _Ceph:
    config: Path
    libraries: Path

    def call(self, program: str, *arguments: str) -> None:
        self._run([str(_CEPH_ROOT / "usr" / "bin" / program), "-c", str(self.config), *arguments])

    def control(self, *arguments: str) -> None:
        """Run the `ceph` command, a Python program for the distribution's own Python."""
        python = shutil.which("python3", path="/usr/bin") or str(_CEPH_ROOT / "usr" / "bin" / "python3")
        self._run([python, str(_CEPH_ROOT / "usr" / "bin" / "ceph"), "-c", str(self.config), *arguments])

    def daemon(self, program: str, *arguments: str) -> Daemon:
        command = [str(_CEPH_ROOT / "usr" / "bin" / program), "-f", "-c", str(self.config), *arguments]
        return Daemon(command, self._environment(), self.config.parent / f"{program}.out")

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} returned {done.returncode}: {done.stderr[-2000:]}")

    def _environment(self) -> Mapping[str, str]:
        paths = (
            self.libraries,
            self.libraries / "ceph",
            _CEPH_ROOT / "usr/lib/ceph",
            _CEPH_ROOT / "lib" / self.libraries.name,
        )
        return {
            "PATH": f"{_CEPH_ROOT}/usr/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": ":".join(str(path) for path in paths),
            "PYTHONPATH": str(_CEPH_ROOT / "usr/lib/python3/dist-packages"),
            "CEPH_CONF": str(self.config),
        }


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _end_with_parent() -> None:
    """In a child: die with the test run, however that ends."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait_for(endpoint: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(endpoint, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def _run_moto() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server("moto", f"http://{host}:{port}", "testkey", "testsecret")
    finally:
        server.stop()
