"""What planning knows of a clip: its sources hashed, their headers read, or why it cannot be used."""

from __future__ import annotations

from infra.config import Config
from infra.digests import sha256_json
from ingest.schema import Clip, Failure, SourceVideo


class VideoHeader(Config):
    """What planning knows of a source video; `num_frames` is declared or estimated."""

    width: int
    height: int
    fps: float
    num_frames: int


class InspectedClip(Config):
    """A clip with hashed sources. `headers` has None for a video whose header cannot be read: building says why.

    `failure` is set when not even the build may touch it. `fingerprint` is how its first camera looks, where the
    recipe asks for it.
    """

    clip: Clip
    headers: tuple[VideoHeader | None, ...] = ()
    fingerprint: str = ""
    failure: Failure | None = None


def sample_key(clip: Clip, first_frame: int = 0) -> str:
    """The sample's name in the tar: a hash of its name in the corpus, its sources and its place in them."""
    return sha256_json([clip.source_id, [video.sha256 for video in clip.videos], first_frame])[:16]


def failure_of(clip: Clip, *, stage: str, reason: str, message: str, video: int = 0, first_frame: int = 0) -> Failure:
    """A ledger entry for a clip; `video` is the index of the one to blame."""
    blamed = clip.videos[video] if clip.videos else None
    return Failure.parse(
        {
            "key": sample_key(clip, first_frame),
            "source_id": clip.source_id,
            "path": blamed.path if blamed else clip.trajectory,
            "sha256": blamed.sha256 if blamed else "",
            "stage": stage,
            "reason": reason,
            "message": message,
        }
    )


def is_part(video: SourceVideo) -> bool:
    """Whether other clips have their frames in the same file."""
    return video.start_s is not None or video.end_s is not None
