"""Chromium without a window, driven through a pipe by its own protocol: no port, no driver, no library."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

_ROOT = Path(__file__).parents[2] / ".cache" / "chromium" / "root"
_REASON = _ROOT.parent / "unavailable"
_TIMEOUT_S = 60.0
_READY = "document.readyState === 'complete'"
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_FONTS = """<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
<dir>{root}/usr/share/fonts</dir><dir>/usr/share/fonts</dir><cachedir>{cache}</cachedir>
<alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
<match><test name="family"><string>system-ui</string></test>
<edit name="family" mode="assign" binding="strong"><string>DejaVu Sans</string></edit></match>
<match><edit name="family" mode="append_last"><string>DejaVu Sans</string></edit></match>
</fontconfig>
"""


class ChromiumUnavailable(Exception):
    """No Chromium is here; the message says why."""


class Browser:
    """One page, and all that it asked for and complained about."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._unread = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []
        """Addresses, in order; that of the page itself is among them."""
        self.complaints: list[str] = []
        """What the console shows: errors, warnings, refusals of the security policy, dialogs."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def emulate(self, width: int, height: int, *, scheme: Literal["light", "dark"]) -> None:
        """Set the size of the window in CSS pixels, and the colours that its user likes."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def allow_scripts(self, allowed: bool) -> None:
        """Whether the pages that are opened from now on may run their scripts."""
        self._call("Emulation.setScriptExecutionDisabled", value=not allowed)

    def open(self, uri: str) -> None:
        """Go to a page and wait until it is there."""
        # The same address with another fragment would be no new page.
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=uri)
        while not self.evaluate(f"location.href !== 'about:blank' && {_READY}"):
            pass

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression, once its promises are kept; plain JSON."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key that writes `key`, such as `\\r` for Enter, whose Windows code is 13."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, text=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Write where the focus is."""
        self._call("Input.insertText", text=text)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._commands, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise ChromiumUnavailable("chromium does not start") from None
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], _TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"chromium says nothing for {_TIMEOUT_S:g} s")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise ChromiumUnavailable("chromium ended")
            self._unread += part
        first, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(first))

    def _note(self, event: dict[str, Any]) -> None:
        what = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(what["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(what["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(str([argument.get("value") for argument in what["args"]]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(what["exceptionDetails"]))
            case "Page.javascriptDialogOpening":
                self.complaints.append(f"dialog: {what['message']}")


@contextmanager
def run_chromium(folder: Path) -> Iterator[Browser]:
    """Start Chromium with its profile in a folder, and end it.

    Raises:
        ChromiumUnavailable: there is none, or it does not start.
    """
    program, libraries = _find()
    fonts = folder / "fonts.conf"
    fonts.write_text(_FONTS.format(root=_ROOT, cache=folder / "fonts"))
    environment = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "FONTCONFIG_FILE": str(fonts),
    }
    their_commands, commands = os.pipe()
    answers, their_answers = os.pipe()
    # The pipe's ends are 3 and 4 over there, whatever they are here.
    script = f'exec "$0" "$@" 3<&{their_commands} 4>&{their_answers}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", script, program, *_OPTIONS, f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(their_commands, their_answers),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_commands)
    os.close(their_answers)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _find() -> tuple[str, list[Path]]:
    """The program, and where its libraries are if they are not the system's."""
    unpacked = _ROOT / "usr" / "lib" / "chromium" / "chromium"
    if (_ROOT.parent / "complete").exists():
        folders = {path.parent for path in (_ROOT / "usr" / "lib").glob("*-linux-gnu*/**/*.so*")}
        return str(unpacked), sorted(folders)
    installed = shutil.which("chromium")
    if installed:
        return installed, []
    why = _REASON.read_text().strip() if _REASON.exists() else "tests/chromium/install.sh was not run"
    raise ChromiumUnavailable(f"no Chromium: {why}")
