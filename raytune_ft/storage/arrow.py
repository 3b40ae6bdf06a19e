"""Local folders as Ray Train sees them."""

import io
from pathlib import Path
from typing import Any

import pyarrow.fs

from raytune_ft.storage.folder import FolderStorage


class WholeFiles(pyarrow.fs.LocalFileSystem):  # type: ignore[misc]  # pyarrow ships no types
    """The local file system, but a file that is written appears whole or not at all.

    Ray Train writes its list of checkpoints anew after each of them, and a list that is cut off names none.
    A subclass, since Ray reads checkpoints in their place only where it knows the file system as local.
    """

    def open_output_stream(self, path: str, *_: Any, **__: Any) -> io.BytesIO:
        """A stream whose content takes the file's place when it is closed.

        Raises:
            StorageError: the disk fails or is full; raised when the stream is closed.
        """
        return _WholeFile(Path(path))

    def __reduce__(self) -> tuple[type["WholeFiles"], tuple[()]]:
        return WholeFiles, ()


class _WholeFile(io.BytesIO):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __exit__(self, kind: Any, *details: Any) -> None:
        if kind is not None:
            super().close()
        super().__exit__(kind, *details)

    def close(self) -> None:
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        FolderStorage(self._path.parent).write(self._path.name, content)

    def __del__(self) -> None:
        # Closing would write what nobody has closed.
        super().close()
