"""Episodes of chosen length, label and cameras whose pictures tell which frame of which camera they are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from infra.digests import pretty_json
from ingest.reader import ShardDataset
from ingest.schema import CameraRecord, Failure, Layout, Receipt, SampleRecord, frame_suffix, video_suffix
from ingest.shard import Member, ShardWriter
from tests.helpers_data import jpeg, key_of, mp4, npz, source_of, write_dataset
from training.cache import CacheManifest


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


def make_cache(
    folder: Path,
    data: str,
    *,
    failed: Sequence[str] = (),
    cameras: Sequence[str] = (),
    dtype: str = "float32",
    **changes: object,
) -> str:
    """A latent cache of a data set of takes: the mean says frame and camera, text states say which sample.

    `failed` samples are missing and recorded as failed; with `cameras` only these are stored.
    """
    folder.mkdir(parents=True)
    stored = ShardDataset(data)
    with ShardWriter(folder / "shard-00000.tar") as writer:
        for index in range(len(stored)):
            record = stored.record(index)
            if record.key in failed:
                continue
            members = []
            for position, (name, camera) in enumerate(sorted(record.cameras.items())):
                if cameras and name not in cameras:
                    continue
                moments = np.zeros((camera.num_frames, 2, 4, 2, 2), dtype)
                moments[:, 0] = np.arange(camera.num_frames).reshape(-1, 1, 1, 1) + 100 * position
                moments[:, 1] = 0.5
                members.append(Member(f"{name}.moments.npy", npy(moments)))
            sample = {"key": record.key, "source_id": record.source_id, "text": record.text}
            sample["cameras"] = {
                name: camera.num_frames
                for name, camera in record.cameras.items()
                if name in (cameras or record.cameras)
            }
            text = npy(np.full((3, 6), index, np.float32))
            writer.add(record.key, [Member("json", pretty_json(sample)), *members, Member("text.npy", text)])
    summary = writer.close()
    failures = tuple(
        Failure(key=key, source_id=key, path="", sha256="", stage="read", reason="short_decode", message="too short")
        for key in failed
    )
    receipt = Receipt(
        shard=0,
        plan_id="0" * 64,
        tar_sha256=summary.tar_sha256,
        idx_sha256=summary.idx_sha256,
        tar_bytes=summary.tar_bytes,
        num_samples=summary.num_samples,
        num_frames=0,
        num_members=summary.num_members,
        failures=failures,
    )
    facts = {
        "data_version": stored.version,
        "vae_digest": "a" * 64,
        "text_digest": "b" * 64,
        "text": {},
        "text_shape": (3, 6),
        "image_size": 16,
        "latent_shape": (4, 2, 2),
        "scaling_factor": 0.5,
        "dtype": dtype,
        "receipts": [receipt.to_json()],
        "num_samples": summary.num_samples,
        "num_failures": len(failed),
        **changes,
    }
    (folder / "manifest.json").write_bytes(pretty_json(CacheManifest.parse(facts).to_json()))
    return str(folder)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


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
