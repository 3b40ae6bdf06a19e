"""Which jobs share a lane, and whether the lane's memory holds them."""

import random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raytune_ft.errors import ModelError
from raytune_ft.fleet.placement import base_of, place, shares_batch
from raytune_ft.fleet.work import CPU_FLOPS, LaneSpeed, Work, estimate, speed_of
from raytune_ft.planner import (
    Lane,
    ModelFacts,
    choose_lane,
    lane_memory,
    memory_plan,
    usable_bytes,
)
from raytune_ft.spec import JobSpec, ModelSpec, parse_job

GIB = 2**30
LLAMA_1B = ModelFacts(
    parameters=1_236_000_000,
    hidden=2048,
    attention=2048,
    layers=16,
    intermediate=8192,
    vocabulary=128_256,
    tied=True,
    max_positions=8192,
)
BENCHMARK = ModelFacts(
    parameters=63_500_000,
    hidden=512,
    attention=512,
    layers=12,
    intermediate=1376,
    vocabulary=50_257,
    tied=True,
    max_positions=1024,
)


def job(name: str = "a", **changes: Any) -> JobSpec:
    return parse_job(
        {
            "name": name,
            "model": {"path": "org/base"},
            "data": {"sources": [{"uri": "s3://d/a.jsonl"}]},
            "publish": {"catalog": "s3://c"},
            **changes,
        }
    )


@st.composite
def fleets(draw: st.DrawFn) -> list[JobSpec]:
    count = draw(st.integers(1, 12))
    return [
        job(
            f"job-{n}",
            method={
                "rank": draw(st.sampled_from([1, 8, 64, 512])),
                "dropout": draw(st.sampled_from([0.0, 0.1])),
            },
            optimizer={"kind": draw(st.sampled_from(["adamw", "adamw_8bit"]))},
            data={
                "sources": [{"uri": "s3://d/a.jsonl"}],
                "max_tokens": draw(st.sampled_from([16, 128, 512, 2048])),
            },
        )
        for n in range(count)
    ]


class TestBases:
    @pytest.mark.parametrize(
        "changes",
        [
            {"model": {"path": "org/other"}},
            {"model": {"path": "org/base", "weight_bits": 16}},
            {"model": {"path": "org/base", "resident": "packed"}},
            {"model": {"path": "org/base", "gradient_checkpointing": True}},
            {"cluster": {"device": "cpu"}},
        ],
    )
    def test_what_a_lane_cannot_hold_for_both(self, changes: dict[str, Any]) -> None:
        assert base_of(job()) != base_of(job(**changes))

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "b"},
            {"method": {"rank": 64, "dropout": 0.1}},
            {"optimizer": {"kind": "adamw_8bit"}},
            {"schedule": {"steps": 3}},
            {"batch": {"sequences": 1}},
            {"publish": {"catalog": "s3://other"}},
        ],
    )
    def test_what_each_job_has_for_itself(self, changes: dict[str, Any]) -> None:
        assert base_of(job()) == base_of(job(**changes))

    def test_who_shares_a_batch(self) -> None:
        assert shares_batch(job())
        assert not shares_batch(job(model={"path": "org/bert", "labels": ["yes", "no"]}))


class TestMemory:
    @given(st.sampled_from([1, 64]), st.sampled_from([32, 2048]), st.sampled_from(["packed", "dequantised"]))
    def test_one_job_on_a_lane_is_a_job(self, rank: int, max_tokens: int, resident: str) -> None:
        alone = job(method={"rank": rank}, data={"sources": [{"uri": "a"}], "max_tokens": max_tokens})
        plan = memory_plan(LLAMA_1B, alone, resident=resident, tokens_per_forward=max_tokens)
        assert lane_memory(LLAMA_1B, [alone], resident) == plan

    def test_the_base_stands_there_once(self) -> None:
        one, eight = (lane_memory(LLAMA_1B, [job()] * count, "packed") for count in (1, 8))
        adapter = one.gradients
        assert eight.weights - one.weights == 7 * adapter
        assert (eight.gradients, eight.optimizer) == (8 * one.gradients, 8 * one.optimizer)
        assert eight.activations == 8 * one.activations

    @given(fleets(), st.integers(1, 12), st.floats(0.5, 60))
    @settings(max_examples=50)
    def test_whatever_meets_on_a_lane_fits(self, jobs: list[JobSpec], most: int, gib: float) -> None:
        device_bytes = int(gib * GIB)
        try:
            lane = choose_lane(LLAMA_1B, jobs, device_bytes, most)
        except ModelError:
            worst = max(lane_memory(LLAMA_1B, [one], "packed").total for one in jobs)
            assert worst > usable_bytes(device_bytes)
            return
        assert 1 <= lane.slots <= min(most, len(jobs))
        for seed in range(5):
            met = random.Random(seed).sample(jobs, lane.slots)
            assert lane_memory(LLAMA_1B, met, lane.resident).total <= lane.memory.total
            # Whoever has the tokens of a pass.
            plan = lane_memory(LLAMA_1B, met, lane.resident)
            token_bytes = max(
                lane_memory(LLAMA_1B, [one], lane.resident).activations // one.data.max_tokens for one in met
            )
            filled = plan.total - plan.activations + token_bytes * sum(lane.row_tokens)
            assert filled <= lane.memory.total
            assert lane.slots == 1 or lane.memory.total <= usable_bytes(device_bytes)

    @given(fleets(), st.floats(3, 60), st.floats(1, 3))
    @settings(max_examples=50)
    def test_more_memory_never_gives_fewer_slots(
        self, jobs: list[JobSpec], gib: float, factor: float
    ) -> None:
        try:
            small = choose_lane(LLAMA_1B, jobs, int(gib * GIB), 12)
        except ModelError:
            assume(False)
        assert choose_lane(LLAMA_1B, jobs, int(factor * gib * GIB), 12).slots >= small.slots

    def test_a_pass_holds_a_row_of_each_job_and_not_the_longest_of_each(self) -> None:
        jobs = [job(f"{n}", data={"sources": [{"uri": "a"}], "max_tokens": 512}) for n in range(7)]
        jobs.append(job("long", data={"sources": [{"uri": "a"}], "max_tokens": 4096}))
        lane = choose_lane(LLAMA_1B, jobs, None, 4)
        assert lane.row_tokens == (4096, 512, 512, 512)
        (row,) = {lane_memory(LLAMA_1B, [one], "packed").activations for one in jobs[:7]}
        assert lane.memory.activations == 11 * row

    def test_a_job_has_as_many_rows_in_a_pass_as_it_asks_for(self) -> None:
        one = job(batch={"sequences": 8})
        four = job(batch={"sequences": 8, "sequences_per_worker": 4})
        activations = lane_memory(LLAMA_1B, [one], "packed").activations
        assert lane_memory(LLAMA_1B, [four], "packed").activations == 4 * activations
        assert lane_memory(LLAMA_1B, [one, four], "packed").activations == 5 * activations
        assert choose_lane(LLAMA_1B, [one, four], None, 2).row_tokens == (2048, 512)

    def test_a_base_is_dequantised_where_that_costs_no_slot(self) -> None:
        jobs = [job(f"{n}") for n in range(4)]
        lanes = [choose_lane(LLAMA_1B, jobs, gib * GIB, 4) for gib in (12, 48)]
        assert [(lane.resident, lane.slots) for lane in lanes] == [("packed", 4), ("dequantised", 4)]

    def test_a_job_that_fits_no_lane(self) -> None:
        with pytest.raises(ModelError, match=r"org/base needs .* GiB to train on one row of 512 tokens"):
            choose_lane(LLAMA_1B, [job(), job("b")], GIB, 2)

    def test_without_a_device_nothing_limits_the_slots(self) -> None:
        lane = choose_lane(LLAMA_1B, [job()] * 9, None, 8)
        assert lane == Lane("packed", 8, lane_memory(LLAMA_1B, [job()] * 8, "packed"), (512,) * 8)


class TestWork:
    def test_epochs_of_the_bytes_that_are_trained_on(self) -> None:
        found = estimate(
            job(
                data={
                    "sources": [{"uri": "a"}, {"uri": "b", "weight": 0.5}],
                    "split": {"validation": 0.1, "test": 0.15},
                },
                schedule={"epochs": 2},
                batch={"sequences": 8},
            ),
            [400_000, 800_000],
        )
        assert found == Work(steps=293, tokens=300_000)

    def test_steps_of_whole_batches(self) -> None:
        short = {"sources": [{"uri": "a"}], "max_tokens": 50}
        found = estimate(job(data=short, schedule={"steps": 10}, batch={"sequences": 4}), [7])
        assert found == Work(steps=10, tokens=2000)

    def test_no_data_is_a_step_all_the_same(self) -> None:
        assert estimate(job(), [0]).steps == 1


class TestSpeed:
    MEASURED = ((1, 25.8, 73 / 800), (1, 103.1, 28 / 200), (8, 206.2, 38 / 100), (8, 824.9, 25 / 25))
    """Jobs, tokens of a round, its seconds: a 61M Llama in NF4 on two cores, eight tasks of 200 examples."""

    @pytest.mark.parametrize(("jobs", "tokens", "seconds"), MEASURED)
    def test_rounds_take_what_was_measured(self, jobs: int, tokens: float, seconds: float) -> None:
        speed = speed_of(BENCHMARK, ModelSpec(path="b"), CPU_FLOPS)
        assert speed.seconds(jobs, tokens) == pytest.approx(seconds, rel=0.15)

    def test_sharing_gains_most_with_small_steps(self) -> None:
        speed = speed_of(BENCHMARK, ModelSpec(path="b"), CPU_FLOPS)
        gains = [8 * speed.seconds(1, tokens) / speed.seconds(8, 8 * tokens) for tokens in (26, 103)]
        assert gains == pytest.approx([1.54, 1.23], abs=0.05)

    @given(st.floats(0.01, 1), st.floats(0.001, 1), st.floats(1e-6, 1e-2), st.floats(1, 1e4))
    def test_another_slot_than_the_useful_ones_gains_little(
        self, round_s: float, job_s: float, token_s: float, tokens: float
    ) -> None:
        speed = LaneSpeed(round_s, job_s, token_s)
        slots = speed.useful_slots(tokens)

        def shared(count: int) -> float:
            return round_s / speed.seconds(count, count * tokens)

        assert shared(slots) <= 0.05 + 1e-6
        assert slots == 1 or shared(slots - 1) > 0.05 - 1e-6

    def test_recomputing_costs_half_as_much_again(self) -> None:
        plain, again = (
            speed_of(LLAMA_1B, ModelSpec(path="b", gradient_checkpointing=on), 1e12).token_s
            for on in (False, True)
        )
        assert again == pytest.approx(1.5 * plain)


def placed(jobs: list[JobSpec], **changes: Any) -> Any:
    """Groups of jobs whose length follows from their rank."""
    worked = [
        (one, Work(steps=one.method.rank, tokens=1000 * one.method.rank))  # type: ignore[union-attr]
        for one in jobs
    ]
    facts = {"org/base": LLAMA_1B, "org/other": BENCHMARK}
    return place(worked, facts, **{"device_bytes": None, "slots": "auto", "flops_per_s": 1e13, **changes})


class TestPlacement:
    @given(fleets(), fleets(), st.randoms())
    @settings(max_examples=50)
    def test_every_job_stands_in_one_group_and_the_longest_first(
        self, jobs: list[JobSpec], others: list[JobSpec], shuffle: Any
    ) -> None:
        moved = [
            one.model_copy(update={"name": f"o-{one.name}", "model": ModelSpec(path="org/other")})
            for one in others
        ]
        groups = placed([*jobs, *moved])
        names = [one.spec.name for group in groups for one in group.jobs]
        assert sorted(names) == sorted(one.name for one in [*jobs, *moved])
        for group in groups:
            assert {base_of(one.spec) for one in group.jobs} == {group.base}
            lengths = [one.queued.seconds for one in group.jobs]
            assert lengths == sorted(lengths, reverse=True)
            assert all(one.queued.base == group.base for one in group.jobs)
        mixed = [*jobs, *moved]
        shuffle.shuffle(mixed)
        assert placed(mixed) == groups

    def test_slots_that_are_asked_for(self) -> None:
        jobs = [job(f"{n}") for n in range(40)]
        assert placed(jobs, slots=16)[0].lane.slots == 16
        assert placed(jobs, slots=64)[0].lane.slots == 40
        (group,) = placed(jobs, slots="auto", device_bytes=80 * GIB)
        assert group.lane.slots == group.speed.useful_slots(1000)
        with pytest.raises(ModelError) as caught:
            placed(jobs, slots=32, device_bytes=8 * GIB)
        held = choose_lane(LLAMA_1B, jobs, 8 * GIB, 32).slots
        assert 1 < held < 32
        assert str(caught.value) == (
            f"lanes.slots = 32: of org/base the device holds {held} jobs at a time in the 6.80 GiB that it "
            f"can give; set {held} or auto"
        )

    def test_classifiers_take_turns(self) -> None:
        model = {"path": "org/base", "labels": ["yes", "no"]}
        (group,) = placed([job(f"{n}", model=model) for n in range(5)], slots=4)
        assert group.lane.slots == 1
        assert not any(one.queued.shares_batch for one in group.jobs)
