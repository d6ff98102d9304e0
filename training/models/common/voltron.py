"""Voltron (V-Cond, V-Gen; ViT-S and ViT-B) as a frozen encoder over a user's weights; nothing is downloaded.

An official checkpoint is a pair (weights, optimiser state). What is read of the weights, D the width:

| official name | shape | here |
| --- | --- | --- |
| `patch2embed.proj.{weight,bias}` | D,3,16,16 / D | equal |
| `encoder_pe` | 1,196,D (197 with a class token) | equal; positions, fixed |
| `encoder_blocks.N.pre_norm_{attn,mlp}.g`, `encoder_norm.g` | D | equal |
| `encoder_blocks.N.attn.{qkv,proj}.{weight,bias}` | 3D,D / 3D; D,D / D | equal |
| `encoder_blocks.N.layer_scale_{attn,mlp}.gamma` | D | equal |
| `encoder_blocks.N.mlp.0.project.{weight,bias}`, `.mlp.2.{weight,bias}` | 8D,D / 8D; D,4D / D | equal |
| `lang2encoder.{weight,bias}` | D,768 / D | equal |
| `cls_token` (V-Cond, where trained with one) | 1,1,D | equal |
| `img_token`, `lang_token` (V-Cond) | 1,1,D | equal |
| `img_enc_token` / `lang_enc_token` (V-Gen) | 1,1,1,D / 1,1,D | `img_token`, `lang_token` |
| `ctx_enc_pe` (V-Gen: which of the two frames) | 1,2,1,D | equal |
| `lm.*` (the frozen DistilBERT) | its own | the language model |

Everything else belongs to the decoder and is left. The number of heads is in no shape: it is read from the official
`NAME-config.json` beside `NAME.pt`, else it is what the published widths have (6 of 384, 12 of 768).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from infra.digests import sha256_file, sha256_json
from infra.errors import InputError
from infra.storage import read_json
from training.models.common.images import Preprocessing, preprocess
from training.models.common.plain_features import joined_views
from training.models.common.timm_encoder import read_weights
from training.models.common.voltron_language import VoltronLanguage, folder_digest
from training.models.common.voltron_vit import VoltronConfig, VoltronViT
from training.models.common.weights import load_weights
from training.protocols import Images

PUBLISHED_HEADS = {384: 6, 768: 12}
LANGUAGE_PREFIX = "lm."
OTHER_NAMES = {"img_enc_token": "img_token", "lang_enc_token": "lang_token"}
ENCODER_NAMES = (
    "patch2embed.", "encoder_pe", "encoder_blocks.", "encoder_norm.", "lang2encoder.", "img_token", "lang_token",
    "cls_token", "ctx_enc_pe",
)  # fmt: skip


class VoltronEncoder:
    """Picture tokens under a sentence: (B, 1 + L, D), patches of the picture, the first row standing for all.

    That row is the class token where the weights have one, else the patches' mean: Voltron pools by an attention that
    is trained downstream. Without a sentence the official null text is read (the start mark alone). Sentences need
    `language`, the folder of DistilBERT's tokenizer, and of its weights if the checkpoint does not hold them.
    """

    def __init__(self, path: str | Path, *, language: str = "") -> None:
        path = Path(path)
        weights = read_voltron(path)
        self.config = _sizes(weights, path)
        self.model = VoltronViT(self.config).eval().requires_grad_(False)
        load_weights(self.model, _encoder_part(weights))
        lm = {name.removeprefix(LANGUAGE_PREFIX): value for name, value in weights.items() if _is_language(name)}
        self.language = VoltronLanguage(lm, language, dim=self.config.language_dim)
        self.embed_dim = self.config.embed_dim
        self.patch_size = self.config.patch_size
        self.image_size = self.config.image_size
        self.preprocessing = Preprocessing(image_size=self.image_size, interpolation="bilinear")
        facts = {"voltron": sha256_file(path), "num_heads": self.config.num_heads, "image_size": self.image_size}
        self.digest = sha256_json(facts | {"language": folder_digest(language) if language else ""})

    @property
    def reads_text(self) -> bool:
        """Whether sentences can be given."""
        return self.language.has_words

    def to(self, device: str | torch.device) -> Self:
        """Move the encoder; images given to `encode` follow it. The language model stays on the CPU."""
        self.model.to(device)
        return self

    def preprocess(self, images_BHWC: Images, size: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 RGB of any size -> normalised float32 (B, 3, H, W) at `size` (default: the training side).

        Pictures are stretched as for every encoder here; the official code crops the centre, which is the same for
        square ones.
        """
        return preprocess(images_BHWC, self.preprocessing, size or (self.image_size, self.image_size))

    @torch.no_grad()
    def encode(self, images_BCHW: torch.Tensor, text: Sequence[str] | None = None) -> torch.Tensor:
        """(B, 3, H, W) and B sentences (None: the null text) -> (B, 1 + H/p * W/p, D) float32, after the final norm."""
        device = self.model.encoder_pe.device
        states_BSD, mask_BS = self.language.states([None] * len(images_BCHW) if text is None else list(text))
        if len(states_BSD) != len(images_BCHW):
            raise InputError(
                f"{len(states_BSD)} sentences for {len(images_BCHW)} pictures.", remedy="Give one for each."
            )
        rows = self.model(images_BCHW.to(device), states_BSD.to(device), mask_BS.to(device))
        return rows if self.config.class_token else torch.cat([rows.mean(dim=1, keepdim=True), rows], dim=1)


class VoltronFeatures:
    """The `FeatureProvider` of a Voltron encoder: (B, 1, V * L, D) patch tokens under each observation's sentence."""

    def __init__(self, encoder: VoltronEncoder, *, cameras: Sequence[str] = ("main",)) -> None:
        self._encoder = encoder
        self.cameras = tuple(cameras)
        self.feature_dim = encoder.embed_dim
        num_patches = (encoder.image_size // encoder.patch_size) ** 2
        self.feature_shape = (1, num_patches * len(self.cameras), encoder.embed_dim)
        self.digest = sha256_json(
            {"encoder": encoder.digest, "cameras": list(self.cameras), "text": encoder.reads_text}
        )

    def features(
        self, images: dict[str, Images], text: Sequence[str], *, unit_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, 1, N, D) float32 on the CPU; the null text where the encoder was given no language folder."""
        sentences = text if self._encoder.reads_text else None

        def tokens(pictures: Images) -> torch.Tensor:
            return self._encoder.encode(self._encoder.preprocess(pictures), sentences)[:, 1:].cpu()

        return joined_views(images, self.cameras, tokens)


def read_voltron(path: Path) -> dict[str, torch.Tensor]:
    """The weights of an official checkpoint, or of a plain state dict (`.pt` or `.safetensors`), under official names.

    `InputError` when the file is missing or holds anything but plain tensors.
    """
    if not path.is_file():
        raise InputError(f"Voltron's weights {path} do not exist.", remedy="Give the path of an official checkpoint.")
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a checkpoint of plain tensors: {reason}", remedy="Save its weights.") from None
    # The second half, the optimiser's state, is of no use here.
    state = content[0] if isinstance(content, tuple | list) and content else content
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} holds no state dict.", remedy="Give an official Voltron checkpoint.")
    return dict(state)


def _is_language(name: str) -> bool:
    return name.startswith(LANGUAGE_PREFIX) and not name.endswith(".position_ids")


def _encoder_part(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {OTHER_NAMES.get(name, name): value for name, value in weights.items()}
    kept = {name: value for name, value in named.items() if name.startswith(ENCODER_NAMES)}
    for name in OTHER_NAMES.values():
        if name in kept:
            kept[name] = kept[name].reshape(1, 1, -1)
    return kept


def _sizes(weights: Mapping[str, torch.Tensor], path: Path) -> VoltronConfig:
    """The sizes that the shapes tell, with heads and resolution from the config beside the file if there is one."""
    needed = ("patch2embed.proj.weight", "encoder_pe", "encoder_blocks.0.mlp.2.weight", "lang2encoder.weight")
    if missing := [name for name in needed if name not in weights]:
        raise InputError(f"{path} has no {missing[0]}.", remedy="Give a checkpoint of V-Cond or V-Gen.")
    if "img_token" in weights and "ctx_enc_pe" in weights:
        raise InputError(f"{path} is of V-Dual, which is not read.", remedy="Give a checkpoint of V-Cond or V-Gen.")
    beside = path.with_name(f"{path.stem}-config.json")
    stored: Any = read_json(beside) if beside.is_file() else {}
    width, _, patch_size, _ = weights["patch2embed.proj.weight"].shape
    heads = stored.get("encoder_n_heads", PUBLISHED_HEADS.get(width))
    if heads is None:
        raise InputError(
            f"{path} has width {width}, which no published Voltron has, so its number of heads is unknown.",
            remedy=f"Put its configuration beside it as {beside.name}.",
        )
    class_token = "cls_token" in weights
    rows = weights["encoder_pe"].shape[1] - class_token
    side = round(rows**0.5)
    if side * side != rows:
        raise InputError(f"{path}: encoder_pe has {rows} patches, which are no square.", remedy="Check the file.")
    return VoltronConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in weights if name.startswith("encoder_blocks.")}),
        num_heads=heads,
        mlp_dim=weights["encoder_blocks.0.mlp.2.weight"].shape[1],
        language_dim=weights["lang2encoder.weight"].shape[1],
        num_frames=weights["ctx_enc_pe"].shape[1] if "ctx_enc_pe" in weights else 1,
        class_token=class_token,
    )
