"""What each worker gets of a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.errors import BadInput
from raytune_ft.spec import ClusterSpec
from raytune_ft.train.placement import place

nodes = st.lists(st.floats(1, 96).map(lambda cpus: {"CPU": cpus}), min_size=1, max_size=6)


@given(nodes, st.integers(1, 12))
def test_workers_leave_room_for_reading(nodes: list[dict[str, float]], workers: int) -> None:
    placement = place(ClusterSpec(workers=workers), nodes)
    largest = sorted((node["CPU"] for node in nodes), reverse=True)[:workers]
    assert placement.workers_per_node * len(largest) >= workers
    # All workers fit, and a node still has room for a task beside them.
    assert placement.cpus * placement.workers_per_node < largest[-1]
    assert placement.threads >= 1
    assert placement.threads * placement.workers_per_node <= max(largest[-1], placement.workers_per_node)


def test_one_worker_computes_with_all_cores_of_the_largest_node() -> None:
    placement = place(ClusterSpec(), [{"CPU": 2.0}, {"CPU": 16.0}, {"memory": 1.0}])
    assert (placement.threads, placement.cpus, placement.use_gpu) == (16, 15.0, False)


def test_gpus() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 32.0, "GPU": 2.0}]
    placement = place(ClusterSpec(workers=2), nodes)
    assert placement.resources == {"CPU": 1.0, "GPU": 1.0}
    with pytest.raises(BadInput, match=r"cluster\.workers = 3: the cluster has 2 GPUs; use as many"):
        place(ClusterSpec(workers=3), nodes)
    assert not place(ClusterSpec(device="cpu"), nodes).use_gpu


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="the cluster has no GPU; add a GPU node"):
        place(ClusterSpec(device="gpu"), [{"CPU": 8.0}])
