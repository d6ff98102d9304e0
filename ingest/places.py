"""Where an ingest reads and writes: checked before anything is looked at, so that a slip of the hand costs no hour."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from infra.errors import ForeframeError, InputError
from infra.storage import absolute, exists, is_remote
from ingest.corpora import corpus_module
from ingest.plan import Plan
from ingest.recipe import IngestConfig

log = logging.getLogger(__name__)


def placed(config: IngestConfig) -> IngestConfig:
    """The config with absolute places. Raises `InputError` where source or output cannot be what they have to be."""
    parent = absolute(config.replay_failures) if config.replay_failures else ""
    places = {"source": absolute(config.source), "output": absolute(config.output), "replay_failures": parent}
    config = config.model_copy(update=places)
    _check_output(config.output, config.source)
    return config


def check_source(config: IngestConfig) -> None:
    """Raises `InputError` unless the source is there and is a folder (or, for `urls`, a table)."""
    source = config.source
    if not is_remote(source):
        path = Path(source)
        if not path.exists():
            raise InputError(f"{source} does not exist.", remedy="Check the path of the corpus.")
        if path.is_file() and config.corpus != "urls":
            raise InputError(
                f"{source} is a file.", remedy=f"Corpus {config.corpus!r} is a folder: give the one above."
            )
        return
    bucket = "s3://" + source.removeprefix("s3://").split("/")[0]
    if not exists(bucket):
        raise InputError(f"{bucket} does not exist.", remedy="Check the bucket of the corpus.")


def note_what_is_new(plan: Plan, config: IngestConfig) -> None:
    """Say which clips of the source a finished data set does not hold. A source that is gone is no matter."""
    if plan.parent or config.corpus == "urls":
        return
    try:
        check_source(config)
        listed = {clip.source_id for clip in corpus_module(config.corpus).list_clips(config.source)}
    except ForeframeError as error:
        log.warning("the source was not looked at: %s", error.message)
        return
    known = {clip.clip.source_id for shard in plan.shards for clip in shard.clips}
    known |= {failure.source_id for shard in plan.shards for failure in shard.failures}
    if new := sorted(listed - known):
        what = f"{len(new)} of {len(listed)} clips of {config.source} are not in it, first {new[0]!r}"
        log.warning("%s was made before and does not change; %s: give a new OUT", config.output, what)


def _check_output(output: str, source: str) -> None:
    if is_remote(output):
        bucket = "s3://" + output.removeprefix("s3://").split("/")[0]
        if not exists(bucket):
            raise InputError(f"{bucket} does not exist.", remedy="Create the bucket first.")
        return
    if output == source:
        raise InputError(f"{output} is both SOURCE and OUT.", remedy="Give OUT a folder of its own.")
    place = Path(output)
    if place.exists() and not place.is_dir():
        raise InputError(f"{output} is a file.", remedy="Give OUT a folder of its own.")
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{output} cannot be made: {there} is no writable folder.", remedy="Give another OUT.")
