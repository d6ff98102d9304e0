"""Steps as Ray jobs: deterministic ids, so that a repeated submission attaches and a cancelled flow finds its jobs.

A job's id is `foreframe.<run key>.<step>.<config digest>.<attempt>`. A live job under the id is joined, an ended one
makes room for the next attempt: a job that ended well is cheap to repeat, because its main finds its own manifests.
Both servers may be away for a while: the job goes on, and we look again until `PATIENCE_S` is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import re
import shlex
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from infra.digests import short
from infra.errors import ConfigError, InputError, ServiceError
from infra.ray_runtime import prepare_environment
from infra.settings import settings
from pipelines.ray_backend import LineForwarder, Logger, StepContext, StepCrashedError, check_exit, step_environment

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobInfo, JobSubmissionClient

T = TypeVar("T")
log = logging.getLogger(__name__)

ID_PREFIX = "foreframe"
POLL_S = 1.0
PATIENCE_S = 300.0
RETRY_S = 3.0
MAX_ATTEMPTS = 100
STOP_TIMEOUT_S = 30.0
# What the client raises when the server is away (requests and aiohttp errors are OSErrors) or answers with an error.
API_ERRORS = (OSError, RuntimeError, asyncio.TimeoutError)


def job_client(*, dashboard_url: str = "") -> JobSubmissionClient:
    """A client of the Jobs API at `dashboard_url` (default: the settings'), with the settings' token if there is one.

    Raises `ServiceError` when nobody answers there, `ConfigError` when the token is refused.
    """
    known = settings()
    url = dashboard_url or known.ray_dashboard_url
    if not url:
        raise ConfigError(
            "no Ray dashboard is configured.", remedy="Run `foreframe up`, or set FOREFRAME_RAY_DASHBOARD_URL."
        )
    prepare_environment()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every closed stream
    headers: dict[str, str] = {}
    if known.ray_token_path:
        path = Path(known.ray_token_path)
        if not path.is_file():
            raise InputError(f"Ray token file {path} does not exist.", remedy="Run `foreframe up` again.")
        headers["Authorization"] = f"Bearer {path.read_text().strip()}"
    try:
        return JobSubmissionClient(url, headers=headers)
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray Jobs API at {url} refuses the token: {str(error).splitlines()[0]}.",
            remedy="Give the head's own token file in FOREFRAME_RAY_TOKEN_PATH.",
        ) from None
    except API_ERRORS as error:
        raise ServiceError(f"no Ray Jobs API at {url}: {error}.", remedy="Is the Ray head up? `foreframe up`") from None


def id_prefix(run_key: str) -> str:
    """What the ids of all jobs of a flow run begin with."""
    return f"{ID_PREFIX}.{_clean(run_key)}."


def submission_id(run_key: str, step: str, digest: str, attempt: int) -> str:
    """The id of one attempt of a step; outside a flow (`run_key` empty) the config's digest stands for the run."""
    return f"{id_prefix(run_key or 'config')}{_clean(step)}.{short(digest)}.{attempt}"


def run_job(
    module: str,
    url: str,
    *,
    name: str,
    digest: str,
    context: StepContext,
    logger: Logger,
    on_job: Callable[[str, str], None] | None = None,
) -> None:
    """Submit the step, or join its live job, and return when it ended well; raises like `run_step`."""
    client = _patiently(job_client, "reach the Ray Jobs API")
    job_id = submit_or_attach(client, module, url, name=name, digest=digest, context=context, logger=logger)
    if on_job:
        on_job(job_id, job_page(job_id))
    forwarder = LineForwarder(logger)
    try:
        info = _follow(client, job_id, forwarder)
    except KeyboardInterrupt:
        # A cancelled flow leaves this to its hook; Ctrl-C at the keyboard has no other hook than this one.
        stop_job(client, job_id)
        raise
    finally:
        forwarder.close()
    if info.status == "STOPPED":
        raise StepCrashedError(f"Ray job {job_id} was stopped.", remedy="Run the flow again to go on from there.")
    code = 0 if info.status == "SUCCEEDED" else info.driver_exit_code
    final_line = forwarder.final_line if forwarder.last else (info.message or "no output")
    check_exit(name, code if code != 0 or info.status == "SUCCEEDED" else -1, final_line, where=f"Ray job {job_id}")


def submit_or_attach(
    client: JobSubmissionClient, module: str, url: str, *, name: str, digest: str, context: StepContext, logger: Logger
) -> str:
    """Id of the live job of this step: an existing one, else a new attempt."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        job_id = submission_id(context.run_key, name, digest, attempt)
        status = _patiently(partial(_status, client, job_id), "list Ray jobs")
        if status is None:
            status = _submit(client, job_id, module, url, context=context)
        if status not in {"STOPPED", "FAILED", "SUCCEEDED"}:
            logger.info("step %s is Ray job %s (%s)", name, job_id, status)
            return job_id
    raise StepCrashedError(f"step {name} was tried {MAX_ATTEMPTS} times.", remedy="Start a new flow run.")


def job_page(job_id: str) -> str:
    """Address of a job's page in the Ray dashboard."""
    return f"{settings().ray_dashboard_url.rstrip('/')}/#/jobs/{job_id}"


def find_jobs(client: JobSubmissionClient, run_key: str) -> list[JobDetails]:
    """Jobs of a flow run: by id, or by the `prefect.root_flow_run_id` of their metadata for runs it started itself."""
    prefix = id_prefix(run_key)
    return [
        job
        for job in client.list_jobs()
        if (job.submission_id or "").startswith(prefix)
        or (job.metadata or {}).get("prefect.root_flow_run_id") == run_key
    ]


def stop_job(client: JobSubmissionClient, job_id: str, *, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop a job and wait until it ended; True if it was live."""
    if client.get_job_status(job_id).is_terminal():
        return False
    client.stop_job(job_id)
    deadline = time.monotonic() + timeout_s
    while not client.get_job_status(job_id).is_terminal():
        if time.monotonic() > deadline:
            raise ServiceError(f"Ray job {job_id} did not stop within {timeout_s:g} s.", remedy="Stop it by hand.")
        time.sleep(0.3)
    return True


def _submit(client: JobSubmissionClient, job_id: str, module: str, url: str, *, context: StepContext) -> str:
    """Submit under a fixed id; losing a race for it is fine. Returns the job's status."""

    def submit() -> str:
        # The Jobs API takes a command line for a shell, hence the quoting; `python` is the cluster's own.
        entrypoint = shlex.join(["python", "-m", module, url])
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env={"env_vars": step_environment(context)},
                metadata={**context.metadata, "foreframe.config": url},
            )
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise
        return _status(client, job_id) or "PENDING"

    return _patiently(submit, f"submit Ray job {job_id}")


def _status(client: JobSubmissionClient, job_id: str) -> str | None:
    """A job's status, None when there is no such job."""
    try:
        return str(client.get_job_status(job_id).value)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise


def _follow(client: JobSubmissionClient, job_id: str, forwarder: LineForwarder) -> JobInfo:
    """Forward the job's log until it ends; returns its last state."""
    log_tail = _LogTail(client, job_id)
    try:
        while True:
            info = _patiently(lambda: client.get_job_info(job_id), f"ask for Ray job {job_id}")
            log_tail.drain(forwarder)
            if info.status.is_terminal():
                break
            time.sleep(POLL_S)
    finally:
        log_tail.ended.set()
    log_tail.join(timeout=5.0)
    log_tail.drain(forwarder)
    return info


class _LogTail(threading.Thread):
    """Reads a job's log stream beside the main loop; after a broken connection lines seen before are left out."""

    def __init__(self, client: JobSubmissionClient, job_id: str) -> None:
        super().__init__(daemon=True)
        self.client, self.job_id = client, job_id
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.seen = 0
        self.start()

    def run(self) -> None:
        """Until the job ended: read, and reconnect."""
        while True:
            with contextlib.suppress(*API_ERRORS):
                asyncio.run(self._read())
            if self.ended.wait(RETRY_S):
                return

    async def _read(self) -> None:
        count = 0
        async for chunk in self.client.tail_job_logs(self.job_id):
            for line in chunk.splitlines():
                count += 1
                if count > self.seen:
                    self.seen = count
                    self.lines.put(line)

    def drain(self, forwarder: LineForwarder) -> None:
        """Pass on what was read."""
        while not self.lines.empty():
            forwarder.line(self.lines.get())


def _patiently(call: Callable[[], T], what: str) -> T:
    """Repeat a call to a server that may be away; `ServiceError` after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except ServiceError as error:
            problem: Exception = error
        except API_ERRORS as error:
            problem = error
        if time.monotonic() > deadline:
            raise ServiceError(f"could not {what} for {PATIENCE_S:g} s: {problem}.", remedy="Is the Ray head up?")
        log.warning("cannot %s now: %s", what, str(problem).splitlines()[0] if str(problem) else type(problem).__name__)
        time.sleep(RETRY_S)


def _clean(text: str) -> str:
    """Letters, digits, dashes and underscores only: what ids and shells take without thinking."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)
