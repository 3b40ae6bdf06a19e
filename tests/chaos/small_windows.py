"""`raytune-ft` with windows so small that a few hundred kilobytes stream as terabytes would."""

import sys

import raytune_ft.data.index
import raytune_ft.data.stream
import raytune_ft.data.survey
from raytune_ft.cli import main

WINDOW_BYTES = 4096

if __name__ == "__main__":
    raytune_ft.data.survey.SURVEY_BYTES = 0
    raytune_ft.data.survey.SAMPLE_BYTES = 4 * WINDOW_BYTES
    raytune_ft.data.index.WINDOW_BYTES = WINDOW_BYTES
    raytune_ft.data.stream.WINDOW_BYTES = WINDOW_BYTES
    sys.exit(main())
