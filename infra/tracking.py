"""Experiment tracking: runs with config, data set, metrics and artifacts, reopenable from any process by their id.

MLflow's client is used without its global state. Opening and starting differ: `start` talks to the server and raises
`ServiceError` when it is away; `open` talks to nobody, and metrics of an opened run are buffered while it is away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from infra.config import Config
from infra.digests import pretty_json, sha256_json
from infra.errors import ServiceError
from infra.metric_queue import MetricQueue
from infra.settings import settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

EXPERIMENT = "foreframe"
NumberAtStep = tuple[str, float, int, int]  # name, value, time in ms, step
Status = Literal["FINISHED", "FAILED", "KILLED"]
MAX_PARAM_CHARS = 6000
MAX_KEY_CHARS = 250
MAX_PARAMS_PER_BATCH = 100
DIGEST_CHARS = 36  # of a data set; the full digest is in its source and in a tag
FLUSH_TIMEOUT_S = 30.0
KEY_TAG = "foreframe.key"
PARENT_TAG = "mlflow.parentRunId"
# A server that is away must be noticed in seconds, where MLflow's own defaults are minutes; and stdout is not its.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_database_lock = threading.Lock()


class Tracker:
    """One tracking server or database, one experiment. Cheap to make: nothing is contacted before it is needed."""

    def __init__(self, uri: str = "", *, experiment: str = EXPERIMENT) -> None:
        self.uri = uri or settings().mlflow_uri
        self.experiment = experiment
        self._client: MlflowClient | None = None
        self._experiment_id = ""

    @property
    def client(self) -> MlflowClient:
        """The MLflow client; the first use of a database creates its tables."""
        with _database_lock:
            if self._client is None:
                for key, value in MLFLOW_DEFAULTS.items():
                    os.environ.setdefault(key, value)
                with quiet_mlflow(), translated(self.uri):
                    from mlflow import MlflowClient

                    self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        return self._client

    @property
    def experiment_id(self) -> str:
        """Id of the experiment, created when missing; losing a race for that is fine."""
        if not self._experiment_id:
            with translated(self.uri):
                found = self.client.get_experiment_by_name(self.experiment)
                self._experiment_id = found.experiment_id if found else self._create_experiment()
        return self._experiment_id

    def start(
        self,
        name: str,
        *,
        config: Config | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str = "",
        key: str = "",
    ) -> TrackedRun:
        """A run called `name`, nested below the run id `parent` if given.

        With a `key` (e.g. flow run id and step) a second call reopens the run of the first: retries make no copies.
        """
        run = self._find(key) if key else None
        if run is None:
            marks = {**(tags or {}), **({KEY_TAG: key} if key else {}), **({PARENT_TAG: parent} if parent else {})}
            with translated(self.uri):
                created = self.client.create_run(self.experiment_id, run_name=name, tags=marks)
            run = TrackedRun(self, created.info.run_id)
        else:
            run.log_tags(tags or {})
            with translated(self.uri):
                self.client.update_run(run.run_id, status="RUNNING")
        if config is not None:
            run.log_config(config)
        return run

    def open(self, run_id: str) -> TrackedRun:
        """A handle on an existing run, finished or not; the server is not asked."""
        return TrackedRun(self, run_id)

    def run_url(self, run_id: str) -> str:
        """Address of a run's page; empty when the tracker is a database without a server."""
        if not self.uri.startswith("http"):
            return ""
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"

    def _find(self, key: str) -> TrackedRun | None:
        with translated(self.uri):
            found = self.client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return TrackedRun(self, found[0].info.run_id) if found else None

    def _create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        # Beside the database where there is no server: MLflow's own default is the working folder.
        location = None if self.uri.startswith("http") else settings().at("mlflow-artifacts")
        try:
            return str(self.client.create_experiment(self.experiment, artifact_location=location))
        except MlflowException:
            found = self.client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return str(found.experiment_id)


class TrackedRun:
    """One run. Everything but `log_metrics` talks to the server at once and raises `ServiceError` when it is away."""

    def __init__(self, tracker: Tracker, run_id: str) -> None:
        self.tracker = tracker
        self.run_id = run_id
        self._metrics: MetricQueue[NumberAtStep] = MetricQueue(self._send_metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            # The error that is under way matters more than a server that is away.
            with contextlib.suppress(ServiceError):
                self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    @property
    def url(self) -> str:
        """Address of the run's page, "" without a server."""
        return self.tracker.run_url(self.run_id)

    def log_config(self, config: Config, *, name: str = "config") -> None:
        """The resolved config: flattened to parameters, whole as `NAME.json`, its digest as a tag.

        Parameters of MLflow cannot change; those that differ on a reopened run keep their first value, with a warning.
        """
        value = config.to_json()
        with translated(self.tracker.uri):
            known = self.tracker.client.get_run(self.run_id).data.params
        params = {key: text for key, text in flatten(value).items() if key not in known}
        changed = [key for key, text in flatten(value).items() if known.get(key, text) != text]
        if changed:
            log.warning("run %s was opened with other values of %s", self.run_id, ", ".join(changed))
        self._log_params(params)
        self.log_tags({f"{name}.sha256": sha256_json(value)})
        self.log_bytes(pretty_json(value), f"{name}.json")

    def log_dataset(self, name: str, *, url: str, digest: str, context: str = "training") -> None:
        """The data set the run read: its address and the sha256 of its manifest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"url": url, "manifest_sha256": digest})
        dataset = Dataset(name=name, digest=digest[:DIGEST_CHARS], source_type="foreframe", source=source)
        entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
        with translated(self.tracker.uri):
            self.tracker.client.log_inputs(self.run_id, datasets=[entry])
        self.log_tags({"data.manifest_sha256": digest})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Buffer numbers of one step; returns at once whatever the server does."""
        now_ms = int(time.time() * 1000)
        self._metrics.put([(clean_key(key), float(value), now_ms, step) for key, value in metrics.items()])

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; the same key again replaces."""
        from mlflow.entities import RunTag

        if tags:
            with translated(self.tracker.uri):
                self.tracker.client.log_batch(self.run_id, tags=[RunTag(key, str(tags[key])) for key in tags])

    def log_file(self, path: Path, *, folder: str = "") -> None:
        """Attach a local file."""
        with translated(self.tracker.uri):
            self.tracker.client.log_artifact(self.run_id, str(path), folder or None)

    def log_folder(self, path: Path, *, folder: str = "") -> None:
        """Attach all files below a local folder."""
        with translated(self.tracker.uri):
            self.tracker.client.log_artifacts(self.run_id, str(path), folder or None)

    def log_bytes(self, data: bytes, name: str) -> None:
        """Attach bytes as a file called `name`, which may hold folders."""
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            self.log_file(path, folder="" if parent == "." else parent)

    def flush(self, *, timeout_s: float = FLUSH_TIMEOUT_S) -> int:
        """Wait until buffered metrics are delivered; returns how many are not, which is also logged."""
        return self._metrics.flush(timeout_s)

    def finish(self, status: Status = "FINISHED") -> None:
        """Deliver what is buffered and close the run; it can be reopened."""
        self.flush()
        with translated(self.tracker.uri):
            self.tracker.client.set_terminated(self.run_id, status)

    def _send_metrics(self, batch: Sequence[NumberAtStep]) -> None:
        # Imported in the queue's thread: the first import of mlflow takes seconds.
        from mlflow.entities import Metric

        with translated(self.tracker.uri):
            self.tracker.client.log_batch(self.run_id, metrics=[Metric(*number) for number in batch])

    def _log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entries), MAX_PARAMS_PER_BATCH):
            with translated(self.tracker.uri):
                self.tracker.client.log_batch(self.run_id, params=entries[start : start + MAX_PARAMS_PER_BATCH])


def flatten(value: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Nested values under dotted keys, as text within MLflow's limits; lists stay one value."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        dotted = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            flat |= flatten(item, prefix=f"{dotted}.")
        else:
            text = item if isinstance(item, str) else json.dumps(item)
            flat[clean_key(dotted)] = text[:MAX_PARAM_CHARS]
    return flat


def clean_key(key: str) -> str:
    """A name MLflow accepts: `J&F` becomes `J_and_F`."""
    return re.sub(r"[^\w\-. :/]", "_", key.replace("&", "_and_"))[:MAX_KEY_CHARS]


@contextlib.contextmanager
def translated(uri: str) -> Iterator[None]:
    """What MLflow and its transports raise becomes a `ServiceError` that names the address."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ServiceError(f"tracking at {uri} failed: {first}", remedy="Is the server up? `foreframe up`") from error


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """MLflow tells of every table it makes; that is no news to anyone."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow.store.db.utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
