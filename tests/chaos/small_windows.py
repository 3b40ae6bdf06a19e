"""`raytune-ft` with windows so small that a few hundred kilobytes stream as terabytes would."""

import sys

import raytune_ft.data.index

import raytune_ft.data.prepare
import raytune_ft.data.windows
from raytune_ft.cli import main

if __name__ == "__main__":
    raytune_ft.data.prepare.SURVEY_BYTES = 0
    for module in (raytune_ft.data.windows, raytune_ft.data.index):
        if hasattr(module, "WINDOW_BYTES"):
            module.WINDOW_BYTES = 4096
    sys.exit(main())
