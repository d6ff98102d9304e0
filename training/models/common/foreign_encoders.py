"""Encoders that others trained, as evaluation and policies see them: the `Encoder` protocol over a user's weights."""

from training.models.common.timm_encoder import TimmEncoder
from training.models.common.voltron import VoltronEncoder, VoltronFeatures

__all__ = ["TimmEncoder", "VoltronEncoder", "VoltronFeatures"]
