"""What a flow run tells its steps, and what happens to their Ray jobs when the run ends before they do.

Hooks run in another process than the flow, and after its death, so a job is found by ids alone. Prefect passes hook
arguments by keyword: their names are part of the interface.
"""

from __future__ import annotations

import logging
from typing import Any

from infra.settings import settings
from pipelines.ray_backend import StepContext

log = logging.getLogger(__name__)


def step_context(*, mlflow_run_id: str = "") -> StepContext:
    """Context of the running flow for `run_step`: ids for the metadata of its jobs."""
    from prefect.runtime import deployment, flow_run

    run_id = flow_run.get_id() or ""
    metadata = {
        "prefect.flow_run_id": run_id,
        "prefect.root_flow_run_id": flow_run.get_root_flow_run_id() or run_id if run_id else "",
        "prefect.flow_run_url": flow_run.get_flow_run_ui_url() or "" if run_id else "",
        "prefect.deployment": deployment.get_name() or "" if run_id else "",
        "mlflow.run_id": mlflow_run_id,
    }
    return StepContext(run_key=run_id, metadata={key: value for key, value in metadata.items() if value})


def stop_ray_job(flow: Any, flow_run: Any, state: Any) -> None:
    """Stop every live Ray job of a flow run. For `on_cancellation` and `on_crashed`.

    Does nothing when no Ray dashboard is configured: children of the `local` backend end with their flow.
    """
    if not settings().ray_dashboard_url:
        return
    from pipelines.ray_jobs import find_jobs, job_client, stop_job

    client = job_client()
    stopped = [job.submission_id for job in find_jobs(client, str(flow_run.id)) if stop_job(client, job.submission_id)]
    log.info("flow run %s is %s: stopped Ray jobs %s", flow_run.id, state.type.value, stopped or "none")
