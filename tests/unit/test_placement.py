"""What each worker gets of a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.reader import task_cpus
from raytune_ft.errors import BadInput
from raytune_ft.spec import ClusterSpec
from raytune_ft.train.placement import place

nodes = st.lists(st.floats(1, 96).map(lambda cpus: {"CPU": cpus}), min_size=1, max_size=6)


@given(nodes, st.integers(1, 12))
def test_workers_leave_room_for_reading(nodes: list[dict[str, float]], workers: int) -> None:
    placement = place(ClusterSpec(workers=workers), nodes)
    used = -(-workers // placement.workers_per_node)
    size = sorted((node["CPU"] for node in nodes), reverse=True)[used - 1]
    taken = placement.cpus * placement.workers_per_node
    # All workers fit, a node still has room for a task beside them, and no other run's worker has.
    assert size / 2 < taken <= size - task_cpus(size)
    assert placement.threads >= 1
    assert placement.threads * placement.workers_per_node <= max(size, placement.workers_per_node)


def test_one_worker_computes_with_all_cores_of_the_largest_node() -> None:
    placement = place(ClusterSpec(), [{"CPU": 2.0}, {"CPU": 16.0}, {"memory": 1.0}])
    assert (placement.threads, placement.cpus, placement.use_gpu) == (16, 14.0, False)


def test_a_head_without_cpus_trains_nothing() -> None:
    placement = place(ClusterSpec(workers=2), [{"CPU": 0.0}, {"CPU": 16.0}])
    assert (placement.threads, placement.cpus) == (8, 7.0)
    assert place(ClusterSpec(workers=4), [{"CPU": 16.0}, {"CPU": 16.0}, {"CPU": 1.0}]).threads == 8


def test_gpus() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 32.0, "GPU": 2.0}]
    placement = place(ClusterSpec(workers=2), nodes)
    assert placement.resources == {"CPU": 1.0, "GPU": 1.0}
    assert place(ClusterSpec(), [{"CPU": 8.0, "GPU": 8.0}]).resources == {"CPU": 0.5, "GPU": 1.0}
    with pytest.raises(BadInput, match=r"cluster\.workers = 3: the cluster has 2 GPUs; use as many"):
        place(ClusterSpec(workers=3), nodes)
    assert not place(ClusterSpec(device="cpu"), nodes).use_gpu


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="the cluster has no GPU; add a GPU node"):
        place(ClusterSpec(device="gpu"), [{"CPU": 8.0}])
