"""How a heavy step runs: `python -m <module> CONFIG.json`, in this process, in a child, or as a Ray job.

The config is published once below the home folder under its digest (`configs/<step>-<digest>.json`, local or `s3://`;
every main reads it through `infra.storage`), so all three backends execute the same bytes. Whether a step is done is
the main's to say, from the manifests in its output: a second run of a finished step is a quick no-op.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any, Literal

from pydantic import Field

from infra.config import Config
from infra.digests import pretty_json, short
from infra.errors import ForeframeError
from infra.processes import end_with_parent, identify, stop
from infra.ray_head import local_ray
from infra.ray_runtime import prepare_environment
from infra.settings import QUIET_ENVIRONMENT, settings
from infra.storage import create_only

__all__ = ["Backend", "StepContext", "StepCrashedError", "StepError", "local_ray", "publish_config", "run_step"]
log = logging.getLogger(__name__)

Backend = Literal["inline", "local", "jobs"]
Logger = logging.Logger | logging.LoggerAdapter[Any]  # Prefect's run logger is an adapter
USER_ERROR_CODE = 2  # what every main exits with on a ForeframeError
PASSED_ON = (
    "FOREFRAME_CORPUS",
    "FOREFRAME_GOLDEN",
    "FOREFRAME_CACHE_FOLDER",
    "FOREFRAME_CACHE_BYTES",
    "FOREFRAME_DOWNLOAD_ALLOW_HOSTS",
    "AWS_ENDPOINT_URL",
)
PASSWORD_IN_URL = re.compile(r"://[^/@]*:[^/@]+@")
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+(.+)")
KEPT_LINES = 40
MAX_LINES_PER_WINDOW = 60
WINDOW_S = 2.0


class StepError(ForeframeError):
    """The step ended with an error a user can mend (exit code 2): another attempt would fail again."""


class StepCrashedError(ForeframeError):
    """The step was killed, ran out of memory or hit a bug: another attempt resumes from what is on disk."""

    retryable = True


class StepContext(Config):
    """Who asks for the step. `run_key` is the flow run's id; empty outside a flow, where the config's digest serves.

    `metadata` (Prefect and MLflow ids) is shown on the Ray job; `env` is added to the step's environment. Neither is
    secret: both can be read in the Ray dashboard.
    """

    run_key: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    env: dict[str, str] = Field(default_factory=dict)


def run_step(
    module: str,
    config: Config,
    *,
    name: str,
    backend: Backend | None = None,
    context: StepContext | None = None,
    logger: Logger | None = None,
    on_job: Callable[[str, str], None] | None = None,
) -> None:
    """Run `module` on `config` and return when it is done.

    `name` labels the step (letters, digits, dashes); `backend` defaults to the settings'. A Ray job's id and the
    address of its page are given to `on_job` as soon as it is there. Raises `StepError`, `StepCrashedError`, or
    `ServiceError` when the Ray cluster stays unreachable.
    """
    context = context or StepContext()
    chosen = backend or settings().backend
    output = logger or log
    output.info("step %s: %s on %s", name, module, chosen)
    if chosen == "inline":
        _run_inline(module, config)
        return
    url = publish_config(config, name=name)
    if chosen == "local":
        _run_local(module, url, name=name, context=context, logger=output)
        return
    from pipelines.ray_jobs import run_job

    run_job(module, url, name=name, digest=config.digest(), context=context, logger=output, on_job=on_job)


def publish_config(config: Config, *, name: str) -> str:
    """Write the resolved config below the home folder under its digest; returns its url."""
    url = settings().at("configs", f"{name}-{short(config.digest())}.json")
    create_only(url, pretty_json(config.to_json()))
    return url


def step_environment(context: StepContext) -> dict[str, str]:
    """What a step needs to know of its surroundings, and nothing secret: a Ray job's environment is on its page.

    Credentials are the cluster's own. Inside the step the backend is `inline`: a step starts no steps elsewhere.
    """
    known = settings()
    env = {key: os.environ.get(key, value) for key, value in QUIET_ENVIRONMENT.items()}
    env |= {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    env["FOREFRAME_HOME"] = known.home_url
    if not PASSWORD_IN_URL.search(known.mlflow_uri):
        env["FOREFRAME_TRACKING_URI"] = known.mlflow_uri
    return env | {"FOREFRAME_BACKEND": "inline", "PYTHONUNBUFFERED": "1"} | context.env


class LineForwarder:
    """Passes a step's lines to a logger, at most `MAX_LINES_PER_WINDOW` in `WINDOW_S`, and keeps the last ones.

    A line in the mains' own format keeps its level and loses the time and level that the logger writes again.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.last: deque[str] = deque(maxlen=KEPT_LINES)
        self._window_start = time.monotonic()
        self._in_window = 0
        self._left_out = 0

    def line(self, text: str) -> None:
        """One line of output."""
        text = TERMINAL_CODES.sub("", text).rstrip()
        if not text:
            return
        self.last.append(text)
        if time.monotonic() - self._window_start > WINDOW_S:
            self.close()
            self._window_start, self._in_window = time.monotonic(), 0
        self._in_window += 1
        if self._in_window > MAX_LINES_PER_WINDOW:
            self._left_out += 1
            return
        level, message = logging.INFO, text
        if found := LOG_LINE.match(text):
            level, message = logging.getLevelNamesMapping()[found[1]], found[2]
        self.logger.log(level, "%s", message)

    def close(self) -> None:
        """Say how many lines were left out since the last time."""
        if self._left_out:
            self.logger.info("(%d lines left out)", self._left_out)
        self._left_out = 0

    @property
    def final_line(self) -> str:
        """The last thing the step said: on exit code 2 the sentence of its error."""
        return self.last[-1] if self.last else "no output"


def check_exit(name: str, code: int | None, final_line: str, *, where: str) -> None:
    """Turn an exit code into nothing, `StepError` (2) or `StepCrashedError` (any other)."""
    if code == 0:
        return
    if code == USER_ERROR_CODE:
        raise StepError(f"step {name} failed: {final_line}")
    raise StepCrashedError(f"step {name} ended with exit code {code}: {final_line}", remedy=f"See {where}.")


def _run_inline(module: str, config: Config) -> None:
    prepare_environment()
    importlib.import_module(module).run(config)


def _run_local(module: str, url: str, *, name: str, context: StepContext, logger: Logger) -> None:
    forwarder = LineForwarder(logger)
    child = subprocess.Popen(
        [sys.executable, "-m", module, url],
        env={**os.environ, **step_environment(context)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509  (one system call; libc was loaded before)
    )
    process = identify(child.pid)
    try:
        _forward(child, forwarder)
    finally:
        # Reached early when the flow is cancelled: a signal is raised here as an exception.
        if process:
            stop(process)
        child.wait()
        forwarder.close()
    check_exit(name, child.returncode, forwarder.final_line, where="the lines above")


def _forward(child: subprocess.Popen[str], forwarder: LineForwarder) -> None:
    """Forward lines until the child ends; a grandchild that keeps the pipe open does not hold us up."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    assert child.stdout is not None
    threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True).start()
    while child.poll() is None:
        with contextlib.suppress(queue.Empty):
            forwarder.line(lines.get(timeout=0.2))
    time.sleep(0.1)  # the reader's last lines
    while not lines.empty():
        forwarder.line(lines.get())


def _read_lines(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)
