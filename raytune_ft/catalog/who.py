"""Who changes a catalog, as far as this machine knows."""

import getpass
import socket

WHO_CHARACTERS = 200


def who() -> str:
    """User and machine in one line that no terminal obeys."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # A container may run under a number that no name belongs to.
        user = "unknown"
    # The environment may name the user, and hold anything.
    printable = filter(str.isprintable, f"{user}@{socket.gethostname()}")
    return "".join(printable)[:WHO_CHARACTERS]
