"""MLflow's side of the catalog's benchmark, run by the python of its own environment."""

import json
from collections.abc import Callable
from pathlib import Path

import requests
from catalog_inputs import (
    ALIAS,
    BY_ALIAS,
    EXACT,
    LATEST,
    LIST,
    PUBLISH,
    Operation,
    adapter_name,
    carry_out,
    count_requests,
    parser,
    peak_bytes,
    show,
    some_adapters,
    write_files,
)
from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

_EXPERIMENT = "benchmark"
_PAGE = 1000


def fill(client: MlflowClient, files: Path, start: int, adapters: int) -> None:
    """One version of each adapter, with an alias; all share one run's artifacts."""
    write_files(files / "first", 0)
    run = client.create_run(_experiment(client, files)).info
    client.log_artifacts(run.run_id, str(files / "first"), "adapter")
    for number in range(start, adapters):
        name = adapter_name(number)
        client.create_registered_model(name)
        version = client.create_model_version(name, f"{run.artifact_uri}/adapter", run.run_id).version
        client.set_registered_model_alias(name, ALIAS, version)


def _experiment(client: MlflowClient, files: Path) -> str:
    found = client.get_experiment_by_name(_EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(_EXPERIMENT, (files.parent / "artifacts").as_uri()))


def operations(client: MlflowClient, files: Path, adapters: int, repeats: int) -> list[Operation]:
    """What is timed."""
    names = some_adapters(adapters, repeats + 1)
    for number in range(repeats + 1):
        write_files(files / f"new-{number}", 1 + number)
    experiment = _experiment(client, files)

    def latest(number: int) -> object:
        order = ["version_number DESC"]
        return client.search_model_versions(f"name='{names[number]}'", max_results=1, order_by=order)[0]

    def publish(number: int) -> None:
        run = client.create_run(experiment).info
        client.log_artifacts(run.run_id, str(files / f"new-{number}"), "adapter")
        client.set_terminated(run.run_id)
        source = f"{run.artifact_uri}/adapter"
        version = client.create_model_version(names[number], source, run.run_id).version
        client.set_registered_model_alias(names[number], ALIAS, version)

    return [
        Operation(LATEST, repeats, latest),
        Operation(BY_ALIAS, repeats, lambda number: client.get_model_version_by_alias(names[number], ALIAS)),
        Operation(EXACT, repeats, lambda number: client.get_model_version(names[number], "1")),
        Operation(LIST, 3, lambda _: _list(client)),
        Operation(PUBLISH, repeats, publish),
    ]


def _list(client: MlflowClient) -> int:
    found, token = 0, None
    while True:
        page = client.search_registered_models(max_results=_PAGE, page_token=token)
        found += len([(model.name, model.aliases, model.latest_versions) for model in page])
        token = page.token
        if not token:
            return found


def count_all() -> Callable[[], int]:
    """From now on count SQL statements and HTTP requests of this process; returns how many there were."""
    counts = {"sql": 0, "http": 0}

    def count_sql(*_: object) -> None:
        counts["sql"] += 1

    event.listen(Engine, "before_cursor_execute", count_sql)
    send = requests.Session.send

    def count_http(*arguments: object, **named: object) -> object:
        counts["http"] += 1
        return send(*arguments, **named)  # type: ignore[arg-type]  # passed on as they came

    requests.Session.send = count_http  # type: ignore[method-assign, assignment]
    return lambda: counts["sql"] + counts["http"]


def main() -> None:
    """Fill or operate."""
    arguments = parser(__doc__, "--tracking", "uri of the registry: sqlite:///file or a server").parse_args()
    client = MlflowClient(arguments.tracking, arguments.tracking)
    if arguments.what == "fill":
        fill(client, arguments.files, arguments.start, arguments.adapters)
        print(json.dumps({"adapters": arguments.adapters}))
        return
    settings = arguments.files, arguments.adapters, arguments.repeats
    client.get_model_version_by_alias(adapter_name(0), ALIAS)  # Connects.
    seconds = carry_out(operations(client, *settings))
    memory_bytes = peak_bytes()
    counted = count_all()
    show(seconds, count_requests(operations(client, *settings), counted), memory_bytes)


if __name__ == "__main__":
    main()
