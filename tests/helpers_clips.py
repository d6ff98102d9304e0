"""Episodes of chosen length, label and cameras whose pictures tell which frame of which camera they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from infra.digests import pretty_json
from ingest.schema import CameraRecord, Layout, SampleRecord, frame_suffix, video_suffix
from ingest.shard import Member
from tests.helpers_data import jpeg, key_of, mp4, npz, source_of, write_dataset


@dataclass(frozen=True)
class Take:
    """One episode: frames of each camera, and arrays as they are. `stride`: every so many source frames are stored."""

    num_frames: int
    label: str = ""
    text: str = ""
    cameras: Sequence[str] = ("main",)
    camera_frames: dict[str, int] = field(default_factory=dict)  # where a camera has another number of frames
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    stride: int = 1
    split: str = "train"


def level(frame: int, camera: int = 0) -> int:
    """The grey of a picture: 2 levels a frame, 100 a camera."""
    return 2 * frame + 100 * camera + 4


def make_takes(
    folder: Path, takes: Sequence[Take], *, size: int | tuple[int, int] = 16, layout: Layout = "frames"
) -> str:
    """A data set of these episodes, `size` pixels high and wide."""
    height, width = (size, size) if isinstance(size, int) else size

    def sample(number: int) -> list[Member]:
        take = takes[number]
        cameras, pictures = {}, []
        for position, name in enumerate(take.cameras):
            count = take.camera_frames.get(name, take.num_frames)
            images = [np.full((height, width, 3), level(index, position), np.uint8) for index in range(count)]
            numbers = tuple(range(0, count * take.stride, take.stride))
            cameras[name] = CameraRecord(
                source=source_of(number),
                width=width,
                height=height,
                fps=10.0,
                num_frames=count,
                frame_numbers=None if take.stride == 1 else numbers,
            )
            if layout == "video":
                pictures.append(Member(video_suffix(name), mp4(np.stack(images))))
            else:
                pictures += [
                    Member(frame_suffix(index, name), jpeg(image), numbers[index]) for index, image in enumerate(images)
                ]
        record = SampleRecord(
            key=key_of(number),
            source_id=f"take/{number:05d}",
            corpus="synthetic",
            layout=layout,
            cameras=cameras,
            text=take.text,
            label=take.label,
            has_arrays=bool(take.arrays),
            metadata={"split": take.split},
        )
        arrays = [Member("npz", npz(take.arrays))] if take.arrays else []
        return [Member("json", pretty_json(record.to_json())), *pictures, *arrays]

    num_frames = sum(take.num_frames for take in takes)
    return write_dataset(folder, len(takes), num_frames, sample, layout=layout, clips_per_shard=3)
