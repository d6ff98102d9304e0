"""`foreframe doctor`: what this machine lacks, each with the command that mends it.

Only looks: nothing is installed, no credential is read, only whether there is one. Checks that know a stage (such as
the simulator's OpenGL) are given by the caller, for nothing is imported from the stages here.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from infra.errors import ForeframeError
from infra.services import MLFLOW_PORT, PREFECT_PORT, RAY_PORT, read_state
from infra.settings import settings
from infra.storage import is_remote

Verdict = Literal["ok", "note", "fail"]
DISTRIBUTION = "foreframe"
GIB = 1 << 30
MIN_DISK_BYTES = 3 * GIB  # the demo leaves about 1 GiB behind
MIN_MEMORY_BYTES = 4 * GIB
GOOD_MEMORY_BYTES = 8 * GIB
MIN_SHM_BYTES = 400 << 20
# Why a version outside the range is worse than old.
REASONS = {
    "fastapi": "the Prefect server dies at import with newer ones",
    "mujoco": "metaworld 3.1.1 does not work with other versions",
    "prefect": "the short deployment name wraps a private part of it",
    "ray": "token authentication and Train V2 changed between minor versions",
}


@dataclass(frozen=True)
class Check:
    """One line: `fail` stops something from working, `note` is worth knowing."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


Checker = Callable[[], list[Check]]


def examine(extra: Sequence[Checker] = ()) -> list[Check]:
    """Every check, in the order of the report. A check that itself meets a `ForeframeError` is a failed one."""
    checks: list[Check] = []
    for checker in (*CHECKERS, *extra):
        try:
            checks += checker()
        except ForeframeError as error:
            name = checker.__name__.removeprefix("check_").replace("_", " ")
            checks.append(Check(name, "fail", error.message, error.remedy))
    return checks


def report(checks: Sequence[Check]) -> str:
    """The checks as text; a failing line is followed by its remedy."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.verdict:<4}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<6}{'':<{width}}  -> {check.remedy}")
    failed = sum(check.verdict == "fail" for check in checks)
    return "\n".join([*lines, "", f"{failed} of {len(checks)} checks failed." if failed else "All is well."])


def check_python() -> list[Check]:
    """The interpreter's version."""
    version = sys.version.split()[0]
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return [Check("python", "ok", f"{version} at {sys.executable}")]
    return [Check("python", "fail", f"{version}, needed is 3.11 or 3.12", "PYTHON=python3.11 make setup")]


def check_packages() -> list[Check]:
    """Installed versions against the ranges that this package declares."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("packages", "fail", f"{DISTRIBUTION} is not installed", "pip install -e .")]
    needed = [item for item in map(Requirement, declared) if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong = [check for item in needed if (check := _check_requirement(item))]
    return wrong or [Check("packages", "ok", f"{len(needed)} requirements met")]


def check_ffmpeg() -> list[Check]:
    """The ffmpeg program: the system's, else the one that came with imageio-ffmpeg."""
    from infra.media_ffmpeg import ffmpeg_binary, ffmpeg_version

    return [Check("ffmpeg", "ok", f"{ffmpeg_version()} at {ffmpeg_binary()}")]


def check_disk() -> list[Check]:
    """Room for outputs, and for Ray's shared memory."""
    folder = settings().local_home
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    checks = [Check("disk", "ok", f"{_gib(free)} free at {existing}")]
    if free < MIN_DISK_BYTES:
        remedy = f"Free some at {existing}, or set FOREFRAME_HOME to a folder on a larger disk."
        checks = [Check("disk", "fail", f"{_gib(free)} free at {existing}, needed are {_gib(MIN_DISK_BYTES)}", remedy)]
    shm = Path("/dev/shm")  # noqa: S108  (looked at, not written)
    if shm.is_dir() and shutil.disk_usage(shm).free < MIN_SHM_BYTES:
        small = f"{_gib(shutil.disk_usage(shm).free)} free; Ray falls back to slower files"
        checks.append(
            Check("shared memory", "note", small, "mount -o remount,size=1G /dev/shm (docker: --shm-size=1g)")
        )
    return checks


def check_memory() -> list[Check]:
    """Memory that can be had now, a container's limit included."""
    available = _available_bytes()
    if available is None:
        return [Check("memory", "note", "cannot be told on this system")]
    detail = f"{_gib(available)} available, {os.cpu_count()} processors"
    if available < MIN_MEMORY_BYTES:
        return [Check("memory", "fail", f"{detail}; needed are {_gib(MIN_MEMORY_BYTES)}", "Close other programs.")]
    if available < GOOD_MEMORY_BYTES:
        return [Check("memory", "note", f"{detail}; `foreframe up` and a run beside it want {_gib(GOOD_MEMORY_BYTES)}")]
    return [Check("memory", "ok", detail)]


def check_services() -> list[Check]:
    """Whether the services run, else whether their usual ports are free."""
    state = read_state()
    if state is not None and state.is_running:
        urls = ", ".join(f"{name} {service.url}" for name, service in state.services.items() if service.url)
        return [Check("services", "ok", f"up: {urls}")]
    taken = [str(port) for port in (PREFECT_PORT, MLFLOW_PORT, RAY_PORT) if _is_taken(port)]
    if state is not None:
        return [Check("services", "fail", "some of them ended", "foreframe down && foreframe up")]
    if taken:
        return [Check("ports", "note", f"{', '.join(taken)} taken by others; `foreframe up` takes the next free ones")]
    return [Check("ports", "ok", f"{PREFECT_PORT}, {MLFLOW_PORT} and {RAY_PORT} are free; services are not up")]


def check_storage() -> list[Check]:
    """Where outputs go, and whether there are credentials for it."""
    home = settings().home_url
    sources = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN") if os.environ.get(name)]
    if (Path.home() / ".aws" / "credentials").is_file():
        sources.append("~/.aws/credentials")
    found = f"S3 credentials: {', '.join(sources) or 'none'}"
    if is_remote(home) and not sources:
        remedy = "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... (and AWS_ENDPOINT_URL for another store)"
        return [Check("storage", "fail", f"{home}; {found}", remedy)]
    return [Check("storage", "ok", f"{home}; {found}")]


def check_proxy() -> list[Check]:
    """A proxy that loopback addresses would go through."""
    proxies = [name for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy") if os.environ.get(name)]
    exempt = os.environ.get("NO_PROXY", os.environ.get("no_proxy", ""))
    if not proxies or exempt == "*" or "127.0.0.1" in exempt:
        return []
    detail = f"{proxies[0]} is set and 127.0.0.1 is not exempt: our servers would be asked through it"
    return [Check("proxy", "fail", detail, "export NO_PROXY=127.0.0.1,localhost")]


def check_short_name() -> list[Check]:
    """Whether Prefect can find our plugin."""
    names = [item.value for item in importlib.metadata.entry_points(group="prefect.plugins")]
    if "pipelines.prefect_plugin:plugin" in names:
        return [Check("prefect plugin", "ok", "`prefect deployment run pretrain-rsp` needs no slash")]
    remedy = "pip install -e . (until then: prefect deployment run pretrain-rsp/pretrain-rsp)"
    return [Check("prefect plugin", "fail", "is not registered", remedy)]


CHECKERS: tuple[Checker, ...] = (
    check_python,
    check_packages,
    check_short_name,
    check_ffmpeg,
    check_memory,
    check_disk,
    check_storage,
    check_services,
    check_proxy,
)


def _check_requirement(item: Requirement) -> Check | None:
    wanted = f"{item.name}{item.specifier}"
    reason = f"; {REASONS[item.name]}" if item.name in REASONS else ""
    remedy = f"pip install '{wanted}'"
    try:
        version = importlib.metadata.version(item.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(item.name, "fail", f"is not installed{reason}", remedy)
    if item.specifier.contains(version, prereleases=True):
        return None
    return Check(item.name, "fail", f"{version} is outside {item.specifier}{reason}", remedy)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _available_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
