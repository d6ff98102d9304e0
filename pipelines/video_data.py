"""Which clips of which data sets: the sources of a fine-tuning, its evaluation and its previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from infra.errors import ConfigError, InputError
from infra.storage import absolute, exists, join, read_json
from ingest.reader import ShardDataset, load_manifest
from ingest.windows import ClipSource, WindowRule, labels_of
from training.export_files import is_complete
from training.models.tvp.official import is_diffusers_folder
from training.recipes.mixtures import annotated_sources, calvin_mix, paper_table8, robot_mix
from training.recipes.sources import clip_sources, held_out

ANNOTATED = "annotated"
MIXTURES: dict[str, Callable[..., tuple[ClipSource, ...]]] = {
    "calvin": calvin_mix,
    "robot": robot_mix,
    "paper-table8": paper_table8,
}
SPLITS = ("validation", "train", "all")
PRESETS = ("tiny", "svd")


def check_request(
    preset: str, data: Sequence[str], *, corpus: str = "", initial: str = "", is_plan: bool = False
) -> None:
    """What can be known to be wrong before anything is done: one `ConfigError` or `InputError`.

    A plan needs no weights.
    """
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}.", remedy=f"Known: {', '.join(PRESETS)}.")
    if preset == "svd" and not initial and not is_plan:
        raise ConfigError(
            "preset 'svd' fine-tunes released weights, and none are given.",
            remedy="Name a folder in Stable Video Diffusion's layout with --initial, or use preset tiny.",
        )
    if data and corpus:
        raise ConfigError(f"data sets and the corpus {corpus!r} are given.", remedy="Give one of the two.")
    if initial and not is_diffusers_folder(initial) and not is_complete(initial):
        raise InputError(
            f"{initial} is neither a folder in Stable Video Diffusion's layout nor a finished export.",
            remedy="Name the folder that holds model_index.json, or the export folder of a finetune-tvp run.",
        )
    for url in data:
        load_manifest(absolute(url))


def training_sources(urls: Sequence[str], *, rule: WindowRule, mixture: str = "") -> tuple[ClipSource, ...]:
    """One source for each data set, and for each label of an annotated one, which holds several data sets.

    Clips of annotated data are cut by the rule of their name, all others by `rule`; all have `rule.num_frames`
    frames. A published `mixture` gives shares, rules and cameras by name instead.
    """
    if mixture:
        return _mixed([absolute(url) for url in urls], mixture, num_frames=rule.num_frames)
    found: list[ClipSource] = []
    for url in map(absolute, urls):
        if load_manifest(url)[0].corpus == ANNOTATED:
            found.extend(annotated_sources(url, num_frames=rule.num_frames))
        else:
            found.extend(clip_sources(url, rule))
    return _distinct(found)


def evaluation_sources(model: str, data: str = "") -> tuple[ClipSource, ...]:
    """Held-out clips for a model, cut as in its training.

    Without `data` those of the data sets it was trained on; `InputError` when nothing is held out there. A data set
    that the model never saw is held out as a whole, unless it has a validation split of its own.
    """
    known = sources_of_run(model)
    if not data and not known:
        raise ConfigError(f"nothing says what {model} was trained on.", remedy="Name a data set with --data.")
    sources = _sources_in(data, known, num_frames=frames_of(model)) if data else known
    is_foreign = data and absolute(data) not in {absolute(source.url) for source in known}
    if is_foreign and not held_out(sources):
        return tuple(source.model_copy(update={"split": None}) for source in sources)
    return _held_out(sources)


def probe_sources(model: str, sources: Sequence[ClipSource]) -> tuple[ClipSource, ...]:
    """What a position probe for clips of other data is fitted on: the model's training clips, under those names.

    Empty where the clips are the training's own held-out ones, or where it is open which training source they are like.
    """
    known = sources_of_run(model)
    urls = {source.url for source in known}
    if len(known) != 1 or any(source.url in urls for source in sources):
        return ()
    return tuple(
        known[0].model_copy(update={"name": source.name, "split": "train", "latents": ""}) for source in sources
    )


def preview_sources(data: str, *, model: str, num_frames: int, split: str) -> tuple[ClipSource, ...]:
    """Clips of one data set and split (`validation`, `train` or `all`), cut as in the model's training."""
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}.", remedy=f"Use one of {', '.join(SPLITS)}.")
    sources = _sources_in(data, sources_of_run(model), num_frames=num_frames)
    if split == "validation":
        return _held_out(sources)
    wanted = {"split": "train" if split == "train" else None, "latents": ""}
    return tuple(source.model_copy(update=wanted) for source in sources)


def sources_of_run(model: str) -> tuple[ClipSource, ...]:
    """The sources of the run that made an export, from the config beside it; none for weights from elsewhere."""
    url = join(absolute(model).rpartition("/")[0], "config.json")
    config: Any = read_json(url) if exists(url) else {}
    if not isinstance(config, dict) or config.get("kind") != "finetune-tvp":
        return ()
    return tuple(ClipSource.parse(source) for source in config["data"]["sources"])


def frames_of(model: str) -> int:
    """Frames of a model's clips, from its export; for other weights the published 16."""
    url = join(absolute(model), "config.json")
    config: Any = read_json(url) if exists(url) else {}
    known = config.get("model", {}) if isinstance(config, dict) else {}
    return int(known.get("num_frames", WindowRule().num_frames))


def _sources_in(data: str, known: Sequence[ClipSource], *, num_frames: int) -> tuple[ClipSource, ...]:
    """The known sources of a data set; one that is not among them is cut by their rule where they all have the same."""
    url = absolute(data)
    if same := tuple(source for source in known if absolute(source.url) == url):
        return same
    rules = {source.rule for source in known}
    rule = rules.pop() if len(rules) == 1 else WindowRule(num_frames=num_frames, short="repeat")
    return training_sources([url], rule=rule)


def _held_out(sources: Sequence[ClipSource]) -> tuple[ClipSource, ...]:
    found = held_out(sources)
    if not found:
        names = ", ".join(dict.fromkeys(source.url for source in sources))
        raise InputError(f"no episode of {names} is held out.", remedy="Ingest with -o recipe.validation_share=0.2.")
    return found


def _mixed(urls: Sequence[str], mixture: str, *, num_frames: int) -> tuple[ClipSource, ...]:
    """A published mixture over data sets, or over the labels of annotated ones, by their names."""
    if mixture not in MIXTURES:
        raise ConfigError(f"unknown mixture {mixture!r}.", remedy=f"Known: {', '.join(MIXTURES)}.")
    places: dict[str, str] = {}
    labels: set[str] = set()
    for url in urls:
        manifest, _ = load_manifest(url)
        if manifest.corpus == ANNOTATED:
            names = list(labels_of(ShardDataset(url, split="train")))
            labels.update(names)
        else:
            names = [manifest.name]
        places |= dict.fromkeys(names, url)
    return tuple(
        source.model_copy(update={"labels": (source.name,)}) if source.name in labels else source
        for source in MIXTURES[mixture](places, num_frames=num_frames)
    )


def _distinct(sources: Sequence[ClipSource]) -> tuple[ClipSource, ...]:
    """Two data sets may hold the same label: the later source's name then carries a number."""
    seen: dict[str, int] = {}
    named = []
    for source in sources:
        count = seen[source.name] = seen.get(source.name, 0) + 1
        named.append(source if count == 1 else source.model_copy(update={"name": f"{source.name}-{count}"}))
    return tuple(named)
