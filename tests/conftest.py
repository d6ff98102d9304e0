"""Fixtures shared by the whole suite. Each area keeps its own in `tests/fixtures_<area>.py`."""

from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["tests.fixtures_ray", "tests.fixtures_s3", "tests.fixtures_services"]

# Same examples every time, and no deadline: test machines are shared.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")
