"""The fleet file: which jobs it makes, and exactly what it says about what is wrong."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.errors import SpecError
from raytune_ft.spec import (
    FleetSpec,
    FullSpec,
    JobSpec,
    LoraSpec,
    expand,
    parse_fleet,
    parse_job,
    read_fleet,
    read_job,
    read_job_or_fleet,
)
from raytune_ft.spec.expand import job_name, merged

DEFAULTS: dict[str, Any] = {
    "model": {"path": "org/base"},
    "data": {"sources": [{"uri": "s3://data/all.jsonl"}]},
    "publish": {"catalog": "s3://adapters"},
}


def fleet(**changes: Any) -> dict[str, Any]:
    """A fleet of two jobs."""
    values = {"name": "tasks", "defaults": DEFAULTS, "jobs": [{"name": "a"}, {"name": "b"}], **changes}
    return copy.deepcopy(values)


def complaint(values: Any, overrides: tuple[str, ...] = (), uris: tuple[str, ...] = ()) -> str:
    with pytest.raises(SpecError) as caught:
        expand(parse_fleet(values, overrides, place="f.yaml"), uris, place="f.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


class TestExpansion:
    def test_every_job_is_what_it_would_be_in_a_file_of_its_own(self) -> None:
        listed = [{"name": "a"}, {"name": "b", "method": {"rank": 4}, "data": {"max_tokens": 64}}]
        first, second = expand(parse_fleet(fleet(jobs=listed)))
        assert first == parse_job({**copy.deepcopy(DEFAULTS), "name": "a"})
        assert second == parse_job(
            {
                **copy.deepcopy(DEFAULTS),
                "name": "b",
                "method": {"rank": 4},
                "data": {**copy.deepcopy(DEFAULTS["data"]), "max_tokens": 64},
            }
        )

    def test_a_job_for_each_object(self) -> None:
        values = fleet(
            jobs=[{"name": "a"}],
            for_each={
                "glob": "s3://tasks/*.json",
                "name": "ni-{stem}",
                "job": {
                    "data": {"sources": [{"template": "instruction", "weight": 2}, {"uri": "s3://more/"}]}
                },
            },
        )
        uris = ("s3://tasks/task2_sum.json", "s3://tasks/task1_diff.json")
        jobs = expand(parse_fleet(values), uris)
        assert [job.name for job in jobs] == ["a", "ni-task1-diff", "ni-task2-sum"]
        assert [source.uri for source in jobs[1].data.sources] == [uris[1], "s3://more/"]
        assert (jobs[2].data.sources[0].template, jobs[2].data.sources[0].weight) == ("instruction", 2)
        assert jobs[0].data.sources[0].template == "auto"

    def test_for_each_alone_needs_no_source_of_its_own(self) -> None:
        defaults = {name: DEFAULTS[name] for name in ("model", "publish")}
        values = fleet(jobs=[], defaults=defaults, for_each={"glob": "s3://tasks/"})
        (job,) = expand(parse_fleet(values), ["s3://tasks/sum.jsonl"])
        assert (job.name, job.data.sources[0].uri) == ("sum", "s3://tasks/sum.jsonl")

    @given(st.sets(st.integers(0, 10**6), min_size=1, max_size=8), st.randoms())
    def test_the_order_of_a_listing_means_nothing(self, numbers: set[int], shuffle: Any) -> None:
        spec = parse_fleet(fleet(for_each={"glob": "s3://tasks/*.json"}))
        uris = [f"s3://tasks/{number}.json" for number in numbers]
        jobs = expand(spec, uris)
        shuffle.shuffle(uris)
        assert expand(spec, [*uris, uris[0]]) == jobs
        assert len({job.digest() for job in jobs}) == len(numbers) + 2

    def test_a_file_is_not_changed_by_reading_it(self) -> None:
        values = fleet(for_each={"glob": "s3://tasks/*.json", "job": {"data": {"sources": [{}]}}})
        before = copy.deepcopy(values)
        expand(parse_fleet(values), ["s3://tasks/1.json"])
        assert values == before

    def test_variables_and_folders_are_those_of_job_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BUCKET", "b")
        monkeypatch.chdir(tmp_path)
        values = fleet(
            jobs=[{"name": "a", "publish": {"catalog": "s3://${BUCKET}/c"}}],
            for_each={"glob": "tasks/*.json"},
        )
        spec = parse_fleet(values)
        assert spec.for_each is not None
        assert spec.for_each.glob == str(tmp_path / "tasks" / "*.json")
        assert expand(spec, ["/x.json"])[0].publish.catalog == "s3://b/c"

    def test_set_reaches_every_part(self) -> None:
        overrides = ["defaults.method.rank=8", "jobs.1.method.rank=4", "lanes.max=3", "lanes.slots=2"]
        spec = parse_fleet(fleet(), overrides)
        ranks = [job.method.rank for job in expand(spec) if isinstance(job.method, LoraSpec)]
        assert ranks == [8, 4]
        assert (spec.lanes.max, spec.lanes.slots) == (3, 2)

    def test_the_digest_is_that_of_the_resolved_job(self) -> None:
        first, second = expand(parse_fleet(fleet()))
        assert first.digest() == parse_job({**copy.deepcopy(DEFAULTS), "name": "a"}).digest()
        assert first.digest() != second.digest()
        (changed,) = expand(parse_fleet(fleet(jobs=[{"name": "a", "data": {"seed": 1}}])))
        assert changed.digest() != first.digest()


@pytest.mark.parametrize(
    ("pattern", "uri", "name"),
    [
        ("{stem}", "s3://tasks/Sum_Of (two).v2.json", "sum-of-two-v2"),
        ("{folder}-{stem}", "/data/en-de/train.jsonl", "en-de-train"),
        ("{stem}", "/data/README", "readme"),
        ("t-{folder}", "x.json", "t-"),
    ],
)
def test_names_from_objects(pattern: str, uri: str, name: str) -> None:
    assert job_name(pattern, uri) == name


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
values = st.recursive(
    plain | st.lists(plain, max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
parts = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


class TestMerging:
    @given(parts, parts)
    @settings(max_examples=50)
    def test_what_is_above_is_said_and_what_is_below_stays(
        self, below: dict[str, Any], above: dict[str, Any]
    ) -> None:
        untouched = copy.deepcopy((below, above))
        found = merged(below, above)
        assert (below, above) == untouched
        assert leaves(above) <= leaves(found) | sections(above)
        for key, value in below.items():
            if key not in above:
                assert found[key] == value
        assert found.keys() == below.keys() | above.keys()

    @given(parts)
    @settings(max_examples=50)
    def test_nothing_and_itself_change_nothing(self, part: dict[str, Any]) -> None:
        assert merged(part, {}) == merged({}, part) == merged(part, part) == part

    @given(parts, parts, parts)
    @settings(max_examples=50)
    def test_parts_can_be_merged_from_either_end(
        self, first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]
    ) -> None:
        # But where the second has a value that both others have a section for: it ends the first's.
        if not any(clash(first, second, third)):
            assert merged(merged(first, second), third) == merged(first, merged(second, third))

    def test_a_method_of_another_kind_is_another_method(self) -> None:
        below = {"method": {"rank": 64, "dropout": 0.1}}
        assert merged(below, {"method": {"kind": "full"}}) == {"method": {"kind": "full"}}
        assert merged(below, {"method": {"kind": "lora", "rank": 2}})["method"] == {
            "kind": "lora",
            "rank": 2,
            "dropout": 0.1,
        }
        assert merged({"method": {"kind": "full"}}, {"method": {"kind": "lora", "rank": 2}})["method"] == {
            "kind": "lora",
            "rank": 2,
        }

    def test_steps_and_epochs_replace_each_other(self) -> None:
        below = {"schedule": {"epochs": 3, "warmup": 0.1}}
        assert merged(below, {"schedule": {"steps": 7}}) == {"schedule": {"steps": 7, "warmup": 0.1}}
        assert merged(below, {"schedule": {"warmup": 0.2}}) == {"schedule": {"epochs": 3, "warmup": 0.2}}
        (job,) = expand(
            parse_fleet(
                fleet(
                    defaults={**DEFAULTS, "schedule": {"steps": 5}},
                    jobs=[{"name": "a", "schedule": {"epochs": 2}}],
                )
            )
        )
        assert (job.schedule.epochs, job.schedule.steps) == (2, None)


def leaves(part: Any, path: str = "") -> set[tuple[str, str]]:
    if isinstance(part, dict) and part:
        return {leaf for key, value in part.items() for leaf in leaves(value, f"{path}.{key}")}
    return {(path, repr(part))}


def sections(part: Any, path: str = "") -> set[tuple[str, str]]:
    """Empty sections: they say nothing, so they need not be found again."""
    if isinstance(part, dict):
        inner = {leaf for key, value in part.items() for leaf in sections(value, f"{path}.{key}")}
        return inner or ({(path, "{}")} if not part else set())
    return set()


def clash(first: Any, second: Any, third: Any) -> Any:
    for key in first.keys() & second.keys() & third.keys():
        ends = [isinstance(part[key], dict) for part in (first, second, third)]
        if ends == [True, False, True]:
            yield key
        elif all(ends):
            yield from clash(first[key], second[key], third[key])


JOB_PROBLEMS = [
    (["jobs.1.method.rank=-1"], "jobs[1] (b): method.rank = -1: must be greater than 0"),
    (["jobs.0.method.ranks=8"], "jobs[0] (a): method.ranks: no such field; did you mean method.rank?"),
    (["defaults.model.weight_bits=5"], "every job: model.weight_bits = 5: must be 4, 8, 16 or 32"),
    (["defaults.modle={}"], "every job: modle: no such field; did you mean model?"),
    (
        ["jobs.0.name=A b"],
        "jobs[0] (A b): name = 'A b': must be 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter "
        "or digit",
    ),
    (["jobs.1={}"], "jobs[1]: name: required, but not given"),
    (["jobs.1.name=a"], "jobs[0] (a), jobs[1] (a): have one name, a; give each its own"),
    (
        ["jobs.1.publish.adapter=a"],
        "jobs[0] (a), jobs[1] (b): publish the same adapter, a in s3://adapters; give each its own "
        "publish.adapter, or leave it out",
    ),
    (
        ["jobs.0.cluster.workers=4"],
        "jobs[0] (a): cluster.workers = 4: a job of a fleet has one worker, its lane's; remove it, or train "
        "it by itself with raytune-ft train",
    ),
    (
        ["jobs.0.cluster.elastic=[1, 4]"],
        "jobs[0] (a): cluster.elastic = [1, 4]: a job of a fleet has one worker, its lane's; remove it, or "
        "train it by itself with raytune-ft train",
    ),
    (
        ["defaults.cluster.zero_stage=2"],
        "every job: cluster.zero_stage = 2: a lane divides nothing; set it to 0, or train it by itself with "
        "raytune-ft train",
    ),
    (
        ["defaults.model.compile=true"],
        "every job: model.compile = true: is for one job, and a lane's come and go; remove it, or train it "
        "by itself with raytune-ft train",
    ),
    (
        ["jobs.0.method={kind: full}", "jobs.0.model.weight_bits=16"],
        "jobs[0] (a): method.kind = full: changes the base, which a lane's jobs share; use lora, or train it "
        "by itself with raytune-ft train",
    ),
    (
        ["defaults.publish.catalog=s3://${NOT_SET}"],
        "every job: publish.catalog: environment variable NOT_SET is not set",
    ),
    (["jobs.0.publish=null"], "jobs[0] (a): publish = None: must be a mapping, such as {catalog: …}"),
]

FLEET_PROBLEMS = [
    (["rank=8"], "rank: no such field; did you mean defaults.method.rank?"),
    (["method.rank=8"], "method: no such field; did you mean defaults.method?"),
    (["lanes.maximum=8"], "lanes.maximum: no such field; did you mean lanes.max?"),
    (["lanes.max=0"], "lanes.max = 0: must be greater than 0"),
    (
        ["lanes.slots=many"],
        "lanes.slots = 'many': must be a valid integer, unable to parse string as an integer, or must "
        "be 'auto'",
    ),
    (["lanes=3"], "lanes = 3: must be a mapping, such as {max: …}"),
    (["on_failure=retry"], "on_failure = 'retry': must be 'continue' or 'stop'"),
    (["jobs.1=b"], "jobs[1] = 'b': must be a mapping, such as {name: …}"),
    (["jobs=[]"], "no jobs: list them in jobs, name their data in for_each.glob, or both"),
    (
        ["defaults.name=x"],
        "defaults.name = 'x' would name every job; name each in jobs, or by for_each.name",
    ),
    (["for_each={name: '{stem}'}"], "for_each.glob: required, but not given"),
    (
        ["for_each={glob: 's3://tasks/*', name: {stem: null}}"],
        'for_each.name: is a mapping without quotes; write "{stem}"',
    ),
    (
        ["for_each={glob: 's3://tasks/*', name: task}"],
        "for_each.name = 'task': gives all jobs one name; add {stem}, the object's name, or {folder}, its "
        "folder's",
    ),
    (
        ["for_each={glob: 's3://tasks/*', name: 'x-{name}'}"],
        "for_each.name = 'x-{name}': {name} stands for nothing; use {stem} or {folder}",
    ),
    (
        ["for_each={glob: 's3://tasks/*', job: {name: x}}"],
        "for_each: job.name = 'x': for_each.name names these jobs; remove job.name",
    ),
    (
        ["for_each={glob: 'gs://tasks/*'}"],
        "for_each.glob: scheme 'gs' is not supported; use a folder, file:// or s3://",
    ),
    (
        ["for_each={glob: 's3://${NOT_SET}/*'}"],
        "for_each.glob: environment variable NOT_SET is not set",
    ),
]


class TestProblems:
    @pytest.mark.parametrize(
        ("overrides", "line"),
        [*JOB_PROBLEMS, *FLEET_PROBLEMS],
        ids=[problem[0][0] for problem in [*JOB_PROBLEMS, *FLEET_PROBLEMS]],
    )
    def test_a_problem_says_job_place_value_limit_and_remedy(self, overrides: list[str], line: str) -> None:
        assert complaint(fleet(), tuple(overrides)) == f"f.yaml has 1 problem:\n  {line}"

    def test_all_at_once(self) -> None:
        overrides = ("lanes.max=0", "defaults.model.weight_bits=5", "jobs.0.method.rank=0", "jobs.2.data=3")
        jobs = [{"name": name} for name in ("a", "b", "c", "b")]
        assert complaint(fleet(jobs=jobs), overrides).splitlines() == [
            "f.yaml has 4 problems:",
            "  lanes.max = 0: must be greater than 0",
            "  every job: model.weight_bits = 5: must be 4, 8, 16 or 32",
            "  jobs[0] (a): method.rank = 0: must be greater than 0",
            "  jobs[2] (c): data = 3: must be a mapping, such as {sources: …}",
        ]

    def test_the_page_shows_what_is_said(self) -> None:
        jobs = [{"name": name} for name in ("diff", "larger", "negation", "sum", "diff")]
        found = complaint(fleet(jobs=jobs), ("jobs.3.method.rank=-1",)).splitlines()
        page = (Path(__file__).parents[2] / "docs" / "fleet-file.md").read_text(encoding="utf-8")
        assert len(found) == 3
        assert all(line in page for line in found[1:])

    def test_many_jobs_with_one_problem_are_one_line(self) -> None:
        jobs = [{"name": f"j{n}", "method": {"rank": 0}} for n in range(9)]
        lines = complaint(fleet(jobs=[{"name": "a"}, *jobs])).splitlines()
        assert lines[1:] == [
            "  jobs[1] (j0), jobs[2] (j1), jobs[3] (j2) and 6 others: method.rank = 0: must be greater than 0"
        ]

    def test_what_is_wrong_with_every_object_shows_before_any_is_listed(self) -> None:
        values = fleet(jobs=[], for_each={"glob": "s3://tasks/*", "job": {"method": {"rank": 0}}})
        with pytest.raises(SpecError, match=r"for_each: method\.rank = 0: must be greater than 0"):
            parse_fleet(values)

    def test_no_object(self) -> None:
        found = complaint(fleet(for_each={"glob": "s3://tasks/*.json"}))
        assert found == (
            "f.yaml has 1 problem:\n"
            "  for_each.glob = s3://tasks/*.json: no such file, and no folder or glob with files"
        )

    def test_an_object_whose_name_would_be_expanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
        uri = "s3://tasks/x${AWS_SECRET_ACCESS_KEY}.json"
        found = complaint(fleet(for_each={"glob": "s3://tasks/*.json"}), uris=("s3://tasks/a.json", uri))
        assert found == (
            f"f.yaml has 1 problem:\n  for_each.glob = s3://tasks/*.json: {uri}: has '${{' in its name, "
            "which a job file takes for a variable; rename it"
        )

    def test_objects_that_give_one_name(self) -> None:
        uris = ("s3://tasks/a b.json", "s3://tasks/a_b.json", "s3://tasks/Ü.json")
        lines = complaint(fleet(for_each={"glob": "s3://tasks/*.json"}), uris=uris).splitlines()
        assert lines[1].startswith("  s3://tasks/Ü.json (): name = '': must be 1 to 63 of a-z, 0-9 and '-'")
        assert lines[2:] == [
            "  s3://tasks/a b.json (a-b), s3://tasks/a_b.json (a-b): have one name, a-b; give each its own"
        ]

    def test_one_adapter_in_two_catalogs_is_two(self) -> None:
        jobs = [{"name": "a"}, {"name": "b", "publish": {"adapter": "a", "catalog": "s3://others"}}]
        assert len(expand(parse_fleet(fleet(jobs=jobs)))) == 2


class TestKinds:
    JOB = yaml.safe_dump({**DEFAULTS, "name": "a"})

    def test_each_command_says_which_file_it_wants(self, tmp_path: Path) -> None:
        file = tmp_path / "x.yaml"
        file.write_text(self.JOB)
        assert isinstance(read_job_or_fleet(file), JobSpec)
        with pytest.raises(SpecError) as caught:
            read_fleet(file)
        assert str(caught.value) == (
            f"{file}: is a job file, for it has neither jobs nor for_each; raytune-ft train trains it"
        )
        file.write_text(yaml.safe_dump(fleet()))
        assert isinstance(read_job_or_fleet(file, ["lanes.max=2"]), FleetSpec)
        with pytest.raises(SpecError) as caught:
            read_job(file)
        assert str(caught.value) == (
            f"{file}: is a fleet file, for it has defaults and jobs, and one job is asked for; "
            "raytune-ft plan shows a fleet, and raytune-ft fleet trains it"
        )

    @pytest.mark.parametrize(("content", "what"), [("", "empty"), ("- 1", "a list")])
    def test_a_file_that_is_neither(self, tmp_path: Path, content: str, what: str) -> None:
        file = tmp_path / "x.yaml"
        file.write_text(content)
        with pytest.raises(SpecError, match=f"a fleet file is a mapping .* and this one is {what}$"):
            read_fleet(file)
        with pytest.raises(SpecError, match=f"a job file is a mapping .* and this one is {what}$"):
            read_job_or_fleet(file)

    def test_a_full_method_is_no_default_for_others(self) -> None:
        values = fleet(
            defaults={**DEFAULTS, "method": {"kind": "full"}, "model": {"path": "b", "weight_bits": 16}}
        )
        (job,) = expand(parse_fleet({**values, "jobs": [{"name": "a", "method": {"kind": "lora"}}]}))
        assert job.method == LoraSpec()
        assert not FullSpec.shares_batch
