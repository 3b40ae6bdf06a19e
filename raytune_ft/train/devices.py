"""The cluster's GPUs, as a plan has to know them before any worker starts."""

import subprocess

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ft.train.launch import ray_session

_ANSWER_S = 60.0
_QUERY = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")


def smallest_gpu_bytes() -> int | None:
    """Memory of the smallest GPU of the cluster that `RAY_ADDRESS` names.

    Returns:
        None where it has no GPU, or one that does not say.

    Raises:
        SpecError: nobody answers at that address.
    """
    with ray_session():
        ask = ray.remote(num_cpus=0)(own_smallest_gpu_bytes)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        asked = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in nodes
        ]
        try:
            answers: list[int | None] = ray.get(asked, timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return None
    sizes = [size for size in answers if size is not None]
    return min(sizes) if sizes and len(sizes) == len(answers) else None


def own_smallest_gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU; None where it has none that says.

    The driver's own program is asked: from a task that reserves no GPU Ray hides them, and all may be in use.
    """
    try:
        said = subprocess.run(  # noqa: S603  a command of our own
            _QUERY, capture_output=True, text=True, timeout=_ANSWER_S / 2, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip() for line in said.stdout.splitlines()]
    return min(int(line) << 20 for line in lines) if lines and all(map(str.isdecimal, lines)) else None
