"""How good predicted videos are: the loss, pixels, movement, sets of clips, and whether the sentence matters."""

from evaluation.video_quality.frechet import frechet_distance, kernel_distance
from evaluation.video_quality.metrics import change_cosine, moving_psnr, moving_region, psnr, ssim

__all__ = ["change_cosine", "frechet_distance", "kernel_distance", "moving_psnr", "moving_region", "psnr", "ssim"]
