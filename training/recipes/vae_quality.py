"""What a fitted autoencoder loses, measured on pictures it has not seen, and the deviation of its latents.

PSNR alone flatters: in a still scene the mean picture of all frames scores over 20 dB without knowing anything. So the
mean picture is measured too, and both once more on the pixels that move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ingest.windows import ClipSource, ClipWindows
from training.data.video_clips import resize_clip, to_model_range
from training.models.tvp.autoencoder import ENCODE_CHUNK, decode_clips, encode_frames
from training.previews import contact_sheet, png_bytes

REPORT_NAME = "reconstruction.json"
SHEET_NAME = "reconstruction.png"
SHEET_FRAMES = 8
MOVING_LEVELS = 25.5  # a tenth of the range, in any colour
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
BEST_PSNR_DB = 99.0  # what equal pictures count as: infinity is no JSON

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MeasuredFrames:
    """N frames: `pixels` (N, 3, S, S) float32 0..255, the label of each one's episode, the split they are of."""

    pixels: torch.Tensor
    labels: tuple[str, ...]
    split: str


def spread_frames(sources: Sequence[ClipSource], count: int, *, size: int) -> MeasuredFrames:
    """`count` frames spread evenly over all sources and, within an episode, over its length; no chance involved."""
    windows = [ClipWindows(source) for source in sources]
    frames, labels = [], []
    for number, listed in enumerate(windows):
        share = count // len(windows) + (number < count % len(windows))
        for index in range(share):
            clip = (2 * index + 1) * len(listed) // (2 * share)
            sample, camera = listed.locate(clip)[0], listed.camera(clip)
            # Multiples of the golden ratio fill a length evenly however many there are.
            frame = int((index * GOLDEN_RATIO) % 1 * listed.dataset.num_frames(sample, camera))
            frames.append(resize_clip(listed.dataset.frames(sample, [frame], camera), size).float())
            labels.append(listed.label(clip))
    return MeasuredFrames(torch.cat(frames), tuple(labels), sources[0].split or "all")


def latent_deviation(vae: nn.Module, frames: MeasuredFrames) -> float:
    """Standard deviation of all numbers of the frames' posterior samples, in expectation over the posterior."""
    mean, std = (part.double() for part in encode_frames(vae, to_model_range(frames.pixels)))
    variance = mean.square().mean() + std.square().mean() - mean.mean().square()
    return float(variance.sqrt())


def measure(vae: nn.Module, training: MeasuredFrames, held_out: MeasuredFrames) -> tuple[dict[str, Any], bytes]:
    """(the report, a picture with truth over reconstruction) of held-out frames; mean pictures are training's."""
    rebuilt = reconstruct(vae, held_out.pixels)
    means = mean_pictures(training)
    floor = torch.stack([means.get(label, means[""]) for label in held_out.labels])
    report = quality(held_out, rebuilt, floor)
    shown = np.linspace(0, len(rebuilt) - 1, min(SHEET_FRAMES, len(rebuilt))).round().astype(int)
    columns = {name: _pictures(pixels[shown]) for name, pixels in (("truth", held_out.pixels), ("rebuilt", rebuilt))}
    text = f"{report['psnr_db']} dB, moving pixels {report['moving_db']} dB"
    return report, png_bytes(contact_sheet(columns, text=text, num_frames=len(shown)))


def quality(frames: MeasuredFrames, rebuilt_N3HW: torch.Tensor, floor_N3HW: torch.Tensor) -> dict[str, Any]:
    """The report on pictures 0..255: PSNR in dB of reconstruction and floor (the label's mean picture), on all pixels
    and on the moving ones, those more than a tenth of the range off the mean picture; overall and per label.

    PSNR is of the mean squared error over all frames, not a mean over frames; None where nothing moves.
    """
    moving = ((frames.pixels - floor_N3HW).abs() > MOVING_LEVELS).any(dim=1, keepdim=True).expand_as(frames.pixels)
    labels = sorted(set(frames.labels))
    by_label = {}
    for label in labels:
        rows = torch.tensor([found == label for found in frames.labels])
        by_label[label] = _scores(frames.pixels[rows], rebuilt_N3HW[rows], floor_N3HW[rows], moving[rows])
    overall = _scores(frames.pixels, rebuilt_N3HW, floor_N3HW, moving)
    return {"split": frames.split, **overall, "labels": by_label}


def mean_pictures(frames: MeasuredFrames) -> dict[str, torch.Tensor]:
    """Label -> mean picture (3, S, S); under "" the mean of all frames, for labels that were not seen."""
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(frames.labels):
        groups.setdefault(label, []).append(row)
    return {"": frames.pixels.mean(dim=0)} | {label: frames.pixels[rows].mean(dim=0) for label, rows in groups.items()}


def reconstruct(vae: nn.Module, pixels_N3HW: torch.Tensor) -> torch.Tensor:
    """Pixels 0..255 -> the same through the posterior's mean and back, as 8-bit pictures hold them."""
    parts = []
    for start in range(0, len(pixels_N3HW), ENCODE_CHUNK):
        mean, _ = encode_frames(vae, to_model_range(pixels_N3HW[start : start + ENCODE_CHUNK]))
        parts.append(decode_clips(vae, mean.unsqueeze(1), chunk=1).squeeze(1))
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255)


def psnr_db(truth: torch.Tensor, guess: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio of values 0..255; None of no values."""
    if not truth.numel():
        return None
    error = float((truth.double() - guess.double()).square().mean())
    return BEST_PSNR_DB if error == 0 else round(min(BEST_PSNR_DB, 10 * math.log10(255.0**2 / error)), 3)


def _scores(truth: torch.Tensor, rebuilt: torch.Tensor, floor: torch.Tensor, moving: torch.Tensor) -> dict[str, Any]:
    return {
        "frames": len(truth),
        "psnr_db": psnr_db(truth, rebuilt),
        "floor_db": psnr_db(truth, floor),
        "moving_db": psnr_db(truth[moving], rebuilt[moving]),
        "moving_floor_db": psnr_db(truth[moving], floor[moving]),
        "moving_share": round(float(moving.float().mean()), 4),
    }


def _pictures(pixels_N3HW: torch.Tensor) -> npt.NDArray[np.uint8]:
    return pixels_N3HW.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
