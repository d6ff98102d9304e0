"""Small but complete data sets of synthetic clips: a bright square that moves over a shaded ground.

Files are written with the project's shard writer and pictures with Pillow and PyAV directly.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from infra.digests import pretty_json, sha256_bytes
from ingest.schema import (
    CameraRecord,
    Layout,
    Manifest,
    Receipt,
    SampleRecord,
    SourceVideo,
    frame_suffix,
    shard_name,
    video_suffix,
)
from ingest.shard import Member, ShardWriter

ACTION_DIM = 4
PROPRIOCEPTION_DIM = 4


def make_frames_dataset(
    folder: Path,
    num_clips: int = 4,
    num_frames: int = 60,
    size: int = 64,
    seed: int = 0,
    *,
    clips_per_shard: int = 4,
    stride: int = 1,
    validation_every: int = 0,
) -> str:
    """A data set of layout `frames`; every `validation_every`-th clip is of the validation split."""

    def sample(number: int) -> list[Member]:
        frames = moving_square(num_frames, size, seed * 1000 + number)
        numbers = tuple(range(0, num_frames * stride, stride))
        members = [Member(frame_suffix(index), jpeg(frame), numbers[index]) for index, frame in enumerate(frames)]
        metadata = {"split": "validation" if validation_every and number % validation_every == 0 else "train"}
        frame_numbers = None if stride == 1 else numbers
        record = sample_record(number, "frames", num_frames, size, metadata=metadata, frame_numbers=frame_numbers)
        return [Member("json", pretty_json(record.to_json())), *members]

    return write_dataset(folder, num_clips, num_frames, sample, layout="frames", clips_per_shard=clips_per_shard)


def make_episode_dataset(
    folder: Path,
    num_episodes: int = 3,
    num_frames: int = 20,
    size: int = 64,
    seed: int = 0,
    *,
    layout: Layout = "frames",
    last_frame_has_action: bool = False,
    clips_per_shard: int = 2,
    validation_every: int = 0,
    actions_follow_state: bool = False,
) -> str:
    """Episodes with npz actions (T - 1 or T, 4) and proprioception (T, 4), and a sentence.

    Actions are random, or equal a proprioception that never moves. Every `validation_every`-th episode is held out.
    """

    def sample(number: int) -> list[Member]:
        random = np.random.default_rng(seed * 1000 + number)
        frames = moving_square(num_frames, size, seed * 1000 + number)
        arrays = {
            "actions": random.uniform(-1, 1, (num_frames - (not last_frame_has_action), ACTION_DIM)),
            "proprioception": random.normal(size=(num_frames, PROPRIOCEPTION_DIM)),
        }
        if actions_follow_state:
            arrays["proprioception"][:] = random.uniform(-1, 1, PROPRIOCEPTION_DIM)
            arrays["actions"] = arrays["proprioception"][: len(arrays["actions"])]
        pictures = (
            [Member(frame_suffix(index), jpeg(frame), index) for index, frame in enumerate(frames)]
            if layout == "frames"
            else [Member(video_suffix(), mp4(frames))]
        )
        split = "validation" if validation_every and number % validation_every == 0 else "train"
        metadata = {"task": "move-square", "seed": number, "split": split}
        record = sample_record(
            number, layout, num_frames, size, metadata=metadata, text="move the square", has_arrays=True
        )
        return [
            Member("json", pretty_json(record.to_json())),
            *pictures,
            Member("txt", b"move the square"),
            Member("npz", npz({name: value.astype(np.float32) for name, value in arrays.items()})),
        ]

    return write_dataset(folder, num_episodes, num_frames, sample, layout=layout, clips_per_shard=clips_per_shard)


def write_dataset(
    folder: Path,
    num_clips: int,
    num_frames: int,
    sample: Callable[[int], list[Member]],
    *,
    layout: Layout = "frames",
    clips_per_shard: int = 4,
) -> str:
    """Shards, receipts and the manifest of `num_clips` samples that `sample(number)` gives."""
    folder.mkdir(parents=True, exist_ok=True)
    receipts = []
    for shard, first in enumerate(range(0, num_clips, clips_per_shard)):
        numbers = range(first, min(first + clips_per_shard, num_clips))
        with ShardWriter(folder / f"{shard_name(shard)}.tar") as writer:
            for number in numbers:
                writer.add(key_of(number), sample(number))
        summary = writer.close()
        receipt = Receipt(
            shard=shard,
            plan_id="0" * 64,
            tar_sha256=summary.tar_sha256,
            idx_sha256=summary.idx_sha256,
            tar_bytes=summary.tar_bytes,
            num_samples=summary.num_samples,
            num_frames=num_frames * len(numbers),
            num_members=summary.num_members,
        )
        (folder / f"{shard_name(shard)}.receipt.json").write_bytes(pretty_json(receipt.to_json()))
        receipts.append(receipt)
    manifest = Manifest(
        name="synthetic",
        corpus="synthetic",
        layout=layout,
        plan_id="0" * 64,
        recipe={},
        receipts=tuple(receipts),
        num_samples=num_clips,
        num_frames=num_frames * num_clips,
        num_failures=0,
        inputs=tuple(sorted(source_of(number).sha256 for number in range(num_clips))),
    )
    (folder / "manifest.json").write_bytes(pretty_json(manifest.to_json()))
    return str(folder)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite manifest.json after `edit` changed its parsed content."""
    path = folder / "manifest.json"
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_bytes(pretty_json(value))


def sample_record(
    number: int,
    layout: Layout,
    num_frames: int,
    size: int,
    *,
    metadata: dict[str, Any],
    text: str = "",
    has_arrays: bool = False,
    frame_numbers: tuple[int, ...] | None = None,
) -> SampleRecord:
    camera = CameraRecord(
        source=source_of(number),
        width=size,
        height=size,
        fps=30.0,
        num_frames=num_frames,
        frame_numbers=frame_numbers,
    )
    return SampleRecord(
        key=key_of(number),
        source_id=f"square/{number:05d}",
        corpus="synthetic",
        layout=layout,
        cameras={"main": camera},
        text=text,
        has_arrays=has_arrays,
        metadata=metadata,
    )


def key_of(number: int) -> str:
    return f"clip-{number:05d}"


def source_of(number: int) -> SourceVideo:
    path = f"square/{number:05d}.mp4"
    return SourceVideo(path=path, sha256=sha256_bytes(path.encode()), size_bytes=len(path))


def moving_square(num_frames: int, size: int, seed: int) -> np.ndarray:
    """(T, size, size, 3) uint8: ground, colour, start and speed follow from `seed`."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(40, 120, size)
    ground = np.stack([ramp[None] + ramp[:, None] * weight for weight in random.uniform(0, 0.8, 3)], axis=-1)
    side = max(size // 5, 2)
    start, speed = random.uniform(0, size - side, 2), random.uniform(-2, 2, 2)
    colour = random.uniform(150, 255, 3)
    frames = np.repeat(np.clip(ground, 0, 255).astype(np.uint8)[None], num_frames, axis=0)
    for index, frame in enumerate(frames):
        top, left = np.abs((start + speed * index) % (2 * (size - side)) - (size - side)).astype(int)
        frame[top : top + side, left : left + side] = colour
    return frames


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def mp4(frames: np.ndarray, fps: int = 30) -> bytes:
    """H.264, a key frame every 8 frames, no B-frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "g": "8", "bf": "0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
