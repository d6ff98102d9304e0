"""The ways to learn a policy: which recipe, what it sees, what stands beside it. `train-policy` puts them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from infra.errors import ConfigError, InputError
from infra.registry import CANDIDATE, CHAMPION, ENCODER, VIDEO, Registry
from infra.storage import absolute, join
from ingest.reader import load_manifest
from pipelines.tasks import FlowRun, resolve
from training.feature_cache import FeatureCacheConfig
from training.launch import EXPORT
from training.providers import FeatureProviderConfig, VideoProviderConfig, parse_provider
from training.recipes import diffusion_policy, policy, susie, unipi, vpp
from training.recipes.policy import ProviderConfig
from training.session import RunConfig

Method = Literal["bc", "vpp", "diffusion", "unipi", "susie"]
UNPLACED = "unplaced"
VPP_PRESETS: dict[str, Callable[..., vpp.VPPRunConfig]] = {
    "tiny": vpp.tiny, "metaworld": vpp.metaworld, "calvin": vpp.calvin, "xhand": vpp.xhand,
}  # fmt: skip
CLONING_PRESETS = {"tiny": policy.tiny, "cortexbench": policy.cortexbench}
DIFFUSION_PRESETS = {"tiny": diffusion_policy.tiny, "paper": diffusion_policy.paper}
UNIPI_PRESETS, SUSIE_PRESETS = {"tiny": unipi.tiny}, {"tiny": susie.tiny}
RANDOM_VIDEO = "random-video-model"


def needs_video(method: str) -> bool:
    """Whether a method stands on a video model."""
    return method in ("vpp", "unipi", "susie")


def video_provider(preset: str, url: str, overrides: dict[str, Any] | None = None) -> VideoProviderConfig:
    """The features that a preset of the Video Prediction Policy takes from a video model."""
    return VideoProviderConfig.parse({"kind": "tvp", "url": url, **vpp.FEATURES[preset], **(overrides or {})})


def random_video(provider: VideoProviderConfig) -> VideoProviderConfig:
    """The same features from freshly drawn weights: what training the video model was worth."""
    return provider.model_copy(update={"random_seed": 0})


def resolve_vpp(
    preset: str, provider: FeatureProviderConfig | None, data: str, overrides: list[str] | None, *, features: str = ""
) -> vpp.VPPRunConfig:
    """A preset of the Video Prediction Policy with its overrides, placed below the home folder.

    `features` is a cache to train from; runs of different caches have different places.
    """
    config = _preset(VPP_PRESETS, preset)(provider=provider, data=data, output=UNPLACED)
    config = config.model_copy(update={"data": config.data.model_copy(update={"features": features})})
    return resolve(config, overrides, folder="runs", name=f"vpp-{preset}")


def without_place(overrides: list[str] | None) -> list[str]:
    """The overrides of a run for another one beside it, which needs a folder of its own."""
    return [text for text in overrides or [] if not text.startswith("output=")]


def resolve_cloning(preset: str, provider: ProviderConfig, data: str, overrides: list[str] | None) -> Any:
    """A preset of behaviour cloning with its overrides, placed below the home folder."""
    config = _preset(CLONING_PRESETS, preset)(provider=provider, data=data, output=UNPLACED)
    return resolve(config, overrides, folder="runs", name=f"policy-{preset}")


def resolve_other(method: str, preset: str, *, video: str, data: str, overrides: list[str] | None) -> RunConfig:
    """Diffusion Policy, Uni-Pi or Susie style, with its overrides, placed below the home folder."""
    if method == "diffusion":
        config: RunConfig = _preset(DIFFUSION_PRESETS, preset)(data=data, output=UNPLACED)
    else:
        presets = UNIPI_PRESETS if method == "unipi" else SUSIE_PRESETS
        config = _preset(presets, preset)(video=video, data=data, output=UNPLACED)
    return resolve(config, overrides, folder="runs", name=f"{method}-{preset}")


def cache_features(run: FlowRun, config: vpp.VPPRunConfig, overrides: list[str] | None) -> str:
    """Compute the features of every decision of a run once; returns the cache's url."""
    assert config.provider is not None
    wanted = FeatureCacheConfig(
        data=config.data.url,
        provider=config.provider,
        split=config.data.split,
        every=config.data.every,
        output=UNPLACED,
    )
    cache = resolve(wanted, overrides, folder="caches", name="features")
    manifest, version = load_manifest(config.data.url)
    run.step(
        "training.main", cache, name=f"cache-features-{cache.output[-6:]}", dataset=(manifest.name, cache.data, version)
    )
    return str(cache.output)


def resolve_cached(
    run: FlowRun,
    preset: str,
    provider: FeatureProviderConfig,
    data: str,
    *,
    overrides: list[str] | None,
    features: list[str] | None,
) -> vpp.VPPRunConfig:
    """`resolve_vpp` on a cache that is made first; `features` overrides the cache's config."""
    planned = resolve_vpp(preset, provider, data, overrides)
    return resolve_vpp(preset, provider, data, overrides, features=cache_features(run, planned, features))


def train(run: FlowRun, name: str, config: RunConfig, data: str) -> tuple[str, str]:
    """Train one policy; returns (url of its export, tracker run)."""
    manifest, version = load_manifest(data)
    train_run = run.step("training.main", config, name=f"train-{name}", dataset=(manifest.name, data, version))
    return join(config.output, EXPORT), train_run


def registered(run: FlowRun, model: str) -> str:
    """The model in office, else the candidate; empty when the registry holds none."""
    registry = Registry(run.tracker)
    for alias in (CHAMPION, CANDIDATE):
        if found := registry.alias(model, alias):
            return found.url
    return ""


def registered_encoder(run: FlowRun) -> str:
    """The encoder in office, else the candidate."""
    if found := registered(run, ENCODER):
        return found
    raise InputError(f"the registry holds no {ENCODER}.", remedy="Run pretrain-rsp first, or name an encoder's export.")


def registered_video(run: FlowRun) -> str:
    """The video model in office, else the candidate; empty when there is none yet."""
    return registered(run, VIDEO)


def check_preset(method: str, preset: str) -> None:
    """`ConfigError` before any work is done."""
    presets: dict[str, Any] = {
        "bc": CLONING_PRESETS,
        "vpp": VPP_PRESETS,
        "diffusion": DIFFUSION_PRESETS,
        "unipi": UNIPI_PRESETS,
        "susie": SUSIE_PRESETS,
    }
    if method not in presets:
        raise ConfigError(f"unknown method {method!r}.", remedy=f"Known: {', '.join(presets)}.")
    _preset(presets[method], preset)


def parse_given(provider: dict[str, Any] | None) -> FeatureProviderConfig | None:
    """A provider given as plain values, its url made absolute."""
    if provider is None:
        return None
    values = dict(provider)
    if values.get("url"):
        values["url"] = absolute(str(values["url"]))
    return parse_provider(values)


def _preset(presets: dict[str, Any], preset: str) -> Any:
    if preset not in presets:
        raise ConfigError(f"unknown preset {preset!r}.", remedy=f"Known: {', '.join(presets)}.")
    return presets[preset]
