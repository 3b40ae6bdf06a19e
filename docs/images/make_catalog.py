"""The picture of a catalog's page: twelve adapters of several versions, as `catalog report` shows them.

Usage: .venv/bin/python docs/images/make_catalog.py

Needs tests/chromium/install.sh to have been run, or chromium installed. The adapters are made up and hold
no weights; their records and the page are real.
"""

import random
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

IMAGES = Path(__file__).parent
ROOT = IMAGES.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium.browser import run_chromium  # noqa: E402  after the tests' folder is on the path

from raytune_ft import __version__  # noqa: E402
from raytune_ft.catalog import AdapterRecord, BaseModelRef, FileEntry  # noqa: E402
from raytune_ft.catalog.listing import Histories, History  # noqa: E402
from raytune_ft.catalog_page import CatalogPage, write_catalog_page  # noqa: E402

WIDTH, HEIGHT = 1240, 980
LLAMA, QWEN = "s3://models/llama-3.1-8b", "s3://models/qwen3-4b"
ADAPTERS = (
    ("billing-replies", LLAMA, 5),
    ("clause-extraction", QWEN, 3),
    ("country-capital", QWEN, 1),
    ("invoice-fields", QWEN, 6),
    ("legal-summary", LLAMA, 4),
    ("log-triage", QWEN, 2),
    ("release-notes", LLAMA, 3),
    ("sentiment", QWEN, 7),
    ("sql-from-text", LLAMA, 8),
    ("support-intents", QWEN, 4),
    ("ticket-summary", LLAMA, 6),
    ("translation-de-en", LLAMA, 2),
)
OPENED = "invoice-fields"
NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)


def made_up_record(
    chance: random.Random, adapter: str, base: str, version: int, versions: int
) -> AdapterRecord:
    """A version that scores a little better than the one before, mostly."""
    summary = "summary" in adapter or "notes" in adapter or "replies" in adapter
    before = {"rougeL": 0.19, "bleu": 6.1} if summary else {"exact_match": 0.12}
    reached = 0.62 + 0.3 * (1 - 0.7**version) + chance.uniform(-0.03, 0.03)
    after = {"rougeL": 0.55 * reached, "bleu": 31 * reached} if summary else {"exact_match": reached}
    created = NOW - timedelta(days=9 * (versions - version) + chance.uniform(0, 6))
    steps = 200 * chance.randint(3, 12)
    return AdapterRecord(
        adapter=adapter,
        base=BaseModelRef(path=base, digest=chance.randbytes(32).hex()),
        method={"kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": "all-linear"},
        job={"name": adapter},
        data={"fingerprint": chance.randbytes(32).hex()},
        seed=0,
        steps=steps,
        tokens=steps * 8192,
        learned_tokens=steps * 2048,
        loss=0.9 - 0.5 * reached,
        code_version=__version__,
        library_versions={"torch": "2.13.0"},
        machine={"system": "Linux"},
        scores_before=before,
        scores_after=after,
        parent=f"{adapter}@v{version - 1}" if version > 1 else None,
        version=version,
        publish_id=f"{adapter}-{version}",
        created_at=created.isoformat(timespec="milliseconds"),
        files=(
            FileEntry(name="README.md", sha256="a" * 64, size_bytes=1_190),
            FileEntry(name="adapter_config.json", sha256="b" * 64, size_bytes=812),
            FileEntry(
                name="adapter_model.safetensors",
                sha256="c" * 64,
                size_bytes=83_945_296 if base == LLAMA else 46_204_112,
            ),
        ),
    )


def made_up_page() -> CatalogPage:
    """Twelve adapters; the same each time."""
    chance = random.Random(7)  # noqa: S311  made-up figures
    histories = []
    for adapter, base, versions in ADAPTERS:
        records = [made_up_record(chance, adapter, base, at, versions) for at in range(versions, 0, -1)]
        aliases = (
            {"candidate": versions, "production": max(1, versions - 1)} if versions > 1 else {"candidate": 1}
        )
        histories.append(History(tuple(records), versions, aliases))
    found = Histories(tuple(histories), damaged=(), notes=())
    return CatalogPage("s3://adapters", found, NOW.isoformat(), f"raytune-ft {__version__}")


def main() -> None:
    """Write the page and photograph its top, with one adapter opened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.html"
        write_catalog_page(made_up_page(), path)
        with run_chromium(Path(folder)) as browser:
            browser.emulate(WIDTH, HEIGHT, scheme="light")
            browser.open(path.as_uri())
            browser.evaluate(f"document.getElementById('{OPENED}').querySelector('button').click()")
            (IMAGES / "catalog.png").write_bytes(browser.screenshot())


if __name__ == "__main__":
    main()
