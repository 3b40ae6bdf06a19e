"""What only a CUDA device can show. Run with `pytest -m gpu` on a machine that has one."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from raytune_ft.methods import METHODS
from raytune_ft.models import load_base
from raytune_ft.planner import memory_plan, read_job_free_facts
