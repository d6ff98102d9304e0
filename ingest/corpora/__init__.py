"""Source formats, one module each with the same two functions; a corpus knows no model and no shard."""

from __future__ import annotations

import difflib
from typing import Protocol

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError
from infra.media_pictures import Pictures
from ingest.corpora import (
    annotated,
    calvin,
    folder,
    kinetics400,
    lerobot,
    metaworld,
    rlds,
    something_something_v2,
    urls,
)
from ingest.schema import Clip, SourceVideo

Arrays = dict[str, npt.NDArray[np.generic]]


class Corpus(Protocol):
    """What each module of this package offers. `root` is a local folder or an `s3://` prefix."""

    def list_clips(self, root: str) -> list[Clip]:
        """Every clip, broken ones included, sorted by `source_id`.

        Raises `InputError` naming the file expected when `root` is not laid out like this corpus.
        """
        ...

    def read_trajectory(self, root: str, clip: Clip) -> Arrays:
        """Arrays of a clip with a `trajectory`, first axis time (T or T - 1). Raises `InputError`."""
        ...


class PictureCorpus(Corpus, Protocol):
    """A corpus some of whose cameras are `pictures`: frames stored one by one instead of video files."""

    def read_pictures(self, root: str, clip: Clip, video: SourceVideo) -> Pictures:
        """All frames of one camera of a clip, read lazily. Raises `InputError`, also while iterating."""
        ...


CORPORA: dict[str, Corpus] = {
    "annotated": annotated,
    "calvin": calvin,
    "folder": folder,
    "kinetics400": kinetics400,
    "lerobot": lerobot,
    "metaworld": metaworld,
    "rlds": rlds,
    "something_something_v2": something_something_v2,
    "urls": urls,
}


def corpus_module(name: str) -> Corpus:
    """The module of a corpus; `ConfigError` with a suggestion for an unknown name."""
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(CORPORA))}."
        raise ConfigError(f"unknown corpus {name!r}.", remedy=hint)
    return CORPORA[name]
