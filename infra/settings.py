"""Where things live and which servers to talk to: from the environment, else from the services that `up` started.

Configs describe *what* is computed and are hashed; settings describe *where* and are not.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from infra.processes import ProcessId, is_alive
from infra.storage import absolute, is_remote, join

# Quiet, local defaults for every process we start; the user's own environment wins.
QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # else the dashboard's Train tab stays empty
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
}


DEFAULT_HOME = "runs"
# Which service must run for a value of `state.json` to count.
SERVICE_OF = {
    "tracking_uri": "mlflow",
    "ray_dashboard_url": "ray",
    "ray_token_path": "ray",
    "prefect_api_url": "prefect-server",
}


class ServiceSettings(BaseModel):
    """What `foreframe up` tells later commands of the services it started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tracking_uri: str = ""
    ray_dashboard_url: str = ""
    ray_token_path: str = ""
    prefect_api_url: str = ""


class Settings(BaseSettings):
    """`FOREFRAME_*` variables; what they leave open is taken from `<home>/services/state.json` while those run."""

    model_config = SettingsConfigDict(env_prefix="FOREFRAME_", frozen=True, extra="ignore")

    home: str = DEFAULT_HOME  # local folder or s3:// prefix below which every output lands
    tracking_uri: str = ""  # empty: sqlite in the home folder
    ray_address: str = ""  # GCS address of a running cluster, host:port
    ray_dashboard_url: str = ""  # the Jobs API lives there
    ray_token_path: str = ""  # file with the token that API asks for
    prefect_api_url: str = ""
    backend: Literal["inline", "local", "jobs"] = "local"
    cache_folder: str = "~/.cache/foreframe/shards"  # whole shards of s3:// data sets, one folder per node
    cache_bytes: int = 50_000_000_000
    download_allow_hosts: str = ""  # host:port pairs that `ingest urls` may ask although they are private
    corpus: str = ""  # an extra folder of videos in the annotated layout
    golden: str = ""  # folder of reference numbers for parity tests

    @property
    def home_url(self) -> str:
        """`home`, independent of the working folder."""
        return absolute(self.home)

    def at(self, *parts: str) -> str:
        """A url below the home folder."""
        return join(self.home_url, *parts)

    @property
    def mlflow_uri(self) -> str:
        """The tracking URI to use: the server's, else an SQLite file (a plain file store is refused by MLflow)."""
        if self.tracking_uri:
            return self.tracking_uri
        self.local_home.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{self.local_home / 'mlflow.db'}"

    @property
    def local_home(self) -> Path:
        """The home folder, or a local one where that is on S3: for databases, logs and process ids."""
        return _local(self.home)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The running services come last."""
        return (*sources, *named.values(), _RunningServices(settings_cls))


class _RunningServices(PydanticBaseSettingsSource):
    """`state.json` of the home folder, as far as its processes live."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the interface; `__call__` answers for all fields at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = state_path(str(self.current_state.get("home") or DEFAULT_HOME))
        try:
            state = json.loads(path.read_bytes())
            alive = {
                name: is_alive(ProcessId.model_validate(service["process"]))
                for name, service in state["services"].items()
            }
            return {
                key: value for key, value in state["settings"].items() if value and alive.get(SERVICE_OF.get(key, ""))
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}  # nothing was started, or `up` is just writing for the first time


def state_path(home: str = "") -> Path:
    """Where `foreframe up` notes what it started."""
    return services_folder(home) / "state.json"


def services_folder(home: str = "") -> Path:
    """Logs, databases and credentials of the services; always local."""
    return (_local(home) if home else settings().local_home) / "services"


def _local(home: str) -> Path:
    return Path(DEFAULT_HOME).absolute() if is_remote(home) else Path(home).expanduser().absolute()


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process; `settings.cache_clear()` after the environment changed."""
    return Settings()
