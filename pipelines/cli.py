"""`foreframe`: every verb of the project. A wrong value is one line and exit code 2; `--debug` shows tracebacks.

Commands import what they need when they run: `--help` and `doctor` must not wait for torch, Ray or Prefect.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import ForeframeError, InputError
from infra.ray_runtime import prepare_environment
from pipelines.cli_calls import (
    DEBUG_FLAG,
    Backend,
    DryRun,
    Overrides,
    assignment,
    by_stage,
    call_flow,
    flow_module,
    registered_url,
    score_rows,
    show_plan,
    verdict,
)
from pipelines.cli_finetune import finetune
from pipelines.cli_ingest import CORPORA, ingest, verify, view
from pipelines.cli_policy import convert_policy, evaluate, serve, train_policy
from pipelines.console import set_up_logging, table

INTERRUPTED = 130  # what Ctrl-C ends with

app = typer.Typer(
    help="Raw video in, a promoted robot policy out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(finetune, name="finetune")
app.command("ingest", epilog="\n\n".join(f"{name}: {what}" for name, what in CORPORA.items()))(ingest)
app.command("verify")(verify)
app.command("view")(view)
app.command("train-policy")(train_policy)
app.command("evaluate")(evaluate)
app.command("serve")(serve)
app.command("convert-policy")(convert_policy)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foreframe {importlib.metadata.version('foreframe')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG_FLAG, help="Tracebacks and debug lines; works after a verb too.")
    ] = False,
) -> None:
    """Options of every verb; `main` has acted on them already."""


@app.command()
def demo(override: Overrides = None, backend: Backend = "") -> None:
    """The whole line on tiny presets: video, encoder, policy, gate, report.

    Overrides begin with the stage: simulate, pretraining, cloning, label_propagation or rollouts.
    """
    summary = call_flow("demo", by_stage(override or []), backend=backend, shares_ray=False)
    typer.echo("\nEncoder, label propagation\n" + table(score_rows(summary["encoder"])))
    typer.echo("\nPolicy, closed loop\n" + table(score_rows(summary["policy"])))
    typer.echo("\nStages, seconds\n" + table([{"stage": k, "seconds": v} for k, v in summary["seconds"].items()]))
    for gate in summary["gates"]:
        typer.echo("\n" + verdict(gate))
    typer.echo(f"\nReport: {summary['report']}")


@app.command()
def doctor() -> None:
    """What this machine lacks, each with the command that mends it; exit code 1 if something fails."""
    from infra.doctor import examine, report

    checks = examine([_check_rendering])
    typer.echo(report(checks))
    raise typer.Exit(any(check.verdict == "fail" for check in checks))


@app.command()
def up(
    cpus: Annotated[int | None, typer.Option(help="Processors Ray may use; default all.", min=1)] = None,
    bare: Annotated[bool, typer.Option("--bare", help="No deployments and no Prefect profile.")] = False,
) -> None:
    """Start Prefect, MLflow and Ray on loopback, deploy the flows, print the addresses. Up already is fine."""
    from infra import services
    from pipelines import deployments

    state = services.up(num_cpus=cpus)
    if not bare and not state.is_deployed:
        previous = deployments.activate_profile(state.settings.prefect_api_url)
        if state.previous_profile is None:
            state = state.model_copy(update={"previous_profile": previous})
            services.write_state(state)
        deployments.deploy(state.settings.prefect_api_url)
        services.write_state(state.model_copy(update={"is_deployed": True}))
    for name, service in state.services.items():
        typer.echo(f"{name:<15} {service.url or 'running'}")
    if bare:
        return
    typer.echo("\nNow for example: prefect deployment run pretrain-rsp")
    for name in deployments.overriding_variables():
        typer.echo(f"note: {name} is set in this shell and wins over our server: unset {name}")


@app.command()
def down() -> None:
    """Stop what `up` started, and nothing else."""
    from infra import services
    from pipelines import deployments

    state = services.read_state()
    if state is not None and state.previous_profile is not None:
        deployments.restore_profile(state.previous_profile)
    stopped = services.down()
    typer.echo(f"stopped: {', '.join(stopped)}" if stopped else "nothing was up")


@app.command()
def deploy() -> None:
    """Create or update the deployments of prefect.yaml on the running Prefect server."""
    from pipelines import deployments

    typer.echo(f"deployed: {', '.join(deployments.deploy())}")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A deployment's name, e.g. pretrain-rsp.")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--param", metavar="KEY=VALUE", help="Flow parameter; repeat.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Short for -p preset=NAME.")] = "",
    override: Overrides = None,
    backend: Backend = "",
) -> None:
    """Run a deployment's flow here and now, without a worker."""
    parameters = dict(assignment(text) for text in parameter or [])
    if preset:
        parameters["preset"] = preset
    if override:
        parameters |= by_stage(override) if name == "demo" else {"overrides": override}
    result = call_flow(name, parameters, backend=backend, shares_ray=name != "demo")
    typer.echo(result if isinstance(result, str) else json.dumps(result, indent=2))


@app.command()
def pretrain(
    preset: Annotated[str, typer.Option(help="tiny, vits16 or vitb16.")] = "tiny",
    data: Annotated[str, typer.Option(help="Data set of layout frames; default: the simulated one.")] = "",
    override: Overrides = None,
    backend: Backend = "",
    dry_run: DryRun = False,
) -> None:
    """Pre-train an encoder on frame pairs, evaluate and register it."""
    if dry_run:
        flow = flow_module("pretrain-rsp")
        show_plan(flow.resolve_pretraining(preset, data, override), has_data=bool(data))
        return
    typer.echo(call_flow("pretrain-rsp", {"preset": preset, "data": data, "overrides": override}, backend=backend))


@app.command()
def promote(
    model: Annotated[str, typer.Option(help="foreframe-policy, -video or -encoder.")] = "foreframe-policy",
    version: Annotated[int | None, typer.Option(help="Version; default: the candidate.", min=1)] = None,
    result: Annotated[str, typer.Option(help="Judge this evaluation of an unregistered policy; nothing moves.")] = "",
    backend: Backend = "",
) -> None:
    """Let the gate decide on a candidate. A refusal is an answer: exit code 0, with the reasons."""
    parameters = {"model": model, "version": version, "result": result}
    typer.echo(verdict(call_flow("promote", parameters, backend=backend, shares_ray=False)))


@app.command()
def report(
    kind: Annotated[str, typer.Argument(help="demo, video, policy, dataset or result.")],
    path: Annotated[str, typer.Argument(help="Folder or s3:// prefix.")],
    source: Annotated[str, typer.Option(help="With dataset: its corpus, to show what was refused.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="The page; default: beside a run or result, else NAME-report.html here.")
    ] = None,
) -> None:
    """Write the HTML report of a demo, a video model, a policy, a data set or an evaluation."""
    from evaluation.report.run import build

    typer.echo(str(build(kind, path, source=source, output=output)))


@app.command()
def lineage(
    target: Annotated[str, typer.Argument(help="Folder, digest, or a registered model: foreframe-policy@champion.")],
) -> None:
    """The way from an artefact back to the source videos."""
    from infra.lineage import trace
    from infra.settings import settings

    found = trace(registered_url(target) if "@" in target else target, home=settings().home_url)
    typer.echo(found.text())
    typer.echo(f"\n{len(found.sources)} source videos")
    if found.missing:
        raise InputError(
            f"{len(found.missing)} digests lead nowhere, first {found.missing[0].id[:12]}.",
            remedy="Their records lie outside the home folder, or were removed.",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point and error boundary."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG_FLAG in arguments
    prepare_environment()
    set_up_logging(debug=debug)
    try:
        app([item for item in arguments if item != DEBUG_FLAG])
    except ForeframeError as error:
        if debug:
            raise
        sys.exit(_fail(str(error), code=2))
    except SystemExit as stopped:
        if stopped.code == INTERRUPTED:
            typer.echo("stopped; the same command goes on from what is there", err=True)
        raise
    except Exception as error:
        if debug:
            raise
        text = str(error).strip().splitlines()
        first = text[0] if text else "no message"
        # Prefect refuses a wrong flow parameter in its own words; that is a user's error too.
        code = 2 if type(error).__name__ in {"ParameterTypeError", "SignatureMismatchError"} else 1
        sys.exit(_fail(f"{type(error).__name__}: {first} ({DEBUG_FLAG} shows more)", code=code))


def _fail(text: str, *, code: int) -> int:
    typer.echo(f"error: {text}", err=True)
    return code


def _check_rendering() -> list[Any]:
    """OpenGL without a screen."""
    from infra.doctor import Check
    from ingest.simulators.opengl import APT_COMMAND, NO_GL, select_backend

    backend = select_backend()
    if backend == NO_GL:
        return [Check("opengl", "fail", "neither EGL nor OSMesa renders", APT_COMMAND)]
    return [Check("opengl", "ok", f"renders with {backend}")]


if __name__ == "__main__":
    main()
