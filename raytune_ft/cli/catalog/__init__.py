"""`raytune-ft catalog`: what a catalog holds, where it came from, and its files."""

# The order is that of the commands in --help.
from raytune_ft.cli.catalog import look, page, move, files, merge, copy, remove  # noqa: F401, I001  each registers its commands
from raytune_ft.cli.catalog.base import CatalogOption, app

__all__ = ["CatalogOption", "app"]
