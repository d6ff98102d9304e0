"""Stage 2 of the Video Prediction Policy (VPP, ICML 2025): Video-Former, action denoiser, policy."""

from training.models.vpp.config import ActionDenoiserConfig, SamplingConfig, VideoFormerConfig
from training.models.vpp.denoiser import ActionDenoiser
from training.models.vpp.former import VideoFormer
from training.models.vpp.policy import PolicyNetwork, VideoPredictionPolicy, VPPConfig

__all__ = [
    "ActionDenoiser",
    "ActionDenoiserConfig",
    "PolicyNetwork",
    "SamplingConfig",
    "VPPConfig",
    "VideoFormer",
    "VideoFormerConfig",
    "VideoPredictionPolicy",
]
