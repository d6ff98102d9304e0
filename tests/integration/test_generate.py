"""Demonstrations on disk: the same bytes every time, every clip what its record says, every planted one broken."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from infra.errors import InputError
from infra.media import MediaError, scan
from infra.media_decode import decode_span, decode_video
from ingest.simulators.config import SimulateConfig
from ingest.simulators.generate import Corpus, run
from ingest.simulators.metaworld import MetaWorldEnv, Renderer

pytestmark = pytest.mark.sim

SMALL = {"tasks": ("handle-press", "coffee-button"), "episodes": 2, "size": 64, "damage": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Corpus]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, run(SimulateConfig(output=str(folder), workers=1, **SMALL))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_files_records_and_arrays_fit_together(made):
    folder, corpus = made
    assert (corpus.num_episodes, corpus.oracle_rate) == (4, 1.0)
    for task in SMALL["tasks"]:
        for seed in (0, 1):
            stem = folder / task / f"seed-{seed:05d}"
            record = json.loads(stem.with_suffix(".json").read_text())
            assert (record["task"], record["seed"], record["success"]) == (task, seed, True)
            assert record["render"] == {"goal_marker": False, "multisampling": 0, "reflection": False, "shadow": False}
            frames = decode_video(stem.with_suffix(".mp4"))
            with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
                assert len(frames) == record["num_frames"] == len(arrays["actions"]) == len(arrays["proprioception"])
                assert arrays["success"].argmax() == record["first_success"] == len(frames) - 4  # and three frames on
                assert np.abs(arrays["executed_actions"]).max() <= 1
                noise = (arrays["executed_actions"] - arrays["actions"])[:, :3]
                assert 0.1 < noise.std() < 0.4  # 0.3 before clipping
                assert np.array_equal(arrays["executed_actions"][:, 3], arrays["actions"][:, 3])
                replay = MetaWorldEnv(task, seed)
                with Renderer(task, size=64) as renderer:
                    for step, action in enumerate(arrays["executed_actions"]):
                        assert np.array_equal(replay.proprioception, arrays["proprioception"][step])
                        assert np.array_equal(replay.oracle_action(), arrays["actions"][step])
                        difference = np.abs(renderer.render(replay).astype(int) - frames[step])
                        assert difference.mean() < 5  # the codec, most of it halved chroma
                        replay.step(action)


def test_two_processes_and_a_kill_in_between_give_the_same_bytes(made, tmp_path):
    folder, corpus = made
    config = SimulateConfig(output=str(tmp_path / "again"), workers=2, **SMALL)
    config.save(tmp_path / "config.json")
    code = (
        "import sys; from pathlib import Path\n"
        "from ingest.simulators.config import SimulateConfig\n"
        "from ingest.simulators.generate import run\n"
        "if __name__ == '__main__':\n"
        "    run(SimulateConfig.load(Path(sys.argv[1])))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    argv = [sys.executable, str(script), str(tmp_path / "config.json")]
    fault = {"FOREFRAME_FAULT": "simulate.before-record@coffee-button/seed-00001"}
    killed = subprocess.run(argv, env={**os.environ, **fault}, capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode != 0
    assert "a simulator process died" in killed.stderr
    assert not (tmp_path / "again" / "corpus.json").exists()
    before = (tmp_path / "again" / "handle-press" / "seed-00000.mp4").stat().st_mtime_ns
    assert run(config.model_copy(update={"workers": 1})) == corpus
    assert hashes(tmp_path / "again") == hashes(folder)
    assert (tmp_path / "again" / "handle-press" / "seed-00000.mp4").stat().st_mtime_ns == before


def test_a_rerun_does_nothing_and_another_config_is_refused(made):
    folder, corpus = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(SimulateConfig(output=str(folder), workers=2, **SMALL)) == corpus
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(InputError, match=r"another config \(different: episodes, noise\)"):
        run(SimulateConfig(output=str(folder), **{**SMALL, "episodes": 3, "noise": 0.0}))


def test_planted_files_are_broken_as_promised(made):
    folder, corpus = made
    planted = {Path(file.path).stem: file for file in corpus.damage}
    assert {name: file.reason for name, file in planted.items()} == {
        "planted-truncated": "truncated",
        "planted-empty": "empty",
        "planted-text": "not_video",
        "planted-concat": "hostile_container",
        "planted-short-decode": "short_decode",
    }
    for file in corpus.damage:
        with pytest.raises(MediaError) as refusal:
            list(decode_span(folder / file.path, scan(folder / file.path)))
        assert refusal.value.reason == file.reason
        assert (folder / file.path).with_suffix(".npz").exists()
        assert json.loads((folder / file.path).with_suffix(".json").read_text())["planted"]
    sizes = {
        name: ((folder / file.path).stat().st_size, (folder / file.donor).stat().st_size)
        for name, file in planted.items()
    }
    assert sizes["planted-empty"][0] == 0
    assert sizes["planted-truncated"][0] == sizes["planted-truncated"][1] * 6 // 10
    concat = folder / planted["planted-concat"].path
    name = concat.read_text().splitlines()[1].split("'")[1]
    assert (concat.parent / name).is_file()  # a reader that follows it would succeed, and must not
    declared, packets, decoded = count_frames(folder / planted["planted-short-decode"].path)
    assert packets == declared
    assert 0 < decoded < declared


def count_frames(path: Path) -> tuple[int, int, int]:
    """(declared, stored, decoded) as a player sees it that goes on after an error."""
    packets = decoded = 0
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            packets += packet.size > 0
            with contextlib.suppress(av.InvalidDataError):
                decoded += len(packet.decode())
        return container.streams.video[0].frames, packets, decoded


def test_a_worker_killed_by_the_system_is_told_in_a_sentence(tmp_path):
    from infra.errors import MachineError
    from ingest.simulators.workers import WorkerPool

    with WorkerPool(2) as pool, pytest.raises(MachineError, match="Run again: finished work is kept"):
        list(pool.map(_kill_self, [1, 2]))


def _kill_self(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
