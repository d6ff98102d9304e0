"""Prefect's side of `foreframe up`: a profile that points the user's shell at our server, and the deployments.

Inside the repository `pyproject.toml` turns the plugin on; anywhere else the profile does, and it names the server.
The profile is the only thing outside the home folder that `up` changes; `down` puts the former one back.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from infra.errors import ConfigError, InputError, ServiceError
from infra.settings import settings

log = logging.getLogger(__name__)

PROFILE = "foreframe"
DEPLOY_TIMEOUT_S = 180.0
FLOW_MODULES = {
    "ingest-corpus": "pipelines.flows.ingest_corpus",
    "pretrain-rsp": "pipelines.flows.pretrain_rsp",
    "train-policy": "pipelines.flows.train_policy",
    "finetune-tvp": "pipelines.flows.finetune_tvp",
    "ablations-vpp": "pipelines.flows.ablations_vpp",
    "evaluate": "pipelines.flows.evaluate",
    "promote": "pipelines.flows.promote",
    "demo": "pipelines.flows.demo",
}


def activate_profile(api_url: str) -> str:
    """Write the profile and make it the active one; returns the name of the one that was active, "" for none."""
    from prefect.settings import PREFECT_API_URL, PREFECT_PLUGINS_ENABLED, Profile
    from prefect.settings.profiles import load_profiles, save_profiles

    profiles = load_profiles(include_defaults=False)
    previous = profiles.active_name if profiles.active_name != PROFILE else ""
    if PROFILE in profiles.names:
        profiles.remove_profile(PROFILE)
    wanted = {PREFECT_API_URL: api_url, PREFECT_PLUGINS_ENABLED: True}
    profiles.add_profile(Profile(name=PROFILE, settings=wanted))
    profiles.set_active(PROFILE)
    save_profiles(profiles)
    return previous or ""


def restore_profile(previous: str) -> None:
    """Remove our profile; if it is still the active one, the former one becomes active again."""
    from prefect.settings.profiles import load_profiles, save_profiles

    profiles = load_profiles(include_defaults=False)
    if profiles.active_name == PROFILE:
        profiles.set_active(previous or None, check=False)
    if PROFILE in profiles.names:
        profiles.remove_profile(PROFILE)
    save_profiles(profiles)


def overriding_variables() -> list[str]:
    """Variables of this shell that win over the profile, so that `prefect` would not talk to our server."""
    return [name for name in ("PREFECT_API_URL", "PREFECT_PROFILE") if os.environ.get(name)]


def prefect_file() -> Path:
    """`prefect.yaml` beside the packages."""
    path = Path(__file__).parents[1] / "prefect.yaml"
    if not path.is_file():
        raise InputError(f"{path} does not exist.", remedy="Install from a checkout: pip install -e .")
    return path


def deploy(api_url: str = "") -> list[str]:
    """Create or update all deployments of `prefect.yaml` on a server; returns their names."""
    url = api_url or settings().prefect_api_url or os.environ.get("PREFECT_API_URL", "")
    if not url:
        raise ConfigError("no Prefect server is known.", remedy="Run `foreframe up`, or set PREFECT_API_URL.")
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_file())]
    env = {**os.environ, "PREFECT_API_URL": url}
    try:
        done = subprocess.run(
            argv,
            cwd=prefect_file().parent,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEPLOY_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ServiceError(f"`prefect deploy` took more than {DEPLOY_TIMEOUT_S:g} s.", remedy="Try again.") from None
    if done.returncode:
        last = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()][-3:]
        raise ServiceError(f"`prefect deploy` failed: {' '.join(last)}", remedy=f"Run: {' '.join(argv)}")
    return list(FLOW_MODULES)


def prepare_prefect() -> None:
    """Before prefect is imported: the running server, else a private one that ends with this process.

    The private server keeps its files in the home folder, so that a profile of the user that names a server which
    is away does not matter here. What the user has exported wins.
    """
    known = settings()
    if known.prefect_api_url:
        os.environ.setdefault("PREFECT_API_URL", known.prefect_api_url)
        return
    if "PREFECT_API_URL" in os.environ:
        return
    home = Path(os.environ.setdefault("PREFECT_HOME", str(known.local_home / "prefect")))
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder only
    os.environ.setdefault("PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "true")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
