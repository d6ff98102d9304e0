"""Data set addresses as the clip sources of a preset, and caches put into a config's sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from infra.errors import ConfigError, InputError
from ingest.windows import ClipSource, ClipWindows, WindowRule


def clip_sources(data: str | Sequence[str | ClipSource], rule: WindowRule | None = None) -> tuple[ClipSource, ...]:
    """Sources as they are; an address becomes a source named after its folder, its clips cut by `rule`."""
    given = [data] if isinstance(data, str) else list(data)
    if not given:
        raise ConfigError("no data set is given.", remedy="Name at least one.")
    # Short episodes repeat their last frame, as in the official code: an address alone says nothing of its lengths.
    rule = rule or WindowRule(short="repeat")
    names = [PurePosixPath(item).name for item in given if isinstance(item, str)]
    taken = [item.name for item in given if isinstance(item, ClipSource)]
    sources = []
    for item in given:
        if isinstance(item, ClipSource):
            sources.append(item)
            continue
        name = PurePosixPath(item).name
        ambiguous = names.count(name) > 1 or name in taken
        sources.append(ClipSource(name=item if ambiguous else name, url=item, rule=rule))
    return tuple(sources)


def with_latents(sources: Sequence[ClipSource], caches: Mapping[str, str]) -> tuple[ClipSource, ...]:
    """The sources with the latent cache of their data set (url -> its cache's url); `ConfigError` when one lacks it."""
    if missing := sorted({source.url for source in sources} - set(caches)):
        raise ConfigError(f"no latent cache is given for {', '.join(missing)}.", remedy="Cache all data sets or none.")
    return tuple(source.model_copy(update={"latents": caches[source.url]}) for source in sources)


def held_out(sources: Sequence[ClipSource]) -> tuple[ClipSource, ...]:
    """The same sources in the validation split, read from pixels; without those that have nothing there."""
    wanted = [source.model_copy(update={"split": "validation", "latents": ""}) for source in sources]
    return tuple(source for source in wanted if _has_clips(source))


def _has_clips(source: ClipSource) -> bool:
    try:
        return len(ClipWindows(source)) > 0
    except InputError:
        return False  # a small data set may have nothing of one label to spare
