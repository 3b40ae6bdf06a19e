"""Tokenised windows that outlive the run: objects of a store, named by all that decides on their content."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import decode
from raytune_ft.data.sources import DataObject
from raytune_ft.data.windows import Window
from raytune_ft.errors import StorageDenied, StorageFull
from raytune_ft.spec import DataSpec
from raytune_ft.storage import Storage

CACHE_VERSION = 4
"""Of the file, and of the rules by which records become tokens: what another version wrote is not read."""

_unwritable = set[str]()
"""Stores that refused a write in this process."""


class TokenCache:
    """Contents of windows, as `raytune_ft.data.examples.encode` gives them.

    An object's content follows from its key, so it does not matter who writes it, or how often.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def get(self, key: str) -> bytes | None:
        """The content, or None where there is none that is whole.

        Raises:
            StorageError: the store failed.
        """
        try:
            content = self._storage.read_or_none(key)
        except StorageDenied:
            # A store that may not be listed answers so for what is not there.
            return None
        if content is not None:
            try:
                decode(content)
            except ValueError:
                return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep a content. Where the store takes none, the run goes on without.

        Raises:
            StorageError: the store failed.
        """
        if self._storage.uri in _unwritable:
            return
        try:
            self._storage.write(key, content)
        except (StorageDenied, StorageFull):
            _unwritable.add(self._storage.uri)


def cache_key(
    found: DataObject, window: Window, data: DataSpec, encoder: Encoder, labels: Sequence[str] = ()
) -> str | None:
    """Key of a window's content, or None where the tokenizer cannot be named."""
    if encoder.digest is None:
        return None
    source = data.sources[found.source]
    decides: dict[str, Any] = {
        "version": CACHE_VERSION,
        "object": [found.uri, found.size_bytes, found.etag],
        "window": [window.unit, window.start, window.stop, window.format, window.context],
        "encoder": encoder.digest,
        "template": source.template,
        "fields": source.fields.model_dump(mode="json"),
        "ignore": sorted(source.ignore),
        "on_lost": source.on_lost,
        "turns": data.turns,
        "thoughts": data.thoughts,
        "max_tokens": data.max_tokens,
        "too_long": data.too_long,
        "split": data.split.model_dump(mode="json"),
        **({"labels": sorted(labels)} if labels else {}),
    }
    return f"tokens/{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()}.arrow"
