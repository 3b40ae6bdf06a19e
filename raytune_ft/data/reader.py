"""Reads any window of a job's data, on any node. Knows nothing of Ray."""

from dataclasses import dataclass

from raytune_ft.data.access import store_at
from raytune_ft.data.cache import TokenCache, cache_key
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.examples import encode, tokenise_window
from raytune_ft.data.sources import DataObject
from raytune_ft.data.windows import Window
from raytune_ft.spec import DataSpec


@dataclass(frozen=True)
class WindowReader:
    """All that a task needs to turn windows into their tokenised contents. Travels to it."""

    objects: tuple[DataObject, ...]
    """Of the job."""
    data: DataSpec
    encoder: Encoder
    cache: str | None
    """Uri of the store that keeps contents; None where nothing is kept."""
    labels: tuple[str, ...] = ()
    """The classes that completions may name, see `ModelSpec.labels`."""
    notices: tuple[str, ...] = ()
    """What a person should know of how the objects were listed, see `listing_notices`."""

    def read(self, window: Window) -> bytes:
        """A window's content, see `raytune_ft.data.examples.decode`: from the cache, or made and kept there.

        Raises:
            DataError: the window cannot be read.
            StorageError: the store failed.
        """
        found = self.objects[window.object]
        key = None if self.cache is None else cache_key(found, window, self.data, self.encoder, self.labels)
        if self.cache is None or key is None:
            return encode(tokenise_window(found, window, self.data, self.encoder, self.labels))
        cache = TokenCache(store_at(self.cache))
        content = cache.get(key)
        if content is None:
            content = encode(tokenise_window(found, window, self.data, self.encoder, self.labels))
            cache.put(key, content)
        return content


def task_cpus(node_cpus: float) -> float:
    """What a task of the stream asks for on a node with so many CPUs: training has to leave as much free."""
    return 0.5 if node_cpus >= 2 else 0.25
