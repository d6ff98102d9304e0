"""Records of single episodes, written as each ends: what a killed evaluation goes on from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from evaluation.result import Item
from evaluation.rollouts.loop import clip_fps
from evaluation.rollouts.player import Rollout
from infra.config import Config
from infra.digests import short
from infra.errors import InputError
from infra.media_encode import encode_video
from infra.storage import join, list_names, read_json, write_bytes, write_json
from ingest.simulators.metaworld import CONTROL_HZ

EPISODES, CLIPS = "episodes", "clips"
CLIP_CRF = 23
SUCCESS_EVER = "success_ever"
SUCCESS_LAST = "success_last"
STEPS = "steps"


class EpisodeRecord(Config):
    """One rollout of one arm; `model_digest` says of which weights, `suite_version` under which protocol."""

    model_digest: str
    suite_version: str
    item: Item
    clip: str = ""  # path below the output


def item_of(rollout: Rollout, task: str) -> Item:
    """The record of `result.json`."""
    metrics = {SUCCESS_EVER: float(rollout.ever), STEPS: float(rollout.steps)}
    if rollout.last is not None:
        metrics[SUCCESS_LAST] = float(rollout.last)
    details: dict[str, Any] = {"task": task, "seed": rollout.seed, "stopped_at_success": rollout.last is None}
    return Item(item_id=f"{task}/{rollout.seed}", stratum=task, metrics=metrics, details=details)


class Records:
    """The episodes of an output folder: one JSON each, `episodes/ARM/TASK/SEED.json`, its clip before it."""

    def __init__(self, output: str, *, suite_version: str, clip_stride: int) -> None:
        self._output, self._suite_version, self._clip_stride = output, suite_version, clip_stride
        self._found: dict[tuple[str, str, int], EpisodeRecord] = {}
        for name in list_names(join(output, EPISODES), recursive=True):
            parts = name.removesuffix(".json").split("/")
            if len(parts) == 3 and parts[2].isdigit():
                record = EpisodeRecord.parse(read_json(join(output, EPISODES, name)))
                self._found[parts[0], parts[1], int(parts[2])] = record

    def __len__(self) -> int:
        return len(self._found)

    def get(self, arm: str, task: str, seed: int) -> EpisodeRecord:
        """One episode that was played."""
        return self._found[arm, task, seed]

    def played(self, arm: str, task: str, seeds: tuple[int, ...], *, digest: str) -> frozenset[int]:
        """Which of the seeds are recorded; `InputError` if by another model or protocol."""
        found = {seed: self._found[arm, task, seed] for seed in seeds if (arm, task, seed) in self._found}
        for seed, record in found.items():
            for what, then, now in (
                ("model", short(record.model_digest), short(digest)),
                ("suite version", record.suite_version, self._suite_version),
            ):
                if then != now:
                    raise InputError(
                        f"{self._output} holds {arm} on {task}/{seed} of {what} {then}, it now is {now}.",
                        remedy="Choose another output folder.",
                    )
        return frozenset(found)

    def add(self, arm: str, task: str, rollout: Rollout, *, digest: str) -> None:
        """Keep an episode that has just ended."""
        clip = self._store_clip(arm, task, rollout) if rollout.frames else ""
        record = EpisodeRecord(
            model_digest=digest, suite_version=self._suite_version, item=item_of(rollout, task), clip=clip
        )
        write_json(join(self._output, EPISODES, arm, task, f"{rollout.seed}.json"), record.to_json())
        self._found[arm, task, rollout.seed] = record

    def _store_clip(self, arm: str, task: str, rollout: Rollout) -> str:
        path = f"{CLIPS}/{task}/{arm}-{rollout.seed}.mp4"
        with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
            local = Path(folder) / "clip.mp4"
            encode_video(rollout.frames, local, fps=clip_fps(CONTROL_HZ, self._clip_stride), crf=CLIP_CRF)
            write_bytes(join(self._output, path), local.read_bytes())
        return path
