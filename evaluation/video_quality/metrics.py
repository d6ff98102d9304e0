"""What one predicted clip is worth in pixels: PSNR, SSIM, the moving region, the direction of change.

All take (T, H, W, 3) uint8 clips of equal shape and give one float. Shape letters: T frames, H height, W width.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from infra.errors import InputError

Clip = npt.NDArray[np.uint8]
PEAK = 255.0
MAX_PSNR = 100.0  # equal clips have none; a finite number keeps means and records readable
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(truth: Clip, predicted: Clip) -> float:
    """Decibels from the mean squared error over all pixels of the clip, at most 100."""
    _require_equal_shapes(truth, predicted)
    return _decibels(float(np.square(_difference(truth, predicted)).mean()))


def moving_region(truth: Clip, *, threshold: int) -> npt.NDArray[np.bool_]:
    """(T, H, W): pixels with a colour that differs from the true first frame by more than `threshold` levels."""
    return np.asarray(np.abs(_difference(truth, truth[:1])).max(axis=-1) > threshold)


def moving_psnr(truth: Clip, predicted: Clip, region: npt.NDArray[np.bool_]) -> float | None:
    """PSNR over the pixels of `region` (T, H, W) alone; None where nothing moves."""
    _require_equal_shapes(truth, predicted)
    if not region.any():
        return None
    return _decibels(float(np.square(_difference(truth, predicted)[region]).mean()))


def change_cosine(truth: Clip, predicted: Clip) -> float | None:
    """Cosine between predicted and true change from the true first frame to the last one.

    0 when the prediction shows no change at all, None when the truth shows none.
    """
    _require_equal_shapes(truth, predicted)
    wanted, shown = _difference(truth[-1], truth[0]).ravel(), _difference(predicted[-1], truth[0]).ravel()
    length, shown_length = float(np.linalg.norm(wanted)), float(np.linalg.norm(shown))
    if length == 0.0:
        return None
    return float(wanted @ shown) / (length * shown_length) if shown_length else 0.0


def ssim(truth: Clip, predicted: Clip) -> float:
    """Mean structural similarity (Wang et al. 2004) over frames and colours.

    Gaussian 11 x 11 window of deviation 1.5, windows wholly inside the picture, K1 0.01, K2 0.03, range 255. Raises
    `InputError` for pictures smaller than the window.
    """
    _require_equal_shapes(truth, predicted)
    if min(truth.shape[1:3]) < SSIM_WINDOW:
        raise InputError(
            f"pictures of {truth.shape[2]}x{truth.shape[1]} are smaller than SSIM's window of {SSIM_WINDOW}.",
            remedy="Evaluate at a larger image_size.",
        )
    x, y = _channels(truth), _channels(predicted)
    means = [_blur(value) for value in (x, y, x * x, y * y, x * y)]
    mean_x, mean_y, square_x, square_y, product = means
    c1, c2 = (SSIM_K1 * PEAK) ** 2, (SSIM_K2 * PEAK) ** 2
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _difference(a: Clip, b: Clip) -> npt.NDArray[np.float64]:
    return a.astype(np.float64) - b.astype(np.float64)


def _decibels(mean_square: float) -> float:
    if mean_square == 0.0:
        return MAX_PSNR
    return min(MAX_PSNR, 10.0 * float(np.log10(PEAK**2 / mean_square)))


def _channels(clip: Clip) -> torch.Tensor:
    """(T * 3, 1, H, W) float64: every colour of every frame is a picture of its own."""
    pictures = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).double()
    return pictures.reshape(-1, 1, *clip.shape[1:3])


def _blur(pictures: torch.Tensor) -> torch.Tensor:
    window = _window()
    return F.conv2d(F.conv2d(pictures, window[None, None, :, None]), window[None, None, None])


@lru_cache(maxsize=1)
def _window() -> torch.Tensor:
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    return weights / weights.sum()


def _require_equal_shapes(truth: Clip, predicted: Clip) -> None:
    if truth.shape != predicted.shape or truth.ndim != 4:
        raise InputError(
            f"a predicted clip of shape {predicted.shape} cannot be compared with a true one of {truth.shape}.",
            remedy="Clips are (T, H, W, 3).",
        )
