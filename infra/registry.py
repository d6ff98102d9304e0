"""Registered models: exports as versions, and the aliases `candidate`, `champion` and `previous` that name them.

A version is a logged model that holds the export's own files (safetensors and JSON, nothing pickled). Every change is
read back, and repeating it changes nothing: the same export is the same version, the same promotion one promotion.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from infra.config import Config
from infra.errors import InputError, ServiceError
from infra.storage import get_folder
from infra.tracking import Tracker, clean_key, quiet_mlflow, translated

log = logging.getLogger(__name__)

ENCODER = "foreframe-encoder"
VIDEO = "foreframe-video"
POLICY = "foreframe-policy"
CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
DIGEST_TAG, URL_TAG, RESULT_TAG = "foreframe.digest", "foreframe.url", "foreframe.result"
GATE_STATUS_TAG, GATE_REASONS_TAG = "gate.status", "gate.reasons"
MISSING = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})  # the second is what a missing alias gives


class ModelVersion(Config):
    """One version of a registered model, as the registry knew it when asked."""

    name: str
    version: int
    export_digest: str  # sha256 of the weights
    url: str  # the export's own address
    run_id: str = ""
    aliases: tuple[str, ...] = ()
    tags: dict[str, str] = Field(default_factory=dict)

    @property
    def gate_reasons(self) -> tuple[str, ...]:
        """Why the gate promoted or refused it; empty before it was asked."""
        return tuple(json.loads(self.tags.get(GATE_REASONS_TAG, "[]")))


class Registry:
    """The model registry of a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def register(
        self,
        name: str,
        export_url: str,
        *,
        digest: str,
        run_id: str = "",
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> ModelVersion:
        """Register an export (folder or `s3://`) as a version and give it the alias `candidate`.

        An export whose digest is registered already keeps its version.
        """
        found = self.by_digest(name, digest)
        version = found.version if found else self._create(name, export_url, digest, run_id, dict(params or {}))
        self.tag(name, version, tags or {})
        self.set_alias(name, CANDIDATE, version)
        return self.version(name, version)

    def version(self, name: str, version: int) -> ModelVersion:
        """One version; `InputError` when it does not exist."""
        found = self._ask(lambda: self.tracker.client.get_model_version(name, str(version)))
        if found is None:
            raise InputError(
                f"{name} has no version {version}.", remedy="See the registry's page or `foreframe lineage`."
            )
        return _record(found)

    def tag(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version; the same key again replaces."""
        for key, value in tags.items():
            with translated(self.tracker.uri):
                self.tracker.client.set_model_version_tag(name, str(version), key, str(value))

    def alias(self, name: str, alias: str) -> ModelVersion | None:
        """The version an alias names, None when nothing has it."""
        found = self._ask(lambda: self.tracker.client.get_model_version_by_alias(name, alias))
        # Versions found by alias come without their full list of aliases.
        return self.version(name, int(found.version)) if found is not None else None

    def by_digest(self, name: str, digest: str) -> ModelVersion | None:
        """The version with these weights."""
        with translated(self.tracker.uri):
            found = self.tracker.client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
        return self.version(name, min(int(item.version) for item in found)) if found else None

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Move an alias and read it back; there is no compare-and-set, so promotions must not run at the same time."""
        with translated(self.tracker.uri):
            self.tracker.client.set_registered_model_alias(name, alias, str(version))
        now = self.alias(name, alias)
        if now is None or now.version != version:
            held = now.version if now else "nothing"
            raise ServiceError(
                f"alias {alias} of {name} names {held} after it was set to {version}.", remedy="Try again."
            )

    def promote(self, name: str, version: int, *, reasons: Sequence[str]) -> ModelVersion:
        """Make a version the champion and its predecessor `previous`. The champion again is no change."""
        champion = self.alias(name, CHAMPION)
        if champion is not None and champion.version != version:
            # First, so that a crash between the two leaves a champion in office.
            self.set_alias(name, PREVIOUS, champion.version)
        self._note(name, version, "promoted", reasons)
        if champion is None or champion.version != version:
            self.set_alias(name, CHAMPION, version)
            log.info("%s version %d is champion", name, version)
        return self.version(name, version)

    def reject(self, name: str, version: int, *, reasons: Sequence[str]) -> ModelVersion:
        """Note on a version why it was refused; aliases stay."""
        self._note(name, version, "rejected", reasons)
        return self.version(name, version)

    def log_metrics(self, name: str, version: int, metrics: Mapping[str, float]) -> None:
        """Numbers of an evaluation, on the version's logged model and its run."""
        from mlflow.entities import Metric

        with translated(self.tracker.uri):
            found = self.tracker.client.get_model_version(name, str(version))
            if not found.run_id:
                return
            now = int(time.time() * 1000)
            batch = [
                Metric(clean_key(key), float(value), now, 0, model_id=found.model_id, run_id=found.run_id)
                for key, value in metrics.items()
            ]
            self.tracker.client.log_batch(found.run_id, metrics=batch)

    def download(self, name: str, alias_or_version: str, target: Path) -> Path:
        """Fetch a version's files into a folder, from the registry itself and not from the export's address."""
        is_alias = not alias_or_version.isdigit()
        found = self.alias(name, alias_or_version) if is_alias else self.version(name, int(alias_or_version))
        if found is None:
            raise InputError(f"{name} has no alias {alias_or_version!r}.", remedy="Promote a version first.")
        from mlflow.artifacts import download_artifacts

        target.mkdir(parents=True, exist_ok=True)
        uri = f"models:/{name}/{found.version}"
        with translated(self.tracker.uri):
            return Path(download_artifacts(uri, dst_path=str(target), tracking_uri=self.tracker.uri))

    def _create(self, name: str, export_url: str, digest: str, run_id: str, params: dict[str, str]) -> int:
        import mlflow

        client = self.tracker.client
        # The database's registry looks the logged model up through the process-wide address, not through the client's.
        mlflow.set_tracking_uri(self.tracker.uri)
        tags = {DIGEST_TAG: digest, URL_TAG: export_url}
        with tempfile.TemporaryDirectory() as temporary, quiet_mlflow(), translated(self.tracker.uri):
            folder = get_folder(export_url, Path(temporary))
            model = client.create_logged_model(
                self.tracker.experiment_id, name, run_id or None, tags, params, "foreframe-export"
            )
            client.log_model_artifacts(model.model_id, str(folder))
            client.finalize_logged_model(model.model_id, "READY")
            if self._ask(lambda: client.get_registered_model(name)) is None:
                client.create_registered_model(name)
            created = client.create_model_version(
                name,
                model.artifact_location,
                run_id or None,
                tags=tags,
                model_id=model.model_id,
                await_creation_for=0,
            )
        log.info("registered %s as version %s of %s", digest[:12], created.version, name)
        return int(created.version)

    def _note(self, name: str, version: int, status: str, reasons: Sequence[str]) -> None:
        with translated(self.tracker.uri):
            client = self.tracker.client
            client.set_model_version_tag(name, str(version), GATE_STATUS_TAG, status)
            client.set_model_version_tag(name, str(version), GATE_REASONS_TAG, json.dumps(list(reasons)))

    def _ask(self, call: Any) -> Any:
        """The answer, None where the registry says that there is no such thing."""
        from mlflow.exceptions import MlflowException

        with translated(self.tracker.uri):
            try:
                return call()
            except MlflowException as error:
                if error.error_code in MISSING:
                    return None
                raise


def _record(found: Any) -> ModelVersion:
    tags = {str(key): str(value) for key, value in (found.tags or {}).items()}
    return ModelVersion(
        name=found.name,
        version=int(found.version),
        export_digest=tags.get(DIGEST_TAG, ""),
        url=tags.get(URL_TAG, ""),
        run_id=found.run_id or "",
        aliases=tuple(sorted(found.aliases or ())),
        tags=tags,
    )
