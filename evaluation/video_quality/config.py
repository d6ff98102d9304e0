"""What to measure of a text-guided video model: the config of the video prediction suite."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import Config
from ingest.windows import ClipSource

COPY_FIRST_FRAME, AUTOENCODER, TRUE_FRAMES = "copy-first-frame", "autoencoder", "true-frames"
NEXT_TEXT = "text:next"
RANDOM_CONV3D = "random-conv3d-v1"
ENCODER_PREFIX = "encoder:"
FVD_NAMES = ("fvd", "FVD", "i3d", "kvd", "KVD")
# Fields that say where and how quickly, not what.
PLACE_FIELDS = frozenset({"output", "batch_size", "device"})
# Fields that change no number of an item; the data digest covers the sources, the weights' digests their paths.
SIDE_FIELDS = PLACE_FIELDS | {
    *("suite", "kind", "model", "sources", "probe", "features", "num_pictures"),
    *("i3d_weights", "lpips_weights", "lpips_backbone"),
}


class ProbeConfig(Config):
    """The ridge probe that reads the hand's position (metres) off a picture, fitted on true training frames.

    Without `sources` the suite's own are used with `split`. `side` is what pictures are reduced to; the penalty is the
    best of `penalties` on every fifth training clip.
    """

    sources: tuple[ClipSource, ...] = ()
    split: Literal["train", "validation"] = "train"
    max_frames: int = Field(default=2_000, ge=0, description="0: no motion error")
    side: int = Field(default=32, ge=4)
    penalties: tuple[float, ...] = (1e-2, 1e-1, 1.0, 1e1, 1e2)


class VideoQualityConfig(Config):
    """A text-guided video model and its control arms on held-out clips.

    `num_clips` (0: all) are spread evenly over sources and episodes, starting with each episode's first clip, so that
    few clips mean many episodes. Losses use `num_draws` fixed pairs of sigma and noise a clip; pictures are predicted
    in one step and in `num_steps` steps with `guidance` rising from first to last frame. `include_first_frame` says
    whether frame 0, which the model is given, counts in pixel and set scores.

    Set scores: a Frechet and a kernel distance for each name in `features` ("random-conv3d-v1" or "encoder:URL"),
    named after it. "FVD" and "KVD" appear only with `i3d_weights`, a state dict of the Kinetics-400 I3D; "lpips" only
    with `lpips_weights` (the linear heads) and `lpips_backbone` (torchvision's AlexNet). `counts` are the numbers of
    clips at which set scores are reported besides all.

    `wrong_text` "all" rates every clip with every other sentence of the suite (at most `max_sentences`), "next" with
    the next sentence in alphabetical order, "none" with no other; "auto" is "all" where that is allowed, else "next".

    `autocast` runs the model in bfloat16, which changes numbers slightly and is part of the protocol.
    """

    kind: Literal["video-prediction"] = "video-prediction"
    suite: str = "video-prediction"
    model: str
    sources: tuple[ClipSource, ...] = Field(min_length=1)
    num_clips: int = Field(default=64, ge=0)
    num_steps: int = Field(default=30, ge=2)
    guidance: tuple[float, float] = (1.0, 3.0)
    num_draws: int = Field(default=8, ge=1)
    include_first_frame: bool = False
    moving_threshold: int = Field(default=20, ge=0, le=254, description="levels of 255, in any colour")
    features: tuple[str, ...] = (RANDOM_CONV3D,)
    i3d_weights: str = ""
    lpips_weights: str = ""
    lpips_backbone: str = ""
    counts: tuple[int, ...] = (1_000, 2_000, 5_000)
    num_resamples: int = Field(default=200, ge=20, description="of the set scores' intervals")
    probe: ProbeConfig = ProbeConfig()
    wrong_text: Literal["auto", "all", "next", "none"] = "auto"
    max_sentences: int = Field(default=8, ge=2)
    num_pictures: int = Field(default=3, ge=0)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=8, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast: bool = False
    output: str

    @model_validator(mode="after")
    def _names_are_earned(self) -> Self:
        for name in self.features:
            if name in FVD_NAMES:
                raise ValueError(f"feature {name!r}: set i3d_weights to a Kinetics-400 I3D state dict instead")
            if name != RANDOM_CONV3D and not name.startswith(ENCODER_PREFIX):
                raise ValueError(f"unknown feature {name!r}; known: {RANDOM_CONV3D}, {ENCODER_PREFIX}URL")
        if bool(self.lpips_weights) != bool(self.lpips_backbone):
            raise ValueError("lpips needs both lpips_weights (linear heads) and lpips_backbone (AlexNet)")
        if len({source.name for source in self.sources}) != len(self.sources):
            raise ValueError(f"source names {[source.name for source in self.sources]} are not distinct")
        if any(count < 2 for count in self.counts):
            raise ValueError(f"counts {self.counts} hold a number below 2")
        return self
