"""`foreframe finetune`: train a text-guided video model; look at one, convert one, cache latents for one.

The verb itself trains; its sub-commands are tools around it. Heavy packages are imported inside the functions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.errors import ConfigError
from pipelines.cli_calls import Backend, DryRun, Overrides, call_flow, flow_module

finetune = typer.Typer(help="Fine-tune a text-guided video model; preview, convert and cache.", no_args_is_help=False)

DataSets = Annotated[list[str] | None, typer.Option("--data", help="Data set of layout video; repeat to mix.")]
StageOverrides = list[str] | None


def _overrides_of(stage: str, what: str) -> Any:
    return typer.Option(f"--{stage}-override", metavar="KEY=VALUE", help=f"Dotted key of {what}; repeat.")


@finetune.callback(invoke_without_command=True)
def train(
    *,
    context: typer.Context,
    preset: Annotated[str, typer.Option(help="tiny or svd.")] = "tiny",
    data: DataSets = None,
    corpus: Annotated[str, typer.Option(help="Folder in the annotated layout, ingested first.")] = "",
    initial: Annotated[str, typer.Option(help="Weights to start from: a diffusers folder or an export.")] = "",
    mixture: Annotated[str, typer.Option(help="Published shares: calvin, robot or paper-table8.")] = "",
    from_pixels: Annotated[bool, typer.Option("--from-pixels", help="Encode at every step, cache nothing.")] = False,
    override: Overrides = None,
    clips_override: Annotated[StageOverrides, _overrides_of("clips", "the frame rule of clips")] = None,
    vae_override: Annotated[StageOverrides, _overrides_of("vae", "the autoencoder's config")] = None,
    cache_override: Annotated[StageOverrides, _overrides_of("cache", "the latent caches' config")] = None,
    ingest_override: Annotated[StageOverrides, _overrides_of("ingest", "the ingest config")] = None,
    simulate_override: Annotated[StageOverrides, _overrides_of("simulate", "the simulation")] = None,
    evaluation_override: Annotated[StageOverrides, _overrides_of("evaluation", "the suite's config")] = None,
    backend: Backend = "",
    dry_run: DryRun = False,
    gpus: Annotated[int, typer.Option(help="With --dry-run: estimate memory and hours on so many.", min=0)] = 0,
    gpu: Annotated[str, typer.Option(help="With --gpus: which.")] = "A100-80GB",
) -> None:
    """Fine-tune a text-guided video model, evaluate and register it.

    Without --data and --corpus, demonstrations of the simulator are made and used.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    parameters: dict[str, Any] = {
        "preset": preset,
        "data": data,
        "initial": initial,
        "mixture": mixture,
        "overrides": override,
        "clips": clips_override,
        "vae_overrides": vae_override,
    }
    if dry_run:
        plan = flow_module("finetune-tvp").describe(**parameters, gpu=gpu, num_gpus=gpus)
        typer.echo(json.dumps(plan, indent=2))
        return
    from pipelines.video_data import check_request

    check_request(preset, data or [], corpus=corpus, initial=initial)
    parameters |= {
        "corpus": corpus,
        "from_pixels": from_pixels,
        "cache_overrides": cache_override,
        "ingest": ingest_override,
        "simulate": simulate_override,
        "evaluation": evaluation_override,
    }
    typer.echo(call_flow("finetune-tvp", parameters, backend=backend))


@finetune.command()
def preview(
    *,
    model: Annotated[str, typer.Option(help="Export of a video model, or a diffusers folder.")],
    data: Annotated[str, typer.Option(help="Data set whose clips are predicted.")],
    output: Annotated[str, typer.Option(help="Folder for the video and the contact sheet.")],
    num_clips: Annotated[int, typer.Option(help="Clips, spread over the data set.", min=1)] = 4,
    num_steps: Annotated[int, typer.Option(help="Sampling steps of the third column.", min=2)] = 30,
    guidance: Annotated[tuple[float, float], typer.Option(help="Weight at the first and at the last frame.")] = (1, 3),
    split: Annotated[str, typer.Option(help="validation, train, or all.")] = "validation",
    seed: Annotated[int, typer.Option(help="Of the starting noise.", min=0)] = 0,
    name: Annotated[str, typer.Option(help="Name of the two files.")] = "preview",
) -> None:
    """Write side-by-side videos (truth, one step, many steps) and a contact sheet."""
    from pipelines.video_data import preview_sources
    from training.export import load_video_model
    from training.previews import spread_clips, write_previews

    predictor = load_video_model(model)
    clips = spread_clips(preview_sources(data, model=model, num_frames=predictor.num_frames, split=split), num_clips)
    written = write_previews(output, predictor, clips, name=name, num_steps=num_steps, guidance=guidance, seed=seed)
    typer.echo("\n".join(written))


@finetune.command()
def convert(
    export: Annotated[str, typer.Argument(help="Export of a video model.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Write a video model in the folder layout that diffusers reads."""
    from training.export import load_video_model
    from training.models.tvp.official import save_diffusers

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty.", remedy="Name a new folder.")
    save_diffusers(folder, load_video_model(export).model)
    typer.echo(str(folder))


@finetune.command()
def cache(
    *,
    data: Annotated[str, typer.Option(help="Data set of layout video.")],
    output: Annotated[str, typer.Option(help="Folder or s3:// prefix of the cache.")],
    vae: Annotated[str, typer.Option(help="Autoencoder: its export, a video model's, a diffusers folder.")] = "",
    official: Annotated[str, typer.Option(help="Import published latents of this annotated corpus instead.")] = "",
    override: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Encode every frame of a data set once. Killed or repeated, it goes on from what is committed."""
    from infra.config import override as apply
    from training.cache import CacheConfig
    from training.cache_build import plan, run
    from training.official_latents import OfficialLatentsConfig, import_official

    values = {"data": data, "vae": vae, "output": output}
    if official:
        if dry_run:
            raise ConfigError("--dry-run plans an encoding; an import only copies.", remedy="Leave one of them out.")
        imported = apply(OfficialLatentsConfig.parse(values | {"corpus": official}), override or [])
        typer.echo(json.dumps(import_official(imported), indent=2))
        return
    if not vae:
        raise ConfigError("no autoencoder is named.", remedy="Give --vae, or --official for published latents.")
    config = apply(CacheConfig.parse(values), override or [])
    typer.echo(json.dumps(plan(config) if dry_run else run(config), indent=2))


def _refuse_options(context: typer.Context) -> None:
    """Options before a sub-command would be dropped without a word."""
    given = [
        name
        for name in context.params
        if str(getattr(context.get_parameter_source(name), "name", "DEFAULT")) == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} stands before {context.invoked_subcommand!r}.",
            remedy="Options of a sub-command stand behind it.",
        )
