"""Any timm model as a frozen encoder, with weights from a file. Nothing is downloaded, no pickled code runs.

Shape letters: B batch, C channels, H height, W width, h and w feature map, P prefix tokens, L patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import safetensors
import safetensors.torch
import torch
from torch import nn

from infra.digests import sha256_file, sha256_json
from infra.errors import InputError
from training.models.common.images import Preprocessing, preprocess
from training.models.common.weights import load_weights, read_checkpoint
from training.protocols import Images

Match = Literal["names", "order"]
RESIZE_KINDS = ("bilinear", "bicubic")


class TimmEncoder:
    """A timm model in eval mode: (B, 1 + h * w, D) of a transformer's tokens or a convolutional feature map.

    The class token comes first, or the mean of the others where the model has none; register tokens are left out. A
    classifier is neither needed nor used. `patch_size` is the side of a token's square: a transformer's patch, the
    stride of a feature map.

    `match` "names" loads by name. "order" is for files whose names differ but whose tensors come in timm's order, as
    in the `efficientnet-lite0` package; shapes and last parts of the names (weight, running_mean, ...) must agree.
    """

    def __init__(
        self, name: str, weights: str | Path, *, match: Match = "names", image_size: int | None = None
    ) -> None:
        path = Path(weights)
        if match == "order" and path.suffix == ".safetensors":
            raise InputError(f"{path} does not keep the order of its tensors.", remedy="Match a .pth file by order.")
        found = read_weights(path)
        self._set_up(name, _create(name), image_size)
        (_load_by_name if match == "names" else _load_in_order)(self.model, found, f"{path} does not fit {name}")
        facts = {"timm": name, "weights": sha256_file(path), "match": match, "image_size": self.image_size}
        self.digest = sha256_json(facts)

    @classmethod
    def random(cls, name: str, *, seed: int, image_size: int | None = None) -> Self:
        """The same architecture with freshly drawn weights: a control arm. Equal seeds give equal weights."""
        encoder = cls.__new__(cls)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(name)
        encoder._set_up(name, model, image_size)
        encoder.digest = sha256_json({"random_timm": name, "seed": seed, "image_size": encoder.image_size})
        return encoder

    def to(self, device: str | torch.device) -> Self:
        """Move the weights; images given to `encode` follow them."""
        self.model.to(device)
        self._device = torch.device(device)
        return self

    def preprocess(self, images_BHWC: Images, size: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 RGB of any size -> normalised float32 (B, 3, H, W) at `size` (default: the model's own side)."""
        return preprocess(images_BHWC, self.preprocessing, size or (self.image_size, self.image_size))

    @torch.no_grad()
    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 1 + L, D) float32; L is (H / patch_size) * (W / patch_size) at the model's own side."""
        features = self.model.forward_features(images_BCHW.to(self._device)).float()
        if features.ndim == 3:
            prefix = int(getattr(self.model, "num_prefix_tokens", 0))
            patches_BLD = features[:, prefix:]
            has_class = prefix > 0 and getattr(self.model, "cls_token", None) is not None
            return torch.cat([features[:, :1] if has_class else patches_BLD.mean(1, keepdim=True), patches_BLD], dim=1)
        if str(getattr(self.model, "output_fmt", "NCHW")) == "NHWC":
            patches_BLD = features.flatten(1, 2)
        else:
            patches_BLD = features.flatten(2).transpose(1, 2)
        return torch.cat([patches_BLD.mean(1, keepdim=True), patches_BLD], dim=1)

    def _set_up(self, name: str, model: Any, image_size: int | None) -> None:
        import timm.data

        self.model = model.eval().requires_grad_(False)
        self._device = torch.device("cpu")
        wanted = timm.data.resolve_model_data_config(model)
        self.image_size = image_size or int(wanted["input_size"][-1])
        kind = wanted["interpolation"]
        self.preprocessing = Preprocessing(
            image_size=self.image_size,
            mean=wanted["mean"],
            std=wanted["std"],
            interpolation=kind if kind in RESIZE_KINDS else "bicubic",
        )
        self.patch_size, self.embed_dim = self._measure(name)

    def _measure(self, name: str) -> tuple[int, int]:
        """(side of a token's square, width), from one pass over an empty picture."""
        try:
            tokens = self.encode(torch.zeros(1, 3, self.image_size, self.image_size))
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{name} takes no pictures of {self.image_size} pixels: {reason}", remedy="Choose another image_size."
            ) from None
        side = round((tokens.shape[1] - 1) ** 0.5)
        patch_size = self.image_size // max(side, 1)
        if side * side != tokens.shape[1] - 1 or self.image_size // patch_size != side:
            raise InputError(
                f"{name} gives {tokens.shape[1] - 1} tokens of {self.image_size} pixels, no square grid of them.",
                remedy="Choose an image_size that its stride divides.",
            )
        return patch_size, tokens.shape[2]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or of a `.pt`/`.pth` (whole, or under `state_dict` or `model`), in their order.

    `InputError` when the file is missing, holds anything but plain tensors, or no tensor at all.
    """
    if path.suffix == ".safetensors":
        content: Mapping[str, Any] = _read_safetensors(path)
    else:
        content = read_checkpoint(path)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {
        name.removeprefix("module."): value for name, value in content.items() if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise InputError(f"{path} holds no weights.", remedy="Give a file of a model's state dict.")
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"weights {path} do not exist.", remedy="Give the path of a weights file.")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}.", remedy="Pickled weights are refused.") from None


def _create(name: str) -> Any:
    import timm

    if not timm.is_model(name):
        like = timm.list_models(f"*{name.partition('.')[0][:12]}*")[:5]
        raise InputError(
            f"timm {timm.__version__} knows no model {name!r}.",
            remedy=f"Similar: {', '.join(like)}." if like else "See timm.list_models().",
        )
    try:
        # Transformers that can take pictures of any size must be told so; all others refuse the word.
        return timm.create_model(name, pretrained=False, dynamic_img_size=True)
    except TypeError:
        return timm.create_model(name, pretrained=False)


def _load_by_name(model: nn.Module, found: Mapping[str, torch.Tensor], misfit: str) -> None:
    classifiers = _classifier_prefixes(model)
    own = {name: value for name, value in model.state_dict().items() if name.startswith(classifiers)}
    given = {name: value for name, value in found.items() if not name.startswith(classifiers)}
    try:
        load_weights(model, own | given)
    except InputError as error:
        raise InputError(
            f"{misfit}: {error.message}",
            remedy="Name the model these weights are of, or match them by order if only the names differ.",
        ) from None


def _load_in_order(model: nn.Module, found: Mapping[str, torch.Tensor], misfit: str) -> None:
    own = model.state_dict()
    if len(own) != len(found):
        raise InputError(
            f"{misfit} in order: it has {len(found)} tensors where {len(own)} are needed.",
            remedy="Order can only be matched one to one; name the model these weights are of.",
        )
    for place, (mine, theirs) in enumerate(zip(own, found, strict=True)):
        same_role = mine.rpartition(".")[2] == theirs.rpartition(".")[2]
        if own[mine].shape != found[theirs].shape or not same_role:
            raise InputError(
                f"{misfit} in order: tensor {place} is {theirs} {tuple(found[theirs].shape)} "
                f"where {mine} {tuple(own[mine].shape)} is needed.",
                remedy="Order can only be matched one to one; name the model these weights are of.",
            )
    load_weights(model, dict(zip(own, found.values(), strict=True)))


def _classifier_prefixes(model: Any) -> tuple[str, ...]:
    """How the names of a classifier begin; never "", which every name begins with."""
    named = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{part}." for part in ((named,) if isinstance(named, str) else named))
