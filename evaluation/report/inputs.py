"""What a report is made of: addresses and plain values only, so the same report can be built again from a JSON file."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from pydantic import Field

from infra.config import Config
from infra.storage import join

SectionName = Literal[
    "summary",
    "line",
    "training",
    "predictions",
    "video",
    "encoder",
    "policy",
    "gate",
    "data",
    "lineage",
    "configs",
    "versions",
    "reproduce",
    "overview",
    "sheets",
    "distributions",
    "captions",
    "failures",
    "filtered",
    "times",
]
ALL_SECTIONS: tuple[SectionName, ...] = get_args(SectionName)
# A report of one data set, of the whole line, of a video model alone, of a policy.
DATASET_SECTIONS: tuple[SectionName, ...] = (
    "overview", "sheets", "distributions", "captions", "failures", "filtered", "times", "reproduce",
)  # fmt: skip
LINE_SECTIONS: tuple[SectionName, ...] = tuple(
    name for name in ALL_SECTIONS if name == "reproduce" or name not in ("video", *DATASET_SECTIONS)
)
VIDEO_SECTIONS: tuple[SectionName, ...] = (
    "line", "training", "video", "data", "lineage", "configs", "versions", "reproduce",
)  # fmt: skip
POLICY_SECTIONS: tuple[SectionName, ...] = (
    "summary", "line", "training", "policy", "data", "lineage", "configs", "versions", "reproduce",
)  # fmt: skip


class Stage(Config):
    """One stage of the line: how long it took and what it left behind. `picture`: url of an image or a video."""

    name: str
    seconds: float | None = None
    status: Literal["done", "reused", "failed", "skipped"] = "done"
    detail: str = ""
    picture: str = ""


class TrainingRun(Config):
    """One training run: the url of its `metrics.jsonl` and its resolved config."""

    name: str
    metrics: str
    config: dict[str, Any] = Field(default_factory=dict)


class Prediction(Config):
    """Pictures of a future prediction: three image urls, or `strip`, one image file or an `.npz` of all of them."""

    current: str = ""
    predicted: str = ""
    true: str = ""
    strip: str = ""
    caption: str = ""


class DatasetInput(Config):
    """A data set folder; `source` is the corpus root, from which thumbnails of quarantined videos are decoded."""

    url: str
    name: str = ""
    source: str = ""


class GateDecision(Config):
    """What the promotion gate said of one candidate. `note` says what the candidate was, e.g. "deliberately bad"."""

    model: str
    candidate: str
    champion: str = ""
    promote: bool
    reasons: tuple[str, ...] = ()
    note: str = ""


class LineageNode(Config):
    """An artefact and the digests it was made from."""

    kind: str
    id: str
    url: str = ""
    inputs: tuple[str, ...] = ()


class Command(Config):
    """A command line and what it reproduces."""

    what: str
    command: str


class ReportInputs(Config):
    """Everything a report shows. Relative urls are relative to `base`; absent parts are reported as absent."""

    title: str
    subtitle: str = ""
    base: str = ""
    sections: tuple[SectionName, ...] = LINE_SECTIONS
    stages: tuple[Stage, ...] = ()
    runs: tuple[TrainingRun, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    encoder_result: str = ""
    policy_result: str = ""
    video_result: str = ""
    reconstruction: str = Field(default="", description="picture of what a fitted autoencoder makes of true frames")
    preview_folder: str = Field(default="", description="where a video model's training left its previews")
    datasets: tuple[DatasetInput, ...] = ()
    decisions: tuple[GateDecision, ...] = ()
    lineage: tuple[LineageNode, ...] = ()
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    git_commit: str = ""
    seeds: dict[str, int | str] = Field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    max_bytes: int = Field(default=14_000_000, gt=0)  # of inlined pictures and clips; what does not fit is named

    def at(self, url: str) -> str:
        """The address behind a url of these inputs."""
        if not self.base or "://" in url or PurePosixPath(url).is_absolute():
            return url
        return join(self.base, url)
