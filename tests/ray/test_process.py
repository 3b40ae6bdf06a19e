"""How the processes of a cluster that the command starts compute."""

import os
import re
import subprocess
import sys

import pytest
import torch
from pages import ROOT

pytestmark = pytest.mark.ray

# Ray Train trains in a thread of its process, too.
_FAULTS = """
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor

import ray
from raytune_ft.train.launch import ray_session


def faults():
    import torch
    from raytune_ft.train.process import keep_freed_memory

    keep_freed_memory(torch.device("cpu"))
    sizes = random.Random(0)
    keep, seen = [], []
    for _ in range(120):
        blocks = [torch.ones(sizes.choice((1 << 10, 1 << 16, 1 << 20, 5 << 19, 13 << 19))) for _ in range(12)]
        # What a step leaves behind for good must not stand in the way of the next one's blocks.
        keep.append(torch.ones(3))
        sizes.shuffle(blocks)
        while blocks:
            blocks.pop()
        seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return seen[-1] - seen[len(seen) // 2]


def in_a_thread():
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(faults).result()


with ray_session():
    print(os.environ.get("GLIBC_TUNABLES"), "faults", ray.get(ray.remote(in_a_thread).remote()))
"""
_PAGES = 60 * 12 * 8 * 2**20 // os.sysconf("SC_PAGE_SIZE")
"""Of all blocks in the second half of its rounds, about."""


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="tensors of a GPU are not in the memory that is looked at"
)
def test_a_worker_keeps_the_memory_that_a_step_frees() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", _FAULTS]
    ended = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    settings, faults = ended.stdout.rsplit("faults", 1)
    assert int(faults) < _PAGES // 100
    page = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    assert re.findall("export GLIBC_TUNABLES=(.*)", page) == [settings.split()[-1]]
