"""The commands, and how they end.

0 done, 2 bad input, 3 training failed, 4 storage trouble, 5 published, but a gate refused.
"""

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from raytune_ft.catalog.gate import refusal_message
from raytune_ft.cli.catalog import CatalogOption
from raytune_ft.cli.catalog import app as catalog_app
from raytune_ft.cli.catalog.base import local_place
from raytune_ft.cli.catalog.trust import RequireSignature, TrustedKeys, trust_of
from raytune_ft.errors import GateRefused, RaytuneError, SpecError, StorageError
from raytune_ft.spec import FleetSpec, JobSpec, read_fleet, read_job, read_job_or_fleet
from raytune_ft.spec.values import uri_mistake
from raytune_ft.terminal import visible

app = typer.Typer(
    name="raytune-ft",
    help="Fine-tune language models on a Ray cluster: from a bucket of instructions to a bucket of adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(catalog_app, name="catalog")

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
JobOrFleetFile = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The job file or fleet file.")]
FleetFile = Annotated[Path, typer.Argument(metavar="FLEET.yaml", help="The fleet file.")]
Override = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a field, such as method.rank=8.")
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Tokenise anew, and keep nothing of it in the bucket.")
]
Wait = Annotated[
    float,
    typer.Option(min=0.0, metavar="SECONDS", help="Wait so long for an autoscaler to bring missing GPUs."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON at the end.")]

INTERRUPTED = 130
GOES_ON = {
    "train": "the same command goes on from the last checkpoint",
    "fleet": "the same command goes on, and trains nothing again that is done",
}
"""What an interrupted command loses, and what to do."""
TRAIN_MODULES = (
    "ray",
    "torch",
    "transformers",
    "pyarrow",
    "jinja2",
    "peft",
    "bitsandbytes",
    "s3fs",
    "tensorboard",
)
"""What the base install leaves to the extra `train`."""


@app.command()
def train(
    job_file: JobFile,
    override: Override = [],  # noqa: B006  typer copies it
    output: Annotated[
        str | None, typer.Option(help="Folder for report and logs; runs/<name> where not given.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start over instead of going on.")] = False,
    publish_step: Annotated[
        int | None,
        typer.Option(min=1, metavar="STEP", help="Train nothing: publish the kept checkpoint of this step."),
    ] = None,
    no_cache: NoCache = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Train a job and publish the result; the same command goes on where it was stopped."""
    if restart and publish_step is not None:
        raise SpecError(
            "--restart forgets the checkpoints that --publish-step publishes from; give one of them"
        )
    job = read_job(job_file, override)
    folder = _output_folder(output, job.name)
    from raytune_ft.cli.progress import ProgressDisplay, print_result

    # Ray prints of lost nodes where only the result may stand.
    with ProgressDisplay(quiet=as_json) as display, redirect_stdout(sys.stderr if as_json else sys.stdout):
        display.update({"phase": "check"})
        from raytune_ft.train.launch import train as run

        result = run(
            job,
            folder,
            restart=restart,
            publish_step=publish_step,
            cache=not no_cache,
            wait_s=wait,
            on_event=display.update,
        )
    if as_json:
        print(json.dumps(result))  # noqa: T201  the one line that a program reads
    else:
        print_result(Console(), {**result, "catalog": job.publish.catalog, **_report_of(folder)})
    refused = refusal_message(result, job.publish.catalog)
    if refused is not None:
        raise GateRefused(f"{job.name}: {refused}")


@app.command()
def fleet(
    fleet_file: FleetFile,
    override: Override = [],  # noqa: B006  typer copies it
    output: Annotated[
        str | None, typer.Option(help="Folder for the report and the result; runs/<name> where not given.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train jobs that failed before once more.")
    ] = False,
    no_cache: NoCache = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Train all jobs of a fleet, many at a time; the same command goes on where it was stopped."""
    spec = read_fleet(fleet_file, override)
    folder = _output_folder(output, spec.name)
    from raytune_ft.cli.fleet import fleet_command

    fleet_command(
        spec,
        fleet_file,
        folder,
        retry_failed=retry_failed,
        cache=not no_cache,
        wait_s=wait,
        as_json=as_json,
    )


@app.command()
def data(
    job_file: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file.")] = None,
    override: Override = [],  # noqa: B006  typer copies it
    examples: Annotated[
        int,
        typer.Option(min=0, help="First examples of each source to show, beside one of each kind of turn."),
    ] = 1,
    templates: Annotated[bool, typer.Option("--templates", help="List the built-in templates.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=local_place, metavar="FILE.html", help="Write all of it as a page; its folder must exist."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job would learn: rendered examples, learned tokens highlighted, and the counts."""
    from raytune_ft.cli.data import data_command, templates_command

    if templates:
        templates_command()
        return
    if job_file is None:
        raise SpecError("raytune-ft data: name a job file, or ask for --templates")
    data_command(read_job(job_file, override), examples, as_json, report)


@app.command()
def plan(
    file: JobOrFleetFile,
    override: Override = [],  # noqa: B006  typer copies it
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a worker, such as 24GiB; else as in the cluster.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Of a fleet: how long it takes on 1 to 64 GPUs.")
    ] = False,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=1e-6, help="Of a fleet: 10^12 operations that a lane's device sustains in a second."
        ),
    ] = None,
    preemptions: Annotated[
        float,
        typer.Option(min=0.0, metavar="PER_HOUR", help="Of a fleet: how often each lane is taken away."),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Show what a job or a fleet needs, what fits, what to choose, and how long a fleet takes."""
    spec = read_job_or_fleet(file, override)
    if isinstance(spec, FleetSpec):
        from raytune_ft.cli.plan_fleet import plan_fleet_command

        plan_fleet_command(spec, file, gpu_memory, tflops, simulate, preemptions, as_json)
        return
    from raytune_ft.cli.plan import plan_command

    if simulate or tflops is not None or preemptions:
        raise SpecError(f"--simulate, --tflops and --preemptions are for a fleet, and {file} is a job file")
    plan_command(spec, gpu_memory, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job file, for editors."""
    print(json.dumps(JobSpec.model_json_schema(), indent=2))  # noqa: T201  the command's output


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The instruction; '-' reads standard input.")],
    adapter: Annotated[str, typer.Option(metavar="NAME[@ALIAS|@vN]", help="What the catalog holds.")],
    catalog: CatalogOption,
    context: Annotated[str, typer.Option("--input", help="What the instruction is about.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the base.")
    ] = False,
    require_signature: RequireSignature = False,
    trusted_keys: TrustedKeys = [],  # noqa: B006  typer copies it
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a published adapter on its base, or with a published model."""
    trust = trust_of(require_signature, trusted_keys)
    from raytune_ft.evaluate.answer import answer_prompt

    text = sys.stdin.read() if prompt == "-" else prompt
    reply = answer_prompt(
        catalog,
        adapter,
        text,
        context=context,
        max_new_tokens=max_new_tokens,
        trust_remote_code=trust_remote_code,
        trust=trust,
    )
    print(json.dumps({"adapter": adapter, "prompt": text, "answer": reply}) if as_json else visible(reply))  # noqa: T201


def _output_folder(output: str | None, name: str) -> Path:
    if output and ("://" in output or uri_mistake(output)):
        raise SpecError(f"--output {output}: name a local folder; the catalog keeps the rest in the bucket")
    return Path(output or f"runs/{name}")


def _report_of(folder: Path) -> dict[str, str]:
    report = folder / "report.html"
    return {"report": str(report)} if report.is_file() else {}


def main() -> None:
    """Entry point: every error of ours is one message on standard error and an exit code."""
    # Libraries that count, warn and draw on their own would hide what the command says.
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        # What others wrote may have letters that this terminal has not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        exit_code = app(standalone_mode=False)
        if exit_code == INTERRUPTED:
            raise KeyboardInterrupt  # What typer has made of one.
        sys.exit(exit_code)
    except RaytuneError as error:
        _end(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_MODULES:
            raise
        _end(f"{error.name} is not installed; install raytune-ft[train]", SpecError.exit_code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        goes_on = GOES_ON.get(next(iter(sys.argv[1:2]), ""))
        _end(f"interrupted; {goes_on}" if goes_on else "interrupted", INTERRUPTED)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = (error.strerror or str(error)).lower()
        _end(f"{place}{reason}; check the file, the disk or the network", StorageError.exit_code)
    except TyperException as error:
        _end(f"{error.format_message()} See raytune-ft --help.", SpecError.exit_code)


def _end(message: str, exit_code: int) -> NoReturn:
    print(f"raytune-ft: {visible(message)}", file=sys.stderr)  # noqa: T201  where messages go
    sys.exit(exit_code)
