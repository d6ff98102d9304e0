"""The ablations of the Video Prediction Policy (VPP tables 1, 3, 4 and 12), each a small change of a run.

A row changes the provider of features, the training config, or the video model itself; what only a user can give
(weights, a second camera) a row names in `needs`, and without it the row is listed as not run.
Paper and code disagree on the diffusion step: the released knob changes nothing (features always come from the first
noise level, sigma 700), so `sigma-...` rows change the true noise level and `released-step` shows the knob's effect.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from infra.config import Config
from infra.errors import ConfigError

Video = Literal["full", "without-internet", "without-task-video", "without-initial"]


class Ablation(Config):
    """One row. `provider` replaces fields of the full run's provider, or all of it when it names a `kind`.

    `video` is the video model that it stands on; `published` the row of the paper's table that it repeats
    (TABLE/ROW of `evaluation.published`, empty: the paper has none). The flow fills in "{video}", "{mae}", "{voltron}".
    """

    name: str
    says: str
    published: str = ""
    video: Video = "full"
    provider: dict[str, Any] = Field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    needs: str = ""


FULL = "full"
ROWS: tuple[Ablation, ...] = (
    Ablation(name=FULL, says="the preset as it is", published="vpp-4/VPP"),
    # What sees: the encoder takes the video model's place (table 3).
    Ablation(
        name="encoder-stable-vae",
        says="latents of the video model's autoencoder as tokens of one frame",
        published="vpp-3/Stable-VAE",
        provider={"kind": "vae", "url": "{video}"},
    ),
    Ablation(
        name="encoder-vc1",
        says="a masked autoencoder trained on the same episodes (VC-1 style)",
        published="vpp-3/VC-1",
        provider={"kind": "encoder", "url": "{mae}"},
        needs="mae",
    ),
    Ablation(
        name="encoder-voltron",
        says="Voltron's language-conditioned encoder, weights from the user",
        published="vpp-3/Voltron",
        provider={"kind": "voltron", "path": "{voltron}"},
        needs="voltron",
    ),
    # What the video model was trained on (table 4).
    Ablation(
        name="without-internet",
        says="the video model saw the task's episodes only",
        published="vpp-4/without internet data",
        video="without-internet",
        needs="internet",
    ),
    Ablation(
        name="without-task-video",
        says="the video model saw the other videos only",
        published="vpp-4/without CALVIN video",
        video="without-task-video",
        needs="internet",
    ),
    Ablation(
        name="without-initial",
        says="the task's episodes only, from random weights instead of pre-trained ones",
        published="vpp-4/without internet data and SVD weights",
        video="without-initial",
        needs="initial",
    ),
    Ablation(name="untrained-video-model", says="features of freshly drawn weights", provider={"random_seed": 0}),
    # How features become tokens (tables 4 and 12).
    Ablation(
        name="without-video-former",
        says="one linear map, every token kept",
        published="vpp-4/without Video-Former",
        overrides=("former.kind=linear",),
    ),
    Ablation(
        name="without-temporal-attention",
        says="each frame by itself (2d)",
        overrides=("former.kind=2d",),
    ),
    Ablation(
        name="without-aggregation",
        says="the last tapped layer alone",
        published="vpp-4/without feature aggregation",
        provider={"aggregate": False},
    ),
    Ablation(
        name="layer-0",
        says="up-block 0 alone",
        published="vpp-layers/layer 3",
        provider={"layers": [0], "aggregate": False},
    ),
    Ablation(
        name="layer-3",
        says="up-block 3 alone",
        published="vpp-layers/layer 12",
        provider={"layers": [3], "aggregate": False},
    ),
    Ablation(
        name="layer-2",
        says="up-block 2 alone",
        published="vpp-layers/layer 9",
        provider={"layers": [2], "aggregate": False},
    ),
    Ablation(name="bilinear", says="layers joined by linear interpolation", provider={"interpolation": "bilinear"}),
    # When the video model is tapped.
    Ablation(
        name="released-step",
        says="20 scheduler steps become 10: nothing changes",
        published="vpp-steps/step 10",
        provider={"num_steps": 10},
    ),
    Ablation(name="sigma-80", says="features at noise level 80", provider={"sigma": 80.0}),
    Ablation(name="sigma-10", says="features at noise level 10", provider={"sigma": 10.0}),
    Ablation(name="two-step", says="features at the second step", provider={"step": 2}),
    # How much there is to see and to learn from.
    Ablation(
        name="single-view",
        says="the first camera alone",
        published="vpp-12/single view",
        needs="a second camera",
        provider={"cameras": ["{first-camera}"]},
    ),
    Ablation(
        name="tenth-of-data",
        says="a tenth of the episodes",
        published="vpp-1/VPP, 10 % data",
        overrides=("data.share=0.1",),
    ),
)


def find_rows(names: list[str] | None) -> tuple[Ablation, ...]:
    """The rows of these names, in the table's order; the full run is always among them. None: all."""
    known = {row.name for row in ROWS}
    if unknown := sorted(set(names or ()) - known):
        raise ConfigError(f"unknown ablation {', '.join(unknown)}.", remedy=f"Known: {', '.join(sorted(known))}.")
    return tuple(row for row in ROWS if names is None or row.name in names or row.name == FULL)
