"""RSP: representation learning by stochastic frame prediction (ICML 2024)."""

from training.models.rsp.config import RSPConfig
from training.models.rsp.model import RSP, RSPDraws, RSPOutput

__all__ = ["RSP", "RSPConfig", "RSPDraws", "RSPOutput"]
