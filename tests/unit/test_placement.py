"""What each worker gets of a cluster."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raytune_ft.data.reader import task_cpus
from raytune_ft.errors import BadInput
from raytune_ft.spec import ClusterSpec
from raytune_ft.train.placement import place

nodes = st.lists(st.floats(1, 96).map(lambda cpus: {"CPU": cpus}), min_size=1, max_size=6)


@given(nodes, st.integers(1, 12))
def test_workers_leave_room_for_reading(nodes: list[dict[str, float]], workers: int) -> None:
    assume(workers <= 4 * sum(node["CPU"] for node in nodes))
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
    assert not place(ClusterSpec(device="cpu"), nodes).use_gpu


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (
            ClusterSpec(workers=3),
            "cluster.workers = 3: the cluster has 2 GPUs; use as many, or add nodes (--wait SECONDS waits "
            "for those of an autoscaler), or set cluster.elastic: [2, 3] instead, which takes up nodes as "
            "they come",
        ),
        (
            ClusterSpec(elastic=(3, 4)),
            "cluster.elastic = [3, 4]: the cluster has 2 GPUs, and the least is 3; set it to [2, 4], or add "
            "nodes (--wait SECONDS waits for those of an autoscaler)",
        ),
    ],
    ids=["workers", "elastic"],
)
def test_too_few_gpus(cluster: ClusterSpec, said: str) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    least = cluster.model_copy(update={"workers": cluster.least_workers})
    with pytest.raises(BadInput) as caught:
        place(least, nodes)
    assert str(caught.value) == said


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="the cluster has no GPU; add a GPU node"):
        place(ClusterSpec(device="gpu"), [{"CPU": 8.0}])


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (
            ClusterSpec(workers=100_000),
            "cluster.workers = 100000: the cluster has 2 CPUs, and 4 workers may share one; use 8 or fewer",
        ),
        (
            ClusterSpec(elastic=(9, 12)),
            "cluster.elastic = [9, 12]: the cluster has 2 CPUs, and 4 workers may share one; use 8 or fewer",
        ),
    ],
    ids=["workers", "elastic"],
)
def test_far_too_few_cpus(cluster: ClusterSpec, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        place(cluster.model_copy(update={"workers": cluster.most_workers}), [{"CPU": 1.0}, {"CPU": 1.0}])
    assert str(caught.value) == said


def test_the_most_that_share_a_cpu() -> None:
    assert place(ClusterSpec(workers=8), [{"CPU": 2.0}]).workers_per_node == 8
    elastic = ClusterSpec(elastic=(8, 12)).model_copy(update={"workers": 12})
    assert place(elastic, [{"CPU": 2.0}]).workers_per_node == 12
