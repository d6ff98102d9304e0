"""A web server on loopback with four videos, for corpora of addresses."""

from __future__ import annotations

import pytest

from infra.settings import settings
from tests.helpers_http import site
from tests.helpers_media import make_video


@pytest.fixture(scope="module")
def web_videos(tmp_path_factory) -> list[bytes]:
    """Four different videos of two seconds."""
    folder = tmp_path_factory.mktemp("videos")
    sizes = ("96x64", "64x64", "80x64", "64x96")
    return [make_video(folder / f"{size}.mp4", frames=24, size=size).read_bytes() for size in sizes]


@pytest.fixture
def web(web_videos, monkeypatch):
    """Serves /v0.mp4 to /v3.mp4, and what a test plants; allowed by the setting that users have."""
    with site() as here:
        for number, data in enumerate(web_videos):
            here.serve(f"/v{number}.mp4", data)
        monkeypatch.setenv("FOREFRAME_DOWNLOAD_ALLOW_HOSTS", f"{here.host}, other.test:81")
        settings.cache_clear()
        yield here
    monkeypatch.undo()
    settings.cache_clear()
