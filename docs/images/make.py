"""The README's pictures, from a real run of the demo: its terminal as SVG, its report as PNG.

Usage: .venv/bin/python docs/images/make.py

Takes as long as `make demo`. Needs tests/chromium/install.sh to have been run, or chromium installed. DEMO
names the folder that the demo works in, which the pictures show; /tmp/ft-demo where it is not set.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent
ROOT = IMAGES.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium.browser import run_chromium  # noqa: E402  after the tests' folder is on the path

COLUMNS, ROWS = 112, 50
WIDTH, HEIGHT = 1120, 1205
FIRST_SHOWN = "3 of 5"
"""The demo's headline from which its terminal is shown: what comes before looks much the same."""
_CONTROL = re.compile(
    r"\x1b\[(?P<count>\d*)(?P<letter>[AK])|\x1b\[\?25[hl]|\r|\n|(?P<text>(?:\x1b\[[\d;]*m|[^\x1b\r\n])+)"
)


def run_in_terminal(command: list[str], environment: dict[str, str]) -> str:
    """All that a command writes to a terminal, control sequences included."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(  # noqa: S603  the demo's own script
        command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environment, cwd=ROOT
    )
    os.close(terminal)
    written = b""
    try:
        while part := os.read(controller, 1 << 16):
            written += part
    except OSError:  # The other end is closed: Linux says it so.
        pass
    os.close(controller)
    if process.wait():
        raise SystemExit(written.decode(errors="replace"))
    return written.decode()


def final_lines(written: str) -> list[str]:
    """The lines that stay, with their colours.

    Understands what a transient progress bar does: back to the line's beginning, up, erase the line.
    """
    lines = [""]
    at = 0
    for found in _CONTROL.finditer(written):
        if found["text"]:
            lines[at] += found["text"]
        elif found[0] == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif found["letter"] == "A":
            at = max(0, at - int(found["count"] or 1))
        elif found["letter"] == "K":
            lines[at] = ""
    return lines


def draw_terminal(lines: list[str], path: Path) -> None:
    """Lines as the picture of a terminal."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="make demo")
    # An image in a page may load nothing; a reader's own fixed-width font serves.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def photograph(page: Path, path: Path) -> None:
    """The top of a page as chromium shows it."""
    with tempfile.TemporaryDirectory() as folder, run_chromium(Path(folder)) as browser:
        browser.emulate(WIDTH, HEIGHT, scheme="light")
        browser.open(page.as_uri())
        path.write_bytes(browser.screenshot())


def main() -> None:
    """Run the demo and draw both pictures."""
    demo = Path(os.environ.get("DEMO", "/tmp/ft-demo"))  # noqa: S108  a path that is short in the picture
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "NO_COLOR")}
    environment |= {"DEMO": str(demo), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    written = run_in_terminal(["jobs/demo/run.sh", str(Path(sys.executable).parent)], environment)
    lines = final_lines(written)
    first = next(at for at, line in enumerate(lines) if FIRST_SHOWN in line)
    draw_terminal(lines[first:], IMAGES / "train.svg")
    photograph(demo / "runs" / "fleet" / "report.html", IMAGES / "report.png")


if __name__ == "__main__":
    main()
