"""Goal-picture-conditioned diffusion policy with sub-goals from a video model, Susie style."""

from training.models.subgoal.config import StoredSubgoalPolicy, SubgoalConfig
from training.models.subgoal.model import SubgoalNetwork
from training.models.subgoal.policy import SusiePolicy

__all__ = ["StoredSubgoalPolicy", "SubgoalConfig", "SubgoalNetwork", "SusiePolicy"]
