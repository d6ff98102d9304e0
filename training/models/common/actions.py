"""From recorded commands to the numbers a policy predicts, and back: one codec, stored with every policy.

A codec first turns commands into targets relative to the state at the decision (`transform`), then normalises every
dimension. Sources: VPP (arXiv 2412.14803) appendix and its official loaders for `xhand` and `xbot`.
Shape letters: B batch, C chunk, A action as commanded, D target, P state.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from infra.config import Config
from infra.errors import ConfigError, DataError

MIN_SCALE = 1e-3  # a dimension that hardly moves (an unused gripper) must not be blown up
POSE, HAND = 7, 12  # xyz and quaternion; joints of one hand
XBOT_STATE = 2 * (POSE + HAND)
XHAND_STATE, XHAND_TARGET = POSE + HAND, 6 + HAND

Transform = Literal["none", "xhand", "xbot"]
Scaling = Literal["none", "deviation", "bounds"]
Floats = npt.NDArray[np.float32]


class CodecConfig(Config):
    """How a codec is fitted to training data.

    `transform`: "none" predicts commands as they are; "xbot" command minus state in every dimension; "xhand" 3
    translations and 3 rotation angles of the wrist relative to where it is, then 12 joints as commanded.
    `scaling`: "none"; "deviation" brings every dimension to `deviation` around its mean; "bounds" maps the
    `percentiles` of every dimension to [-1, 1] and clips. `binary` dimensions become +1 or -1 when decoded, by sign.
    """

    transform: Transform = "none"
    scaling: Scaling = "deviation"
    deviation: float = Field(default=0.5, gt=0)  # the denoiser's sigma_data
    percentiles: tuple[float, float] = (1.0, 99.0)
    action_range: tuple[float, float] | None = (-1.0, 1.0)  # decoded actions are clamped into it; None: not at all
    binary: tuple[int, ...] = ()
    quaternion: Literal["xyzw", "wxyz"] = "xyzw"

    @model_validator(mode="after")
    def _percentiles_rise(self) -> Self:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {self.percentiles} do not rise within 0 and 100")
        return self


class ActionCodec(Config):
    """A fitted codec. Normalised = (target - `offset`) / `scale` per dimension, clipped to [-1, 1] for "bounds"."""

    config: CodecConfig
    offset: tuple[float, ...]
    scale: tuple[float, ...]
    state_offset: tuple[float, ...]
    state_scale: tuple[float, ...]

    @classmethod
    def fit(cls, config: CodecConfig, actions_BCA: torch.Tensor, state_BP: torch.Tensor, mask_BC: torch.Tensor) -> Self:
        """Statistics of the masked-in targets and of the states of training windows."""
        targets_BCD = to_targets(config, actions_BCA, state_BP)
        offset, scale = _fit(config, targets_BCD[mask_BC].double().numpy())
        state_offset, state_scale = _fit(config, canonical_state(config, state_BP).double().numpy())
        return cls(config=config, offset=offset, scale=scale, state_offset=state_offset, state_scale=state_scale)

    @property
    def target_dim(self) -> int:
        """Numbers a policy predicts for every step."""
        return len(self.offset)

    @property
    def state_dim(self) -> int:
        """Width of the proprioception."""
        return len(self.state_offset)

    def encode(self, actions_BCA: torch.Tensor, state_BP: torch.Tensor) -> torch.Tensor:
        """Commands and the states they were decided in -> normalised targets (B, C, D)."""
        return self._clip(_normalise(to_targets(self.config, actions_BCA, state_BP), self.offset, self.scale))

    def decode(self, normalised_BCD: torch.Tensor, state_BP: torch.Tensor) -> torch.Tensor:
        """Predictions -> commands (B, C, A) in the environment's units, within `action_range`."""
        targets = normalised_BCD * normalised_BCD.new_tensor(self.scale) + normalised_BCD.new_tensor(self.offset)
        actions = from_targets(self.config, targets, state_BP)
        for dimension in self.config.binary:
            actions[..., dimension] = torch.where(actions[..., dimension] > 0, 1.0, -1.0)
        return actions if self.config.action_range is None else actions.clamp(*self.config.action_range)

    def state(self, state_BP: torch.Tensor) -> torch.Tensor:
        """Proprioception as the policy sees it: (B, P) normalised."""
        return self._clip(_normalise(canonical_state(self.config, state_BP), self.state_offset, self.state_scale))

    def _clip(self, values: torch.Tensor) -> torch.Tensor:
        return values.clamp(-1, 1) if self.config.scaling == "bounds" else values


def to_targets(config: CodecConfig, actions_BCA: torch.Tensor, state_BP: torch.Tensor) -> torch.Tensor:
    """Commands relative to the state at the decision, (B, C, D) float32."""
    if config.transform == "none":
        return actions_BCA.float()
    state = canonical_state(config, state_BP)[:, None]
    actions = canonical_state(config, actions_BCA)
    _check_widths(config, actions.shape[-1], state.shape[-1])
    if config.transform == "xbot":
        return actions - state
    current = _rotation(config, state[..., 3:POSE]).expand(*actions.shape[:2], 3, 3)
    turn = _relative(current, actions[..., 3:POSE], config)
    return torch.cat([actions[..., :3] - state[..., :3], turn, actions[..., POSE:]], dim=-1)


def from_targets(config: CodecConfig, targets_BCD: torch.Tensor, state_BP: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_targets`."""
    if config.transform == "none":
        return targets_BCD.clone()
    state = canonical_state(config, state_BP)[:, None]
    if config.transform == "xbot":
        return canonical_state(config, targets_BCD + state)
    current = _rotation(config, state[..., 3:POSE]).expand(*targets_BCD.shape[:2], 3, 3)
    quaternion = _quaternion(config, current @ _from_euler(targets_BCD[..., 3:6]))
    parts = [targets_BCD[..., :3] + state[..., :3], quaternion, targets_BCD[..., 6:]]
    return canonical_state(config, torch.cat(parts, dim=-1))


def canonical_state(config: CodecConfig, values: torch.Tensor) -> torch.Tensor:
    """Every quaternion of a pose with the sign that makes its first number (element 3 of the pose) not negative."""
    values = values.float()
    if config.transform == "none":
        return values
    starts = (0,) if config.transform == "xhand" else (0, POSE + HAND)
    values = values.clone()
    for start in starts:
        quaternion = values[..., start + 3 : start + POSE]
        sign = torch.where(quaternion[..., :1] < 0, -1.0, 1.0)
        values[..., start + 3 : start + POSE] = quaternion * sign
    return values


def _check_widths(config: CodecConfig, action_dim: int, state_dim: int) -> None:
    wanted = XHAND_STATE if config.transform == "xhand" else XBOT_STATE
    if (action_dim, state_dim) != (wanted, wanted):
        raise DataError(
            f"transform {config.transform!r} needs commands and states of {wanted} numbers, "
            f"not {action_dim} and {state_dim}.",
            remedy="Set codec.transform to none, or give the data set it is for.",
        )


def _fit(config: CodecConfig, values_ND: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not len(values_ND):
        raise ConfigError("a codec cannot be fitted to no action.", remedy="Choose another data set or split.")
    width = values_ND.shape[1]
    if config.scaling == "none":
        return (0.0,) * width, (1.0,) * width
    if config.scaling == "deviation":
        spread = values_ND.std(axis=0)
        offset, scale = values_ND.mean(axis=0), spread / config.deviation
    else:
        low, high = np.percentile(values_ND, config.percentiles, axis=0)
        spread, offset, scale = high - low, (high + low) / 2, (high - low) / 2
    scale = np.where(spread < MIN_SCALE, 1.0, scale)
    return tuple(offset.tolist()), tuple(scale.tolist())


def _normalise(values: torch.Tensor, offset: tuple[float, ...], scale: tuple[float, ...]) -> torch.Tensor:
    return (values - values.new_tensor(offset)) / values.new_tensor(scale)


def _rotation(config: CodecConfig, quaternion: torch.Tensor) -> torch.Tensor:
    """(..., 4) -> rotation matrices (..., 3, 3)."""
    from scipy.spatial.transform import Rotation

    ordered = quaternion if config.quaternion == "xyzw" else quaternion.roll(-1, dims=-1)
    flat = ordered.reshape(-1, 4).double().numpy()
    if (np.linalg.norm(flat, axis=1) < MIN_SCALE).any():
        raise DataError("a pose holds a quaternion of length zero.", remedy="Leave that episode out.")
    return torch.from_numpy(Rotation.from_quat(flat).as_matrix()).float().reshape(*quaternion.shape[:-1], 3, 3)


def _quaternion(config: CodecConfig, matrix: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (..., 3, 3) -> (..., 4) in the data's order."""
    from scipy.spatial.transform import Rotation

    flat = torch.from_numpy(Rotation.from_matrix(matrix.reshape(-1, 3, 3).double().numpy()).as_quat()).float()
    ordered = flat if config.quaternion == "xyzw" else flat.roll(1, dims=-1)
    return ordered.reshape(*matrix.shape[:-2], 4)


def _relative(current: torch.Tensor, quaternion: torch.Tensor, config: CodecConfig) -> torch.Tensor:
    """Roll, pitch and yaw (..., 3) of the commanded rotation seen from the current one: R_cur^T R_cmd."""
    from scipy.spatial.transform import Rotation

    turn = current.transpose(-1, -2) @ _rotation(config, quaternion)
    angles = Rotation.from_matrix(turn.reshape(-1, 3, 3).double().numpy()).as_euler("xyz")
    return torch.from_numpy(angles).float().reshape(*quaternion.shape[:-1], 3)


def _from_euler(angles: torch.Tensor) -> torch.Tensor:
    from scipy.spatial.transform import Rotation

    flat = Rotation.from_euler("xyz", angles.reshape(-1, 3).double().numpy()).as_matrix()
    return torch.from_numpy(flat).float().reshape(*angles.shape[:-1], 3, 3)
