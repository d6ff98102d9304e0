"""Where things live and which servers to talk to: from the environment only, never from a config file.

Configs describe *what* is computed and are hashed; settings describe *where* and are not.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.storage import absolute, join

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


class Settings(BaseSettings):
    """`FOREFRAME_*` variables; `foreframe up` writes a file of them that later commands read."""

    model_config = SettingsConfigDict(env_prefix="FOREFRAME_", frozen=True, extra="ignore")

    home: str = "runs"  # local folder or s3:// prefix below which every output lands
    tracking_uri: str = ""  # empty: sqlite in the home folder
    ray_address: str = ""  # GCS address of a running cluster, host:port
    ray_dashboard_url: str = ""  # the Jobs API lives there
    ray_token_path: str = ""  # file with the token that API asks for
    backend: Literal["inline", "local", "jobs"] = "local"
    cache_folder: str = "~/.cache/foreframe/shards"  # whole shards of s3:// data sets, one folder per node
    cache_bytes: int = 50_000_000_000
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
        folder = Path(self.home_url) if "://" not in self.home_url else Path("runs").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{folder / 'mlflow.db'}"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process; `settings.cache_clear()` after the environment changed."""
    return Settings()
