"""MAE: masked autoencoding of single frames (He et al. 2022), the training behind VC-1."""

from training.models.views.mae.config import MAEConfig
from training.models.views.mae.model import MAE, MAEOutput

__all__ = ["MAE", "MAEConfig", "MAEOutput"]
