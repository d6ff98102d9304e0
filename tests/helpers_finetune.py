"""Fine-tuning runs small enough to be repeated many times: 4 frames of 16 pixels, 8 x 8 latents, two UNet levels."""

from __future__ import annotations

from pathlib import Path

from infra.config import override
from ingest.windows import ClipSource, WindowRule
from tests.helpers_cache import config_of, make_two_cameras, make_vae
from training import cache_build
from training.recipes import tvp, vae
from training.recipes.sources import with_latents
from training.recipes.tvp import FinetuneConfig
from training.recipes.vae import FitVAEConfig

RULE = WindowRule(num_frames=4, stride=1, short="repeat")
SMALL = (
    "data.image_size=16",
    "model.image_size=16",
    "model.num_frames=4",
    "model.unet.block_out_channels=[32, 32]",
    "model.unet.num_attention_heads=[2, 2]",
    "model.unet.addition_time_embed_dim=8",
    "model.text.max_tokens=8",
    "global_batch_size=4",
    "schedule.steps=6",
    "checkpoint.every_steps=2",
    "previews.every_steps=3",
    "previews.num_clips=1",
    "previews.num_steps=2",
    "previews.validation_clips=2",
    "previews.validation_draws=2",
    "log_every_steps=1",
    "compute.matmul=default",
)
SMALL_VAE = (
    "data.image_size=16",
    "vae.block_out_channels=[32, 32]",
    "vae.sample_size=16",
    "report_frames=12",
    "global_batch_size=4",
    "schedule.steps=6",
    "schedule.warmup_steps=1",
    "checkpoint.every_steps=2",
    "log_every_steps=1",
    "compute.matmul=default",
)


def make_parts(folder: Path) -> dict[str, str]:
    """A data set (the first of five episodes held out), a random autoencoder's export, and a cache by both."""
    data, autoencoder = make_two_cameras(folder / "data"), make_vae(folder / "vae")
    cache_build.run(config_of(data, autoencoder, folder / "cache"))
    return {"data": data, "vae": autoencoder, "cache": str(folder / "cache")}


def source_of_clips(parts: dict[str, str], **changes: object) -> ClipSource:
    return ClipSource(**({"name": "squares", "url": parts["data"], "rule": RULE} | changes))


def small_finetune(
    parts: dict[str, str],
    output: object,
    *assignments: str,
    cached: bool = False,
    sources: tuple[ClipSource, ...] = (),
) -> FinetuneConfig:
    """The tiny recipe, smaller still: 6 steps of 4 clips, saved every 2, looked at every 3, in this process."""
    sources = sources or (source_of_clips(parts),)
    if cached:
        sources = with_latents(sources, {parts["data"]: parts["cache"]})
    placeholder = (source_of_clips(parts, rule=WindowRule(num_frames=8)),)
    config = tvp.tiny(vae=parts["vae"], data=placeholder, output=str(output))
    value = config.to_json()
    value["data"]["sources"] = [source.to_json() for source in sources]
    value["model"]["num_frames"] = sources[0].rule.num_frames
    return override(FinetuneConfig.parse(value), (*SMALL, *assignments))


def small_fit(parts: dict[str, str], output: object, *assignments: str) -> FitVAEConfig:
    return override(vae.tiny(data=(source_of_clips(parts),), output=str(output)), (*SMALL_VAE, *assignments))
