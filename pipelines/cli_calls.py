"""What the verbs of the command line share: option types, calling a flow, and how a value becomes text.

Everything heavy is imported inside the functions: `--help` and `doctor` must not wait for torch, Ray or Prefect.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from infra.errors import ConfigError, InputError
from pipelines.console import quiet_prefect

RAY_CPUS = 4  # logical: a small local Ray for the steps of one flow
DEBUG_FLAG = "--debug"
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", metavar="KEY=VALUE", help="Dotted key of the config; repeat.")
]
Backend = Annotated[str, typer.Option(help="Where heavy steps run: inline, local or jobs; default from the settings.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done and do nothing.")]


def flow_module(name: str) -> Any:
    """The module of a deployment's flow, imported once Prefect knows its server."""
    from pipelines.deployments import FLOW_MODULES, prepare_prefect

    if name not in FLOW_MODULES:
        raise ConfigError(f"unknown flow {name!r}.", remedy=f"Known: {', '.join(FLOW_MODULES)}.")
    prepare_prefect()
    module = importlib.import_module(FLOW_MODULES[name])
    quiet_prefect(debug=DEBUG_FLAG in sys.argv)
    return module


def call_flow(name: str, parameters: dict[str, Any], *, backend: str, shares_ray: bool = True) -> Any:
    """Run a flow in this process. With the local backend its steps share one small Ray."""
    from infra.settings import settings

    module = flow_module(name)
    flow = getattr(module, name.replace("-", "_"))
    given = {key: value for key, value in parameters.items() if value not in (None, "")}
    chosen = backend or settings().backend
    # Prefect sends itself SIGTERM again when a flow was stopped; its temporary server ends only with an orderly exit.
    signal.signal(signal.SIGTERM, _leave)
    with _shared_ray() if shares_ray and chosen == "local" else contextlib.nullcontext():
        return flow(**given, **({"backend": backend} if backend else {}))


def _leave(number: int, _frame: object) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def _shared_ray() -> Iterator[None]:
    from infra.ray_head import local_ray

    with local_ray(RAY_CPUS):
        yield


def show_plan(config: Any, *, has_data: bool) -> None:
    """What a run would do, as far as its data set is there, and its resolved config."""
    if has_data:
        from training.plan import dry_run

        typer.echo(json.dumps(dry_run(config), indent=2))
    typer.echo(json.dumps(config.to_json(), indent=2))


def by_stage(overrides: Sequence[str]) -> dict[str, list[str]]:
    """`pretraining.schedule.steps=3` -> {"pretraining": ["schedule.steps=3"]}."""
    stages: dict[str, list[str]] = {}
    for text in overrides:
        stage, separator, rest = text.partition(".")
        if not separator or "=" in stage:
            raise ConfigError(f"override {text!r} names no stage.", remedy="E.g. -o pretraining.schedule.steps=100")
        stages.setdefault(stage, []).append(rest)
    return stages


def assignment(text: str) -> tuple[str, Any]:
    """`-p key=value`: the value as JSON where it is JSON."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"parameter {text!r} is not of the form key=value.", remedy="E.g. -p preset=tiny")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def score_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that the terminal shows."""
    return [{key: row[key] for key in ("arm", "metric", "value", "low", "high", "count")} for row in rows]


def verdict(gate: dict[str, Any]) -> str:
    """The gate's answer with its reasons."""
    note = f" ({gate['note']})" if gate.get("note") else ""
    head = f"{gate['model']} version {gate['version']}{note}: {'promoted' if gate['promote'] else 'refused'}"
    return "\n".join([head, *(f"  - {reason}" for reason in gate["reasons"])])


def registered_url(target: str) -> str:
    """The export behind `foreframe-policy@champion`."""
    from infra.registry import Registry
    from infra.tracking import Tracker

    name, _, alias = target.partition("@")
    found = Registry(Tracker()).alias(name, alias)
    if found is None:
        raise InputError(f"{name} has no alias {alias!r}.", remedy="Known: candidate, champion, previous.")
    return found.url
