"""What flows are made of: a tracked flow run, the heavy step, and the addresses where outputs land.

Outputs are addressed by the digest of what decides them, so a finished step finds its own output and a rerun of a
finished deployment skips to its end. Prefect's cache is not used: a new server has none, the manifests stay.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run

from infra.config import Config, override
from infra.digests import short
from infra.errors import ForeframeError
from infra.settings import settings
from infra.tracking import TrackedRun, Tracker
from pipelines.hooks import step_context
from pipelines.ray_backend import Backend, StepContext, run_step

log = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", bound=Config)

# Where and how quickly, never what: two executions of one thing land in one place.
PLACE_FIELDS = frozenset({"output", "workers", "processes", "compute", "tracking"})


def resolve(config: ConfigT, overrides: list[str] | None, *, folder: str, name: str) -> ConfigT:
    """Apply dotted overrides, then give the config its output: `<home>/<folder>/<name>-<digest>`.

    An override of `output` itself is kept.
    """
    changed = override(config, overrides or [])
    if changed.to_json()["output"] != config.to_json()["output"]:
        return changed
    place = settings().at(folder, f"{name}-{short(changed.digest(exclude=PLACE_FIELDS))}")
    return changed.model_copy(update={"output": place})


@dataclass
class FlowRun:
    """The tracker run of a flow, and how its steps run. Made by `tracked`."""

    name: str
    run: TrackedRun
    backend: Backend
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def tracker(self) -> Tracker:
        """Where it is tracked."""
        return self.run.tracker

    def step(self, module: str, config: Config, *, name: str, dataset: tuple[str, str, str] | None = None) -> str:
        """Run a heavy step under a child run of the tracker; returns that run's id.

        `dataset` is (name, url, manifest digest) of what the step reads.
        """
        key = f"{flow_run.get_id() or self.run.run_id}/{name}"
        with self.tracker.start(name, config=config, parent=self.run.run_id, key=key) as child:
            if dataset:
                child.log_dataset(dataset[0], url=dataset[1], digest=dataset[2])
            if "tracking" in type(config).model_fields:
                tracking = config.to_json()["tracking"] | {"run_id": child.run_id}
                config = override_tracking(config, tracking)
            seconds = heavy_step.with_options(name=name)(
                module, config, step_name=name, backend=self.backend, context=step_context(mlflow_run_id=child.run_id)
            )
            child.log_metrics({"seconds": seconds})
            self.timings[name] = seconds
            return child.run_id

    def link(self, key: str, url: str, text: str) -> None:
        """A link on the flow run's page; nothing without an address."""
        if url:
            create_link_artifact(link=url, link_text=text, key=artifact_key(key))

    def table(self, key: str, rows: list[dict[str, Any]], description: str) -> None:
        """A table on the flow run's page."""
        create_table_artifact(table=rows, key=artifact_key(key), description=description)

    def note(self, key: str, markdown: str) -> None:
        """A few lines on the flow run's page."""
        create_markdown_artifact(markdown=markdown, key=artifact_key(key))


def artifact_key(text: str) -> str:
    """Prefect takes lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def override_tracking(config: ConfigT, tracking: dict[str, Any]) -> ConfigT:
    """The same config, reporting to a tracker run."""
    return type(config).parse(config.to_json() | {"tracking": tracking})


@contextlib.contextmanager
def tracked(name: str, *, backend: Backend | None, parent: str = "") -> Iterator[FlowRun]:
    """Open the flow's tracker run, nested below the run id `parent`, linked with Prefect and Ray both ways."""
    known = settings()
    tracker = Tracker()
    tags = {tag: value for tag, value in step_context().metadata.items() if tag.startswith("prefect.")}
    with tracker.start(name, tags=tags, parent=parent, key=flow_run.get_id() or "") as run:
        flow = FlowRun(name, run, backend or known.backend)
        flow.link(f"{name}-tracker", run.url, f"MLflow run of {name}")
        flow.link(f"{name}-ray", known.ray_dashboard_url, "Ray dashboard")
        logger().info("tracked as run %s at %s", run.run_id, tracker.uri)
        yield flow


def logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Prefect's run logger inside a flow or task, ours outside."""
    try:
        return get_run_logger()
    except MissingContextError:
        return log


def _may_help(_task: Any, _run: Any, state: Any) -> bool:
    """Another attempt is worth it only for errors that say so: the same wrong config stays wrong."""
    try:
        state.result()
    except ForeframeError as error:
        return error.retryable
    except Exception:  # noqa: BLE001  (the flow boundary: a bug is not retried, it is shown)
        return False
    return False


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=_may_help, persist_result=False)
def heavy_step(module: str, config: Config, *, step_name: str, backend: Backend, context: StepContext) -> float:
    """One `python -m <module> CONFIG`; returns its seconds. Where it runs is the backend's business."""
    started = time.monotonic()
    attempt = task_run.get_run_count() or 1
    if attempt > 1:
        logger().info("attempt %d of %s resumes from what is on disk", attempt, step_name)

    def link_job(job_id: str, page: str) -> None:
        create_link_artifact(link=page, link_text=f"Ray job {job_id}", key=artifact_key(f"{step_name}-job"))
        if run_id := context.metadata.get("mlflow.run_id"):
            Tracker().open(run_id).log_tags({"ray.submission_id": job_id, "ray.job_url": page})

    run_step(module, config, name=step_name, backend=backend, context=context, logger=logger(), on_job=link_job)
    return round(time.monotonic() - started, 2)
