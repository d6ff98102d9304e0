"""The lock is versions only, and the set it names works together."""

import importlib.metadata
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()


def test_lock_holds_no_address():
    assert "://" not in LOCK
    assert not re.search(r"^\s*(--|-[ifr]\b)", LOCK, re.MULTILINE), "an option line could carry an index"


def test_every_direct_requirement_is_locked():
    requirements = importlib.metadata.requires("foreframe") or []
    assert requirements
    names = {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in requirements}
    locked = {line.split("==")[0].lower() for line in LOCK.splitlines() if "==" in line}
    assert names - locked == set()


def test_prefect_server_imports():
    """A newer fastapi satisfies every declared range and kills the Prefect server at import."""
    import prefect.server.api.server  # noqa: F401
