"""Decoded colours are unbiased: one grey level of bias is invisible and enough to break a policy in closed loop."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from infra.media_decode import decode_video


def test_flat_colours_come_back_without_bias(tmp_path: Path):
    colours = np.random.default_rng(0).integers(30, 226, size=(60, 3), dtype=np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (60, 64, 64, 3))
    path = tmp_path / "flat.mp4"
    exact = "scale=in_range=pc:out_range=tv:out_color_matrix=bt601:flags=accurate_rnd+full_chroma_int"
    argv = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    argv += ["-s", "64x64", "-r", "10", "-i", "-", "-vf", exact, "-pix_fmt", "yuv420p", "-colorspace", "smpte170m"]
    argv += ["-c:v", "libx264", "-qp", "0", str(path)]
    subprocess.run(argv, input=frames.tobytes(), check=True)

    difference = decode_video(path).astype(float) - frames
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 0.35, difference.mean(axis=(0, 1, 2))
    assert np.abs(difference).mean() < 1.0
