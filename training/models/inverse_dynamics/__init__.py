"""Inverse dynamics of frame pairs, and the Uni-Pi style policy on a video model's plans."""

from training.models.inverse_dynamics.config import InverseDynamicsConfig, StoredUniPiPolicy
from training.models.inverse_dynamics.model import InverseDynamicsNetwork
from training.models.inverse_dynamics.policy import UniPiPolicy

__all__ = ["InverseDynamicsConfig", "InverseDynamicsNetwork", "StoredUniPiPolicy", "UniPiPolicy"]
