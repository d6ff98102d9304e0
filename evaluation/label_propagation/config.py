"""What to propagate: the config of the label propagation suite, and the two published DAVIS protocols."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evaluation.label_propagation.propagate import PropagationConfig
from evaluation.label_propagation.sequences import SequencesConfig
from infra.compute import MatmulLibrary
from infra.config import Config

RANDOM_INITIALISATION, RAW_PATCHES, COPY_FIRST_MASK = "random-initialisation", "raw-patches", "copy-first-mask"
ArmName = Literal["random-initialisation", "raw-patches", "copy-first-mask"]
# Fields that say where and how quickly, not what.
PLACE_FIELDS = frozenset({"output", "workers", "matmul"})
# Fields that change no score of the encoder.
SIDE_FIELDS = PLACE_FIELDS | {"suite", "encoder", "data", "arms", "seed", "num_overlays", "kind"}


class LabelPropagationConfig(Config):
    """An encoder and its control arms on the sequences of a DAVIS-2017 folder.

    Without `data`, held-out simulator sequences with exact masks are made below `output`. Pictures are brought to
    `short_side`, the long side rounded down to a multiple of `multiple`, after an optional `stretch` (height, width)
    of pictures and annotations; scores are taken at the size of the (stretched) annotations.
    """

    kind: Literal["label-propagation"] = "label-propagation"
    suite: str = "label-propagation"
    encoder: str
    data: str = ""
    sequences: SequencesConfig = SequencesConfig()
    # Radius and queue suit a 32 x 32 grid and every third simulator step.
    propagation: PropagationConfig = PropagationConfig(top_k=7, radius=4, queue=7, temperature=0.1)
    short_side: int = Field(default=512, ge=16)
    multiple: int = Field(default=64, ge=1)
    stretch: tuple[int, int] | None = None
    arms: tuple[ArmName, ...] = (RANDOM_INITIALISATION, RAW_PATCHES, COPY_FIRST_MASK)  # type: ignore[assignment]
    seed: int = 0  # of the random weights and of the intervals
    num_overlays: int = Field(default=3, ge=0)  # sequences that leave pictures
    output: str
    workers: int = Field(default=2, ge=1)
    matmul: MatmulLibrary = "auto"  # "auto" measures once and takes the faster one of float32 accuracy


def davis_dino(*, encoder: str, data: str, output: str) -> LabelPropagationConfig:
    """DAVIS-2017 val as DINO evaluates it: untouched 480p, top-5, radius 12, 7 latest frames."""
    propagation = PropagationConfig(top_k=5, radius=12, queue=7, temperature=0.1)
    return LabelPropagationConfig(encoder=encoder, data=data, output=output, propagation=propagation, short_side=480)


def davis_rsp(*, encoder: str, data: str, output: str) -> LabelPropagationConfig:
    """DAVIS-2017 val as RSP evaluates it (Table 5b): stretched to 480 x 880, top-7, radius 30, 30 latest frames."""
    propagation = PropagationConfig(top_k=7, radius=30, queue=30, temperature=0.1)
    return LabelPropagationConfig(
        encoder=encoder, data=data, output=output, propagation=propagation, short_side=480, stretch=(480, 880)
    )
