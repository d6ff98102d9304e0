"""Diffusion Policy: action chunks denoised on pictures, end to end."""

from training.models.diffusion_policy.config import DiffusionPolicyConfig, StoredDiffusionPolicy
from training.models.diffusion_policy.model import DiffusionPolicyNetwork
from training.models.diffusion_policy.policy import DiffusionPolicy

__all__ = ["DiffusionPolicy", "DiffusionPolicyConfig", "DiffusionPolicyNetwork", "StoredDiffusionPolicy"]
