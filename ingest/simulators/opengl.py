"""Headless OpenGL for MuJoCo: which backend works here, and the import order that keeps the process alive."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

from infra.errors import MachineError

log = logging.getLogger(__name__)

VARIABLE = "MUJOCO_GL"
NO_GL = "disable"
PROBE_TIMEOUT_S = 120
_prepared: set[int] = set()  # process ids: a forked child has to prepare itself
APT_COMMAND = "apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1-mesa-dri libgles2"
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data)
renderer.render()
renderer.close()
"""


def select_backend() -> str:
    """`egl`, else `osmesa`, else `disable` (physics without pictures); the choice is kept in `MUJOCO_GL`.

    A value the user set is respected. MuJoCo fixes its backend when it is imported, hence the subprocess, and hence
    this runs before any import of mujoco. Child processes inherit the answer.
    """
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen:
        return chosen
    if "mujoco" in sys.modules:
        raise MachineError(
            f"mujoco was imported while {VARIABLE} was not set, so it waits for a display.",
            remedy=f"Set {VARIABLE}=egl in the environment, or call prepare_rendering() before importing mujoco.",
        )
    chosen = next((name for name in ("egl", "osmesa") if _works(name)), NO_GL)
    os.environ[VARIABLE] = chosen
    log.info("OpenGL backend of the simulator: %s", chosen)
    return chosen


def prepare_rendering(*, torch_first: bool = True) -> str:
    """Make this process ready for its first renderer; returns the backend.

    `torch_first=False` is for processes that never train: it saves the import of torch. Everywhere else torch, triton
    and dynamo must be loaded before Mesa's LLVM is, or the first optimiser kills the process without a message.
    Raises `MachineError` with the command that installs OpenGL.
    """
    backend = select_backend()
    if backend == NO_GL:
        raise MachineError(
            f"no OpenGL for rendering without a screen ({VARIABLE}={backend}: neither EGL nor OSMesa works).",
            remedy=f"Install it: {APT_COMMAND}  (or: apt-get install -y libosmesa6), then unset {VARIABLE}.",
        )
    # One renderer per process and one process per core: Mesa's own threads only get in each other's way.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if torch_first:
        _import_torch()
    _prepared.add(os.getpid())
    return backend


def is_prepared() -> bool:
    """Whether this process called `prepare_rendering`; a renderer calls it otherwise."""
    return os.getpid() in _prepared


def _import_torch() -> None:
    import torch

    try:
        import triton  # noqa: F401
    except ImportError:
        log.debug("torch %s comes without triton: nothing to load before the renderer", torch.__version__)
        return
    import torch._dynamo


def _works(backend: str) -> bool:
    environment = {**os.environ, VARIABLE: backend, "PYOPENGL_PLATFORM": backend}
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0
