"""The first command in a fresh folder finds a place for Prefect's files."""

from pathlib import Path

import pytest

from infra.settings import settings
from pipelines.deployments import prepare_prefect


def test_prefects_home_is_made_below_a_home_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    monkeypatch.setenv("FOREFRAME_HOME", str(tmp_path / "not" / "there"))
    settings.cache_clear()
    try:
        prepare_prefect()
        assert (tmp_path / "not" / "there" / "prefect").is_dir()
    finally:
        settings.cache_clear()
