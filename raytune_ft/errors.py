"""The error tree. Every error is one message that names place, value, limit and remedy.

All of them pickle: each takes exactly the message and passes it on, so that an error raised in a Ray
worker reaches the driver as itself. `exit_code` is what the command line returns.
"""

from typing import ClassVar


class RaytuneError(Exception):
    """Base of every error that the project raises on purpose."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str) -> None:
        super().__init__(message)


class BadInput(RaytuneError):
    """The user's files or data are wrong. Never retried; nothing was spent."""

    exit_code = 2


class SpecError(BadInput):
    """A job file that cannot be read as one."""


class DataError(BadInput):
    """Training data that is missing, malformed, empty or changed under a run."""


class ModelError(BadInput):
    """A base model or tokenizer that is missing, unsafe or does not match the job."""


class CatalogError(BadInput):
    """A name, version or alias that the catalog does not hold, or may not hold."""


class TrainingError(RaytuneError):
    """Training could not go on."""

    exit_code = 3


class Diverged(TrainingError):
    """The loss or the gradient is not finite."""


class OutOfMemory(TrainingError):
    """The device's memory does not hold the step."""


class DeviceFailed(TrainingError):
    """The device does not go on, whoever computes on it. Another process may, or another device."""


class RunHeld(TrainingError):
    """Another driver is at work on the run."""


class GateRefused(RaytuneError):
    """A version was published, and its scores do not let its alias move."""

    exit_code = 5


class StorageError(RaytuneError):
    """The object store or disk failed, after the retries."""

    exit_code = 4


class StorageMissing(StorageError):
    """No such object, bucket or folder."""


class StorageChanged(StorageError):
    """The object is not the version that was asked for."""


class StorageDenied(StorageError):
    """The store refused the credentials."""


class StorageFull(StorageError):
    """No space is left."""
