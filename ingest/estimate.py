"""How long an ingest will take, from a few of its clips tried on this very machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from infra.media_transcode import Span, Transcoded
from ingest.isolate import transcode_isolated
from ingest.plan import Plan
from ingest.reader import default_cache
from ingest.recipe import IngestConfig
from ingest.sample import ClipError, Workshop, build_sample

NUM_TRIALS = 3


def estimate(plan: Plan, config: IngestConfig) -> dict[str, Any]:
    """`estimated_minutes` with the config's workers (this machine's, where it names none); nothing is written.

    Clips spread over the plan are built in limited children, whose start is not counted; None where none can be.
    """
    clips = [clip for shard in plan.shards for clip in shard.clips if clip.estimated_bytes]
    settings, memory = config.recipe.transcoding(), config.recipe.item_memory_bytes

    def encode(path: Path, span: Span) -> Transcoded:
        return transcode_isolated(path, settings, span, memory_bytes=memory)

    shop = Workshop(config.source, config.corpus, config.recipe, default_cache())
    tried = 0
    number = min(NUM_TRIALS, len(clips))
    for clip in (clips[position * len(clips) // number] for position in range(number)):
        try:
            build_sample(clip, shop, encode)
        except ClipError:
            continue
        tried += clip.estimated_bytes
    if not tried:
        return {"estimated_minutes": None}
    seconds = sum(shop.seconds.values()) * sum(clip.estimated_bytes for clip in clips) / tried
    workers = os.cpu_count() or 1 if config.workers is None else max(1, config.workers)
    return {"estimated_minutes": round(seconds / 60 / workers, 4)}
