"""The command line: `raytune-ft`."""

from raytune_ft.cli.main import main

__all__ = ["main"]
