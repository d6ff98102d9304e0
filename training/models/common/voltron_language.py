"""Token states of DistilBERT as Voltron reads them: 20 tokens a sentence, padded, or the null text.

Shape letters: B sentences, S tokens, D width of the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from infra.digests import sha256_file, sha256_json
from infra.errors import InputError
from infra.storage import read_json
from training.models.common.voltron_vit import MAX_TOKENS
from training.models.common.weights import load_weights

log = logging.getLogger(__name__)

START_MARK = 101  # [CLS] of the uncased vocabulary; the null text is this mark and padding
HEAD_WIDTH = 64
DECIDING_FILES = ("*.safetensors", "config.json", "tokenizer*.json", "vocab.txt", "special_tokens_map.json")


class VoltronLanguage:
    """Frozen, in float32 on the CPU; each sentence is encoded by itself, once.

    `weights` are those of the checkpoint, under DistilBERT's names; where it has none, the folder's are taken.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], folder: str, *, dim: int) -> None:
        if folder and not Path(folder).is_dir():
            raise InputError(f"language folder {folder} does not exist.", remedy="Give a local DistilBERT folder.")
        if not weights and not folder:
            raise InputError(
                "Voltron's checkpoint holds no language model, and even the null text needs one.",
                remedy="Give the folder of distilbert-base-uncased as language.",
            )
        self.has_words = bool(folder)
        self._tokenizer: Any = _tokenizer(folder) if folder else None
        self._model: Any = _from_weights(weights, folder) if weights else _from_folder(folder)
        if self._model.config.dim != dim:
            raise InputError(
                f"the language model's width is {self._model.config.dim}, Voltron reads {dim}.",
                remedy="Give the language model it was trained with, distilbert-base-uncased.",
            )
        self._cache: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def states(self, sentences: Sequence[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, 20, D) last hidden states, (B, 20) 1 where a token is); None is the null text.

        `InputError` for a sentence when there is no tokenizer. A longer sentence loses its end, as officially.
        """
        for sentence in sentences:
            if sentence not in self._cache:
                self._cache[sentence] = self._encode(sentence)
        found = [self._cache[sentence] for sentence in sentences]
        return torch.stack([states for states, _ in found]), torch.stack([mask for _, mask in found])

    def _encode(self, sentence: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = self._tokens(sentence)
        with torch.no_grad():
            states = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return states[0].float(), mask[0]

    def _tokens(self, sentence: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        if sentence is None:
            tokens, mask = (torch.zeros(1, MAX_TOKENS, dtype=torch.int64) for _ in range(2))
            tokens[0, 0] = START_MARK if self._tokenizer is None else self._tokenizer.cls_token_id
            mask[0, 0] = 1
            return tokens, mask
        if self._tokenizer is None:
            raise InputError(
                f"Voltron was given the sentence {sentence!r} and no tokenizer.",
                remedy="Give the folder of distilbert-base-uncased as language.",
            )
        if (length := len(self._tokenizer(sentence, verbose=False)["input_ids"])) > MAX_TOKENS:
            log.warning(
                "the text %r has %d tokens where Voltron reads %d: its end is dropped", sentence, length, MAX_TOKENS
            )
        inputs = self._tokenizer(
            sentence, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        return inputs["input_ids"], inputs["attention_mask"]


def folder_digest(folder: str) -> str:
    """sha256 over the files that decide the states: vocabulary, sizes, weights."""
    files = sorted({path for pattern in DECIDING_FILES for path in Path(folder).glob(pattern)})
    return sha256_json({path.name: sha256_file(path) for path in files})


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} has no tokenizer: {reason}", remedy="Give a DistilBERT folder.") from None


def _from_weights(weights: Mapping[str, torch.Tensor], folder: str) -> Any:
    """The checkpoint's language model; its heads are in no shape: 64 numbers each, unless the folder says otherwise."""
    from transformers import DistilBertConfig, DistilBertModel

    needed = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
    first = "transformer.layer.0.ffn.lin1.weight"
    if missing := [name for name in (*needed, first) if name not in weights]:
        raise InputError(f"Voltron's language model lacks {missing[0]}.", remedy="Give an official checkpoint.")
    words, places = (weights[name].shape for name in needed)
    stored = read_json(Path(folder) / "config.json") if folder and (Path(folder) / "config.json").is_file() else {}
    config = DistilBertConfig(
        vocab_size=words[0],
        max_position_embeddings=places[0],
        dim=words[1],
        n_layers=len({name.split(".")[2] for name in weights if name.startswith("transformer.layer.")}),
        n_heads=int(stored.get("n_heads", max(words[1] // HEAD_WIDTH, 1))),
        hidden_dim=weights[first].shape[0],
    )
    with torch.random.fork_rng(devices=[]):
        model = DistilBertModel(config)
    load_weights(model, weights)
    return model.eval().requires_grad_(False)


def _from_folder(folder: str) -> Any:
    from transformers import DistilBertModel

    try:
        model = DistilBertModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} is no DistilBERT folder: {reason}", remedy="Give one with .safetensors.") from None
    return model.eval().requires_grad_(False)
