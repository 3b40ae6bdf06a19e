"""The catalog's side of its benchmark: fill a catalog, or time what is done with one."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from catalog_inputs import (
    ALIAS,
    BY_ALIAS,
    EXACT,
    LATEST,
    LIST,
    PUBLISH,
    Operation,
    adapter_name,
    carry_out,
    count_requests,
    parser,
    peak_bytes,
    show,
    some_adapters,
    write_files,
)

from raytune_ft.catalog import Catalog, list_catalog
from raytune_ft.catalog.layout import NEWEST_SNAPSHOT
from raytune_ft.storage import open_storage

# The tests' neighbours of this script are no package.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from faultproxy import FaultProxy
from stores import WrappedStorage, draft

_PROCESSES = 4
COLD = f"{LIST}, no snapshot"


def fill(uri: str, files: Path, start: int, adapters: int) -> None:
    """Publish one version of each adapter, with an alias; all share their files."""
    paths = write_files(files / "first", 0)
    publish = partial(_publish_first, uri, paths)
    with ProcessPoolExecutor(_PROCESSES, mp_context=multiprocessing.get_context("spawn")) as processes:
        for _ in processes.map(publish, range(start, adapters), chunksize=50):
            pass


def _publish_first(uri: str, paths: Mapping[str, Path], number: int) -> None:
    adapter, catalog = adapter_name(number), Catalog.at(uri)
    record = catalog.publish(draft(adapter=adapter), paths, publish_id=f"first-{number}")
    catalog.set_alias(adapter, ALIAS, record.version)


def operations(catalog: Catalog, files: Path, adapters: int, repeats: int) -> list[Operation]:
    """What is timed."""
    names = some_adapters(adapters, repeats + 1)
    versions = [write_files(files / f"new-{number}", 1 + number) for number in range(repeats + 1)]

    def publish(number: int) -> None:
        told = draft(adapter=names[number])
        record = catalog.publish(told, versions[number], publish_id=uuid4().hex)
        catalog.set_alias(names[number], ALIAS, record.version)

    def forget() -> None:
        catalog.storage.delete(NEWEST_SNAPSHOT)

    return [
        Operation(LATEST, repeats, lambda number: catalog.resolve(names[number])),
        Operation(BY_ALIAS, repeats, lambda number: catalog.resolve(f"{names[number]}@{ALIAS}")),
        Operation(EXACT, repeats, lambda number: catalog.resolve(f"{names[number]}@v1")),
        Operation(COLD, 1, lambda _: list_catalog(catalog), before=forget),
        Operation(LIST, 3, lambda _: list_catalog(catalog)),
        Operation(PUBLISH, repeats, publish),
    ]


class _Counted:
    """Notes each call of a store."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, storage: Any) -> Any:
        counted = self

        class Counting(WrappedStorage):
            def __getattribute__(self, name: str) -> Any:
                if name in ("read", "read_or_none", "open", "list", "info", "write", "write_once", "delete"):
                    counted.calls += 1
                return super().__getattribute__(name)

        return Counting(storage)


@contextmanager
def counted(uri: str) -> Iterator[tuple[Catalog, Callable[[], int]]]:
    """The catalog behind something that counts: a proxy before a server, a wrapper around a folder."""
    if not uri.startswith("s3://"):
        calls = _Counted()
        yield Catalog(calls(open_storage(uri))), lambda: calls.calls
        return
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        yield Catalog.at(uri), lambda: len(proxy.requests)


def main() -> None:
    """Fill or operate."""
    arguments = parser(__doc__, "--catalog", "uri of the catalog").parse_args()
    if arguments.what == "fill":
        fill(arguments.catalog, arguments.files, arguments.start, arguments.adapters)
        return
    settings = arguments.files, arguments.adapters, arguments.repeats
    catalog = Catalog.at(arguments.catalog)
    catalog.resolve(adapter_name(0))  # Connects.
    seconds = carry_out(operations(catalog, *settings))
    memory_bytes = peak_bytes()
    with counted(arguments.catalog) as (behind, requests):
        show(seconds, count_requests(operations(behind, *settings), requests), memory_bytes)


if __name__ == "__main__":
    main()
