"""Fixtures shared by the whole suite. Each area keeps its own in `tests/fixtures_<area>.py`."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings

from pipelines.console import PACKAGES

pytest_plugins = ["tests.fixtures_ray", "tests.fixtures_s3", "tests.fixtures_services", "tests.fixtures_web"]

# Same examples every time, and no deadline: test machines are shared.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command run in this process sets up its own log lines, on a stream that is gone after its test."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
