"""Which frames of which episodes are one clip of a video model: the rules of the papers, and the list they make.

The same list serves training and evaluation, so that "held out" and "trained on" mean the same clips. Shape letters:
T frames of a clip, H height, W width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from infra.config import Config
from infra.errors import DataError, InputError
from ingest.reader import Frames, ShardDataset, Split
from ingest.schema import DEFAULT_CAMERA, SampleRecord

MAX_NAMES_SHOWN = 12


class WindowRule(Config):
    """How clips of `num_frames` are cut from an episode.

    `linspace`: one clip an episode, frames int(linspace(0, T - 1, num_frames)); episodes longer than
    `max_source_frames` are left out (100 in the published mix). `windows`: a clip starts every `start_every` frames
    and takes every `stride`-th one; beyond the end the last frame repeats, so late windows stand still at their end.
    `short` says what becomes of an episode with fewer frames than `num_frames`: one clear error, repeated frames as
    in the official code, or left out.
    """

    kind: Literal["linspace", "windows"] = "windows"
    num_frames: int = Field(default=16, ge=2)
    stride: int = Field(default=2, ge=1)
    start_every: int = Field(default=2, ge=1)
    max_source_frames: int | None = Field(default=None, ge=2)
    short: Literal["error", "repeat", "drop"] = "error"


class ClipSource(Config):
    """Clips of one data set, or of the samples of it with one of `labels`.

    `probability` weighs it in a mixture (any positive scale), `loss_coefficient` is the lambda of the paper's
    equation 4 (1 in the official code). `cameras` maps a camera to its share; empty means each sample's first one.
    """

    name: str = Field(min_length=1)
    url: str
    labels: tuple[str, ...] = ()
    split: Split | None = "train"
    probability: float = Field(default=1.0, gt=0)
    loss_coefficient: float = Field(default=1.0, gt=0)
    cameras: dict[str, float] = Field(default_factory=dict)
    rule: WindowRule = WindowRule()
    latents: str = Field(default="", description="url of a latent cache of this data set; empty: pixels")

    @model_validator(mode="after")
    def _cameras_have_shares(self) -> Self:
        if any(share <= 0 for share in self.cameras.values()):
            raise ValueError(f"cameras {self.cameras} have a share that is not positive")
        return self


def num_windows(rule: WindowRule, num_frames: int) -> int:
    """How many clips an episode of `num_frames` frames gives; 0 where the rule leaves it out."""
    too_long = rule.max_source_frames is not None and num_frames > rule.max_source_frames
    too_short = num_frames < rule.num_frames and rule.short != "repeat"
    if num_frames < 1 or too_long or too_short:
        return 0
    return 1 if rule.kind == "linspace" else -(-num_frames // rule.start_every)


def window_frames(rule: WindowRule, num_frames: int, window: int) -> tuple[int, ...]:
    """The `rule.num_frames` frame indices of clip `window` of an episode, never beyond its last frame."""
    if not 0 <= window < num_windows(rule, num_frames):
        raise InputError(f"window {window} of {num_frames} frames does not exist: {num_windows(rule, num_frames)}.")
    last = num_frames - 1
    if rule.kind == "linspace":
        return tuple(step * last // (rule.num_frames - 1) for step in range(rule.num_frames))
    start = window * rule.start_every
    return tuple(min(start + step * rule.stride, last) for step in range(rule.num_frames))


def labels_of(dataset: ShardDataset) -> dict[str, int]:
    """Every label of a data set and how many samples have it, sorted by name; "" for samples without one."""
    counts = Counter(dataset.record(index).label for index in range(len(dataset)))
    return dict(sorted(counts.items()))


class ClipWindows:
    """One flat list of clips over all chosen samples of a source, in data set order, windows of one sample together.

    Opening reads each sample's record once. `dataset` may be shared by several sources; by default it is opened here.
    Samples whose key is in `without` are left out, and those the rule leaves out as well; `samples` are the others.
    `InputError` when labels or split leave nothing, `DataError` for an episode the rule refuses or a missing camera.
    """

    def __init__(
        self, source: ClipSource, dataset: ShardDataset | None = None, *, without: Collection[str] = ()
    ) -> None:
        self.source = source
        self.dataset = dataset or ShardDataset(source.url, split=source.split)
        self._labels: dict[int, str] = {}
        self._cameras: dict[int, str] = {}
        samples, lengths = self._choose(without)
        counts = np.asarray([num_windows(source.rule, length) for length in lengths], np.int64)
        if not counts.any():
            raise InputError(
                f"source {source.name!r}: its frame rule leaves none of {len(samples)} episodes of {source.url}.",
                remedy="Change max_source_frames, num_frames or short.",
            )
        kept = counts > 0
        self.samples = np.asarray(samples, np.int64)[kept]
        self._lengths = np.asarray(lengths, np.int64)[kept]
        self._ends = np.cumsum(counts[kept])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, clip: int) -> tuple[int, int]:
        """(sample of the data set, window in it) of a clip."""
        position, window = self._find(clip)
        return int(self.samples[position]), window

    def key(self, clip: int) -> str:
        """A stable name of the clip within its data set: `SAMPLEKEY/00003`."""
        sample, window = self.locate(clip)
        return f"{self.dataset.key(sample)}/{window:05d}"

    def source_id(self, clip: int) -> str:
        """The corpus's own name of the episode."""
        return self.dataset.record(self.locate(clip)[0]).source_id

    def text(self, clip: int) -> str:
        """The episode's sentence, "" when it has none."""
        return self.dataset.text(self.locate(clip)[0])

    def label(self, clip: int) -> str:
        """The episode's label."""
        return self._labels[self.locate(clip)[0]]

    def camera(self, clip: int) -> str:
        """The camera seen when none is asked for: the source's first one, else the sample's "main" or first one."""
        return self._cameras[self.locate(clip)[0]]

    def cameras_of(self, sample: int) -> tuple[str, ...]:
        """The cameras from which clips of a chosen sample may be seen."""
        return tuple(self.source.cameras) or (self._cameras[sample],)

    def frame_indices(self, clip: int, camera: str | None = None) -> tuple[int, ...]:
        """T indices into the stored frames. The source's cameras share them; another one may end earlier."""
        position, window = self._find(clip)
        length = int(self._lengths[position])
        indices = window_frames(self.source.rule, length, window)
        if camera is None or camera in self.source.cameras or camera == self.camera(clip):
            return indices
        last = self._num_frames(int(self.samples[position]), camera) - 1
        return tuple(min(index, last) for index in indices)

    def frames(self, clip: int, camera: str | None = None) -> Frames:
        """(T, H, W, 3) uint8 RGB at the stored size; every distinct frame is decoded once."""
        indices = self.frame_indices(clip, camera)
        distinct = sorted(set(indices))
        frames = self.dataset.frames(self.locate(clip)[0], distinct, camera or self.camera(clip))
        if len(distinct) == len(indices):
            return frames
        return frames[np.searchsorted(distinct, indices)]

    def arrays(self, clip: int) -> dict[str, npt.NDArray[Any]]:
        """Rows of the sample's arrays at the clip's frames, (T, ...) each.

        Left out: arrays that do not count frames, and those with no row for one of the clip's frames, such as T - 1
        actions when the clip shows the last frame.
        """
        sample, _ = self.locate(clip)
        numbers = self.dataset.source_frames(sample, self.camera(clip))
        stored = np.asarray(self.frame_indices(clip), np.int64)
        at_source_rate = numbers - numbers[0]  # arrays keep the source's rate whatever frames are stored
        found = {}
        for name, values in self.dataset.arrays(sample).items():
            if values.ndim and len(values) == len(numbers):
                found[name] = values[stored]
            elif values.ndim and len(values) >= at_source_rate[-1] and len(values) > at_source_rate[stored].max():
                found[name] = values[at_source_rate[stored]]
        return found

    def _choose(self, without: Collection[str]) -> tuple[list[int], list[int]]:
        """Samples with a chosen label and the number of frames that all their cameras have."""
        samples, lengths = [], []
        present: Counter[str] = Counter()
        for index in range(len(self.dataset)):
            record = self.dataset.record(index)
            present[record.label] += 1
            if record.key in without or (self.source.labels and record.label not in self.source.labels):
                continue
            samples.append(index)
            lengths.append(self._check(index, record))
            self._labels[index] = record.label
        self._require_labels(present)
        return samples, lengths

    def _check(self, index: int, record: SampleRecord) -> int:
        source, rule = self.source, self.source.rule
        names = tuple(source.cameras) or (DEFAULT_CAMERA if DEFAULT_CAMERA in record.cameras else min(record.cameras),)
        self._cameras[index] = names[0]
        length = min(self._num_frames(index, name) for name in names)
        if length < rule.num_frames and rule.short == "error":
            raise DataError(
                f"episode {record.source_id} of {source.url} has {length} frames, a clip has {rule.num_frames}.",
                remedy="Set rule.short to repeat or drop, or ask for fewer frames.",
            )
        return length

    def _num_frames(self, index: int, camera: str) -> int:
        cameras = self.dataset.record(index).cameras
        if camera not in cameras:
            raise DataError(
                f"episode {self.dataset.record(index).source_id} of {self.source.url} has no camera {camera!r}, "
                f"only {', '.join(sorted(cameras))}."
            )
        return self.dataset.num_frames(index, camera)

    def _require_labels(self, present: Counter[str]) -> None:
        source = self.source
        if not present:
            raise InputError(f"{source.url} has no samples of split {source.split!r}.", remedy="Choose another split.")
        missing = sorted(set(source.labels) - set(present))
        if missing:
            names = sorted(present)
            shown = ", ".join(repr(name) for name in names[:MAX_NAMES_SHOWN])
            more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
            raise InputError(
                f"source {source.name!r}: {source.url} has no label {', '.join(map(repr, missing))} "
                f"in split {source.split!r}, only {shown}{more}."
            )

    def _find(self, clip: int) -> tuple[int, int]:
        """(position among the chosen samples, window) of a clip."""
        if not 0 <= clip < len(self):
            raise InputError(f"clip {clip} of source {self.source.name!r} does not exist: there are {len(self)}.")
        position = int(np.searchsorted(self._ends, clip, side="right"))
        before = int(self._ends[position - 1]) if position else 0
        return position, clip - before
