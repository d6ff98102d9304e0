"""Text-guided video prediction: stage 1 of VPP, on the modules of Stable Video Diffusion."""

from training.models.tvp.config import TVPConfig, UNetConfig, VAEConfig
from training.models.tvp.model import TextGuidedVideoModel, TVPDraws
from training.models.tvp.text import encode_text

__all__ = ["TVPConfig", "TVPDraws", "TextGuidedVideoModel", "UNetConfig", "VAEConfig", "encode_text"]
