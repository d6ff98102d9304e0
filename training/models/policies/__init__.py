"""Policies on frozen features: behaviour cloning with action chunks."""

from training.models.policies.config import BehaviourCloningConfig, BehaviourCloningPolicyConfig
from training.models.policies.model import BehaviourCloningHead, Moments
from training.models.policies.policy import BehaviourCloningPolicy

__all__ = [
    "BehaviourCloningConfig",
    "BehaviourCloningHead",
    "BehaviourCloningPolicy",
    "BehaviourCloningPolicyConfig",
    "Moments",
]
