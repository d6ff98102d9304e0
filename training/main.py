"""`python -m training.main CONFIG.json`: run one training job, or fill one cache, described by a JSON file.

The field `kind` chooses the recipe. Running it again continues an unfinished run and leaves a finished one alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from infra.config import Config
from infra.errors import ConfigError
from infra.ray_runtime import prepare_environment
from infra.step import step_main

# No training: nothing to resume but receipts. kind -> the module that builds the cache.
CACHES = {"cache-latents": "training.cache_build", "cache-features": "training.feature_cache_build"}
# kind -> where its config is. Imported when it is asked for: a policy needs no video model's libraries.
KINDS = {
    "pretrain-rsp": ("training.recipes.rsp", "PretrainConfig"),
    "train-policy": ("training.recipes.policy", "PolicyConfig"),
    "fit-vae": ("training.recipes.vae", "FitVAEConfig"),
    "cache-latents": ("training.cache", "CacheConfig"),
    "finetune-tvp": ("training.recipes.tvp", "FinetuneConfig"),
    "cache-features": ("training.feature_cache", "FeatureCacheConfig"),
    "train-vpp": ("training.recipes.vpp", "VPPRunConfig"),
    "train-diffusion-policy": ("training.recipes.diffusion_policy", "DiffusionPolicyRunConfig"),
    "train-unipi": ("training.recipes.unipi", "UniPiRunConfig"),
    "train-susie": ("training.recipes.susie", "SusieRunConfig"),
    "pretrain-mae": ("training.recipes.mae", "MAERunConfig"),
}


def parse_config(value: dict[str, Any]) -> Any:
    """The config object of a plain JSON value; `ConfigError` for an unknown kind or key."""
    kind = str(value.get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}.", remedy=f"Use one of {', '.join(sorted(KINDS))}.")
    module, name = KINDS[kind]
    config: type[Config] = vars(import_module(module))[name]
    return config.parse(value)


def run(config: Any) -> dict[str, Any]:
    """Train and export, or fill a cache; returns the summary, for training also in `summary.json`."""
    prepare_environment()
    if config.kind in CACHES:
        return import_module(CACHES[config.kind]).run(config)
    from training.launch import launch

    return launch(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 on success, 2 with one line on stderr for an error that the user can mend."""
    return step_main(argv, stage="training", parse=parse_config, run=run, plan=_plan)


def _plan(config: Any) -> dict[str, Any]:
    if config.kind in CACHES:
        return import_module(CACHES[config.kind]).plan(config)
    from training.plan import dry_run

    return dry_run(config)


if __name__ == "__main__":
    sys.exit(main())
