"""What a fine-tuning run trains: clips and sentences into the EDM loss of a text-guided video model.

Shape letters: B clips, T frames, C latent channels, h, w latents, S image side, L text tokens, D width of their states.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.digests import sha256_json
from infra.errors import ConfigError, InputError
from infra.storage import absolute, join, read_bytes, read_json
from training.callbacks.metrics_file import METRICS_NAME
from training.callbacks.previews import VALIDATION_LOSS
from training.data.video_clips import ClipBatch, ClipVisit, VideoClipDataset, to_model_range
from training.export import model_card
from training.export_video import VIDEO_LOADING, load_vae, load_video_weights, save_video_export, video_digest
from training.loop import Group
from training.models.common.text import TokenEncoder
from training.models.tvp import TextGuidedVideoModel, TVPConfig, TVPDraws, encode_text
from training.models.tvp.autoencoder import FrozenVAE
from training.models.tvp.official import OWN_NAME, is_diffusers_folder, load_diffusers
from training.models.tvp.predictor import FrozenVideoModel
from training.previews import PreviewClip, spread_clips
from training.recipes.sources import held_out
from training.recipes.tvp import FinetuneConfig
from training.state import counter_seed, load_model

log = logging.getLogger(__name__)

# What must agree between a run and the model it starts from, besides the UNet's sizes.
OF_THE_WEIGHTS = ("num_frames", "image_size", "position_code")


class TVPTask:
    """Clips from pixels or a latent cache; every random number keyed by (seed, source, epoch, clip)."""

    repeats = 1

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self._seed = config.data.seed or config.seed
        self._dataset = VideoClipDataset(config.data.model_copy(update={"seed": self._seed}))
        self.num_clips = self._dataset.num_clips
        self.from_cache = bool(config.data.sources[0].latents)
        self._vae = self._open_vae()
        self.model_config: TVPConfig = config.model
        if self._vae is not None:
            self.model_config = config.model.model_copy(update={"vae": self._vae.config})
        self.latent_shape = _latent_shape(self.model_config)
        self.inputs: tuple[str, ...] = self._dataset.inputs
        if self._vae is not None:
            weights = video_digest(config.initial or config.vae)
            self.inputs = (*self.inputs, weights, self._encoder.digest)
        self.data_digest = sha256_json(list(self.inputs))
        if self._vae is not None and self.from_cache:
            self._check_caches(self._vae)

    def build_model(self) -> TextGuidedVideoModel:
        """Fresh weights from the global generator; those to start from follow in `prepare`."""
        model = TextGuidedVideoModel.random(self.model_config)
        model.checkpoint_activations(self.config.checkpoint_activations)
        return model

    def prepare(self, model: nn.Module) -> None:
        """Copy the weights that the run starts from: all of them, or the autoencoder's."""
        assert isinstance(model, TextGuidedVideoModel)
        if self._vae is None:
            raise ConfigError(
                "finetune-tvp has neither initial nor vae: a random autoencoder cannot decode.",
                remedy="Give initial (a diffusers folder or tvp export), or vae (the export of a fit-vae run).",
            )
        if self.config.initial:
            load_model(model, self._load_initial().state_dict())
        else:
            load_model(model.vae, self._vae.vae.state_dict())

    def batches(
        self, *, steps: range, global_batch_size: int, micro_batch_size: int, group: Group, loader_workers: int
    ) -> Iterator[Sequence[ClipBatch]]:
        """This rank's micro-batches of every step."""
        return self._dataset.batches(
            steps=steps,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            group=group,
            loader_workers=loader_workers,
        )

    def loss(self, model: nn.Module, batch: ClipBatch, device: torch.device) -> dict[str, torch.Tensor]:
        """The mean over clips of each one's loss times its source's coefficient (the paper's equation 4)."""
        assert isinstance(model, TextGuidedVideoModel)
        pixels = None
        draws, posterior_noise, (image_sigma, image_noise) = self.draws(batch, device)
        if batch.moments is not None:
            mean, std = batch.moments.to(device, non_blocking=True).unbind(dim=2)
            latents = mean if self.config.latents == "mode" else mean + std * posterior_noise
        else:
            assert batch.pixels is not None
            clips = to_model_range(batch.pixels.to(device, non_blocking=True))
            latents, _ = model.encode(clips)
            if self.config.condition_noise:
                pixels, draws = clips, draws._replace(image_sigma_noise=image_sigma, image_noise=image_noise)
        loss = model.training_loss(
            latents * model.scale,
            self._tokens(batch).to(device),
            draws,
            pixels=pixels,
            weights=batch.coefficients.to(device),
        )
        return {"loss": loss}

    def draws(
        self, batch: ClipBatch, device: torch.device
    ) -> tuple[TVPDraws, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """(what both paths draw, the cache's posterior noise, the pixel path's image sigma and noise) of a batch.

        A clip's numbers are the same whatever rank, batch or path it is in.
        """
        side = self.config.model.image_size
        frames = (self.config.model.num_frames, *self.latent_shape)
        drawn = [_draw_clip(self._seed, visit, frames, side) for visit in batch.visits]
        keep, sigma, noise, posterior, image_sigma, image_noise = (
            torch.stack(column).to(device) for column in zip(*drawn, strict=True)
        )
        common = TVPDraws(text_keep=keep, sigma_noise=sigma.view(-1, 1, 1, 1, 1), latent_noise=noise)
        return common, posterior, (image_sigma.view(-1, 1, 1, 1, 1), image_noise)

    def example(self, num_clips: int) -> ClipBatch:
        """Shapes only. The text comes as states, so that no encoder is needed to plan memory."""
        model = self.config.model
        text = (num_clips, model.text.max_tokens, model.unet.cross_attention_dim // 2)
        clips = num_clips, model.num_frames
        side = model.image_size
        return ClipBatch(
            visits=tuple(ClipVisit(0, 0, clip, "main") for clip in range(num_clips)),
            texts=("",) * num_clips,
            coefficients=torch.ones(num_clips, device="meta"),
            pixels=None if self.from_cache else torch.empty(*clips, 3, side, side, dtype=torch.uint8, device="meta"),
            moments=torch.empty(*clips, 2, *self.latent_shape, device="meta") if self.from_cache else None,
            text_states=torch.empty(text, device="meta"),
        )

    def batch_tensors(self, batch: ClipBatch) -> dict[str, torch.Tensor]:
        """Pixels or moments, text states where there are any, and the visits."""
        tensors = {"pixels": batch.pixels, "moments": batch.moments, "text_states": batch.text_states}
        visits = torch.tensor([visit[:3] for visit in batch.visits])
        return {name: value for name, value in tensors.items() if value is not None} | {"visits": visits}

    def predictor(self, model: nn.Module) -> FrozenVideoModel:
        """The model in training as evaluation sees one. It freezes the model: who calls sets it going again."""
        assert isinstance(model, TextGuidedVideoModel)
        autocast = self.config.precision == "bf16"
        return FrozenVideoModel(model, digest="", text=self._encoder, autocast=autocast)

    def preview_clips(self) -> tuple[Sequence[PreviewClip], Sequence[PreviewClip]]:
        """(clips to show, clips to rate). Held-out ones; without any, training clips are shown and none is rated."""
        how, unseen = self.config.previews, held_out(self.config.data.sources)
        if not unseen:
            log.warning("no source has a validation split: previews show training clips, no validation loss")
            return spread_clips(self.config.data.sources, how.num_clips), ()
        return spread_clips(unseen, how.num_clips), spread_clips(unseen, how.validation_clips)

    def export(self, folder: str, model: nn.Module, *, summary: dict[str, Any]) -> str:
        """Publish UNet and autoencoder together."""
        assert isinstance(model, TextGuidedVideoModel)
        rated = _recorded(join(absolute(self.config.output), METRICS_NAME), VALIDATION_LOSS)
        summary[VALIDATION_LOSS] = {"first": rated[0], "last": rated[-1]} if rated else None
        card = model_card(
            "Text-guided video model",
            summary="Continues a first frame as a sentence says (VPP, stage 1): a fine-tuned latent video diffusion "
            "model with text tokens in the image embedding's place.",
            facts=self._facts(summary, rated),
            limits="It knows the scenes, cameras and sentences of its sources. A low loss does not say that what it "
            "shows is possible: see the evaluations that name this export's digest.",
            loading=VIDEO_LOADING,
        )
        return save_video_export(folder, model, card=card, inputs=self.inputs)

    def _facts(self, summary: Mapping[str, Any], rated: Sequence[float]) -> dict[str, object]:
        config = self.config
        sources = [
            f"{source.name} ({source.probability:g} x {source.loss_coefficient:g})" for source in config.data.sources
        ]
        return {
            "sources (probability x loss coefficient)": ", ".join(sources),
            "frames": f"{config.model.num_frames} of {config.model.image_size} pixels",
            "started from": config.initial or f"random UNet, autoencoder {config.vae}",
            "targets": f"cached latents, {config.latents}" if self.from_cache else "pixels, posterior mean",
            "text encoder": f"{config.model.text.kind}, position code {'on' if config.model.position_code else 'off'}",
            "steps": summary["steps"],
            "clips a step": config.global_batch_size,
            "loss, mean of the last 50 steps": f"{summary['last'].get('loss', float('nan')):.4f}",
            "validation loss, first step and last": f"{rated[0]:.4f}, {rated[-1]:.4f}" if rated else "none held out",
            "config": config.identity_digest(),
        }

    @cached_property
    def _encoder(self) -> TokenEncoder:
        return TokenEncoder(self.config.model.text)

    def _tokens(self, batch: ClipBatch) -> torch.Tensor:
        states = self._encoder.encode(batch.texts) if batch.text_states is None else batch.text_states
        wanted = self.config.model.unet.cross_attention_dim
        if 2 * states.shape[-1] != wanted:
            raise ConfigError(
                f"the text encoder gives {states.shape[-1]} numbers a token, twice that is not the UNet's {wanted}.",
                remedy="Set model.unet.cross_attention_dim to twice the text encoder's width.",
            )
        return encode_text(states, position_code=self.config.model.position_code)

    def _open_vae(self) -> FrozenVAE | None:
        """None where nothing is named, which is enough to plan a run."""
        url = self.config.initial or self.config.vae
        if not url:
            return None
        vae = load_vae(url)
        if self.config.vae and self.config.model.decode_chunk != 1 and not is_diffusers_folder(url):
            raise ConfigError(
                f"model.decode_chunk is {self.config.model.decode_chunk}, but {url} was fitted on single frames.",
                remedy="Set model.decode_chunk=1.",
            )
        return vae

    def _check_caches(self, vae: FrozenVAE) -> None:
        """`InputError`, one line, for a cache of another autoencoder, text encoder or size."""
        for cache in dict.fromkeys(self._dataset.caches):
            if not cache.vae_digest:
                log.warning("%s does not say which autoencoder made it; take care that it is this run's", cache.url)
            cache.require(
                vae_digest=vae.digest if cache.vae_digest else None,
                image_size=self.config.model.image_size,
                text_digest=self._encoder.digest,
            )
            found = (*cache.latent_shape, cache.manifest.text_shape[0])
            wanted = (*self.latent_shape, self.config.model.text.max_tokens)
            if found != wanted:
                raise InputError(
                    f"latent cache {cache.url} has (channels, height, width, text tokens) {found}, the run {wanted}.",
                    remedy="Build a cache with this run's autoencoder and text encoder.",
                )

    def _load_initial(self) -> TextGuidedVideoModel:
        url, wanted = self.config.initial, self.model_config
        if is_diffusers_folder(url):
            stored = read_json(Path(url) / OWN_NAME) if (Path(url) / OWN_NAME).is_file() else {}
            _require_agreement(url, stored, wanted.to_json())
            loaded = load_diffusers(url, position_code=wanted.position_code, text=wanted.text)
        else:
            loaded = load_video_weights(url)
            _require_agreement(url, loaded.config.to_json(), wanted.to_json())
        _require_agreement(url, loaded.true_config().unet.to_json(), wanted.unet.to_json(), prefix="unet.")
        return loaded


def _require_agreement(url: str, found: Mapping[str, Any], wanted: Mapping[str, Any], *, prefix: str = "") -> None:
    keys = wanted.keys() if prefix else OF_THE_WEIGHTS
    for key in keys:
        if found.get(key, wanted[key]) != wanted[key]:
            raise ConfigError(
                f"model.{prefix}{key} is {wanted[key]!r}, the weights of {url} are of {found[key]!r}.",
                remedy="Set the config to what the weights are of.",
            )


def _latent_shape(model: TVPConfig) -> tuple[int, int, int]:
    """(C, h, w) of a frame; `ConfigError` when the picture does not divide by all levels."""
    halvings = 2 ** (len(model.unet.block_out_channels) - 1)
    if model.image_size % (model.vae.downscale * halvings):
        raise ConfigError(
            f"model.image_size {model.image_size} does not divide by the autoencoder's {model.vae.downscale} times "
            f"the UNet's {halvings}.",
            remedy="Choose another size or fewer levels.",
        )
    side = model.image_size // model.vae.downscale
    return model.vae.latent_channels, side, side


def _draw_clip(seed: int, visit: ClipVisit, latents: tuple[int, ...], side: int) -> tuple[torch.Tensor, ...]:
    """Text keep, sigma, latent noise (T, C, h, w), posterior noise alike, image sigma, image noise (3, S, S).

    All six are always drawn, so that none depends on which path needs the others.
    """
    key = counter_seed(seed, "draws", visit.source, visit.epoch, visit.clip)
    generator = torch.Generator().manual_seed(key)
    keep, sigma = torch.rand((), generator=generator), torch.randn((), generator=generator)
    noise, posterior = (torch.randn(latents, generator=generator) for _ in range(2))
    image_sigma = torch.randn((), generator=generator)
    return keep, sigma, noise, posterior, image_sigma, torch.randn(3, side, side, generator=generator)


def _recorded(url: str, metric: str) -> list[float]:
    """The values of a metric in the run's own record, in order."""
    lines = (json.loads(line) for line in read_bytes(url).decode().splitlines())
    return [float(line[metric]) for line in lines if metric in line]
