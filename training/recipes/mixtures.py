"""The published data mixtures of text-guided video prediction, as lists of `ClipSource`.

A data set's own name decides how its clips are cut and which camera is seen; its path plays no part. Two or three
cameras are named "0", "1", "2" as in the annotated layout. All shares are of the clips drawn, not of the data.
"""

from __future__ import annotations

from collections.abc import Mapping

from infra.config import Config
from infra.errors import ConfigError
from ingest.reader import ShardDataset, Split
from ingest.windows import ClipSource, WindowRule

ONE_CLIP_AN_EPISODE = ("bridge", "sthv2", "rt1")  # short recordings of one action each
MAX_SOURCE_FRAMES = 100

CALVIN_MIX = {"sthv2": 0.4, "bridge": 0.2, "rt1": 0.2, "calvin": 0.2}
ROBOT_MIX = (0.08, 0.08, 0.09, 0.06, 0.06, 0.06, 0.09, 0.09, 0.09, 0.09, 0.09, 0.12)


class TableRow(Config):
    """One line of the paper's table 8: size and share of a data set. `confirmed` False: no source at hand shows it."""

    name: str
    num_episodes: int
    num_episodes_confirmed: bool = False
    share: float
    share_confirmed: bool = False


# None of these could be read in the paper's own table. Two sums agree with numbers that could: 191,642 and 2,048 held
# out are its 193,690 human clips, and RT-1 to MetaWorld without sthv2 are its 179,074 robot trajectories.
PAPER_TABLE8 = (
    TableRow(name="sthv2", num_episodes=191_642, share=0.30),
    TableRow(name="rt1", num_episodes=87_212, share=0.15),
    TableRow(name="bridge", num_episodes=23_377, share=0.15),
    TableRow(name="bcz", num_episodes=43_264, share=0.08),
    TableRow(name="taco_play", num_episodes=3_603, share=0.01),
    TableRow(name="jaco_play", num_episodes=1_085, share=0.01),
    TableRow(name="calvin", num_episodes=18_033, share=0.10),
    TableRow(name="metaworld", num_episodes=2_500, share=0.05),
    TableRow(name="panda", num_episodes=2_000, share=0.05),
    TableRow(name="xhand", num_episodes=2_476, share=0.10),
)


def rule_of(name: str, *, num_frames: int = 16) -> WindowRule:
    """The published frame rule of a data set of this name; too few frames repeat, as in the official code."""
    if any(part in name for part in ONE_CLIP_AN_EPISODE):
        return WindowRule(kind="linspace", num_frames=num_frames, max_source_frames=MAX_SOURCE_FRAMES, short="repeat")
    stride = 5 if "cloth" in name else 2
    return WindowRule(num_frames=num_frames, stride=stride, start_every=stride, short="repeat")


def cameras_of(name: str) -> dict[str, float]:
    """The published camera shares of a data set of this name; empty: each sample's first camera."""
    if "calvin" in name or "xhand" in name:
        return {"0": 0.75, "1": 0.25}
    if "xbot_04" in name:
        return {"0": 0.5, "1": 0.25, "2": 0.25}
    return {}


def calvin_mix(
    urls: Mapping[str, str], *, split: Split | None = "train", num_frames: int = 16
) -> tuple[ClipSource, ...]:
    """What the video model for CALVIN was trained on. `urls` names the four data sets; `ConfigError` for others."""
    return _mix(CALVIN_MIX, urls, split=split, num_frames=num_frames)


def robot_mix(
    urls: Mapping[str, str], *, split: Split | None = "train", num_frames: int = 16
) -> tuple[ClipSource, ...]:
    """Twelve recordings of a two-armed robot. Their order is the published one; their names are the caller's."""
    if len(urls) != len(ROBOT_MIX):
        raise ConfigError(f"the robot mixture has {len(ROBOT_MIX)} data sets, {len(urls)} are given.")
    return _mix(dict(zip(urls, ROBOT_MIX, strict=True)), urls, split=split, num_frames=num_frames)


def paper_table8(
    urls: Mapping[str, str], *, split: Split | None = "train", num_frames: int = 16
) -> tuple[ClipSource, ...]:
    """The shares of `PAPER_TABLE8`, which says of each number whether it is confirmed."""
    return _mix({row.name: row.share for row in PAPER_TABLE8}, urls, split=split, num_frames=num_frames)


def annotated_sources(
    url: str,
    *,
    split: Split | None = "train",
    num_frames: int = 16,
    probabilities: Mapping[str, float] | None = None,
    rules: Mapping[str, WindowRule] | None = None,
    latents: str = "",
) -> tuple[ClipSource, ...]:
    """One source for every label of a data set ingested from several annotated ones, with the rule of its name.

    Shares are equal unless `probabilities` gives those of every label; `rules` replaces single rules. The camera
    shares of a name hold where every sample of the label has these cameras, else each sample's first camera is seen.
    """
    cameras = _cameras_by_label(ShardDataset(url, split=split))
    probabilities = probabilities or dict.fromkeys(cameras, 1.0)
    for what, given in (("probabilities", probabilities), ("rules", rules or {})):
        if unknown := sorted(set(given) - set(cameras)):
            raise ConfigError(f"{what} name {', '.join(unknown)}; {url} has the labels {', '.join(cameras)}.")
    _require_all(cameras, probabilities, "probabilities")
    sources = []
    for label, present in cameras.items():
        shares = cameras_of(label)
        sources.append(
            ClipSource(
                name=label or "unlabelled",
                url=url,
                labels=(label,),
                split=split,
                probability=probabilities[label],
                cameras=shares if set(shares) <= present else {},
                rule=(rules or {}).get(label) or rule_of(label, num_frames=num_frames),
                latents=latents,
            )
        )
    return tuple(sources)


def _mix(
    shares: Mapping[str, float], urls: Mapping[str, str], *, split: Split | None, num_frames: int
) -> tuple[ClipSource, ...]:
    if unknown := sorted(set(urls) - set(shares)):
        raise ConfigError(f"the mixture has no data set {', '.join(unknown)}, only {', '.join(shares)}.")
    _require_all(shares, urls, "urls")
    return tuple(
        ClipSource(
            name=name,
            url=urls[name],
            split=split,
            probability=share,
            cameras=cameras_of(name),
            rule=rule_of(name, num_frames=num_frames),
        )
        for name, share in shares.items()
    )


def _require_all(wanted: Mapping[str, object], given: Mapping[str, object], what: str) -> None:
    if missing := [name for name in wanted if name not in given]:
        raise ConfigError(f"{what} lack {', '.join(missing)}.", remedy="A mixture without it is another mixture.")


def _cameras_by_label(dataset: ShardDataset) -> dict[str, set[str]]:
    """The cameras that every sample of a label has, by label."""
    found: dict[str, set[str]] = {}
    for index in range(len(dataset)):
        record = dataset.record(index)
        found[record.label] = found.get(record.label, set(record.cameras)) & set(record.cameras)
    return dict(sorted(found.items()))
