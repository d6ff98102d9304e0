"""The stored policy in closed loop: encoder, head and sentence encoder behind the `Policy` protocol."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from infra.errors import InputError
from training.models.common.frozen import FeatureKind, FrozenEncoder, frame_features
from training.models.common.images import Preprocessing
from training.models.common.text import SentenceEncoder
from training.models.policies.config import BehaviourCloningPolicyConfig
from training.models.policies.model import BehaviourCloningHead
from training.protocols import Images, Observation


class BehaviourCloningPolicy:
    """Deterministic: equal observations give equal actions."""

    def __init__(
        self,
        head: BehaviourCloningHead,
        *,
        encoder: FrozenEncoder | None = None,
        camera: str = "main",
        text: SentenceEncoder | None = None,
        digest: str = "",
    ) -> None:
        if head.config.uses_images != (encoder is not None):
            having = "without" if encoder is None else "with"
            raise InputError(f"feature {head.config.feature!r} {having} an encoder.", remedy="Make the two agree.")
        self.head = head.eval()
        self.encoder = encoder
        self.camera = camera
        self.text = text or SentenceEncoder()
        self.digest = digest
        self.needs_images = head.config.uses_images
        self.action_horizon = head.config.execute
        self._history: list[torch.Tensor] = []

    @property
    def config(self) -> BehaviourCloningPolicyConfig:
        """What an export stores beside the weights."""
        if self.encoder is None:
            return BehaviourCloningPolicyConfig(head=self.head.config, camera=self.camera)
        return BehaviourCloningPolicyConfig(
            head=self.head.config,
            encoder=self.encoder.config,
            encoder_digest=self.encoder.digest,
            camera=self.camera,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """The encoder's; the default where there is none."""
        return Preprocessing() if self.encoder is None else self.encoder.preprocessing

    def weights(self) -> dict[str, torch.Tensor]:
        """Head and frozen encoder, so that an export needs no other file."""
        weights = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        if self.encoder is not None:
            weights |= {f"encoder.{name}": value for name, value in self.encoder.model.state_dict().items()}
        return weights

    def reset(self, batch_size: int) -> None:
        """Forget the pictures seen; the next `act` belongs to `batch_size` new episodes."""
        self._history = []

    def act(self, observation: Observation) -> npt.NDArray[np.float32]:
        """-> (B, execute, A) in the environment's units, clamped to the head's action range."""
        features = self._look(observation.images) if self.needs_images else None
        proprioception = torch.from_numpy(np.asarray(observation.proprioception, dtype=np.float32))
        text = self.text.encode(observation.text) if self.head.config.text_dim else None
        chunk = self.head.predict(features, proprioception, text)
        return chunk[:, : self.action_horizon].numpy()

    def _look(self, images: dict[str, Images]) -> torch.Tensor:
        """(B, T, ...) features of this decision and those before it; the first picture stands in for missing ones."""
        assert self.encoder is not None
        if self.camera not in images:
            raise InputError(
                f"the policy needs camera {self.camera!r}, the observation has {sorted(images)}.",
                remedy="Render that camera.",
            )
        kind: FeatureKind = "patch_tokens" if self.head.config.feature == "patch_tokens" else "class_token"
        latest = frame_features(self.encoder, images[self.camera], kind)
        if self._history and len(self._history[-1]) != len(latest):
            raise InputError(
                f"batch of {len(latest)} after one of {len(self._history[-1])}.", remedy="Call reset between episodes."
            )
        length = self.head.config.history
        self._history = [*(self._history or [latest] * (length - 1)), latest][-length:]
        return torch.stack(self._history, dim=1)
