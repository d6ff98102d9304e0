"""`foreframe train-policy`, `evaluate` and `serve`: what a policy is learnt from, rated by, and asked through."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.errors import ConfigError
from pipelines.cli_calls import Backend, DryRun, Overrides, assignment, call_flow, registered_url, show_plan

Others = Annotated[
    list[str] | None, typer.Option("--other", metavar="NAME=MODEL", help="A policy to report beside it; repeat.")
]


def train_policy(
    *,
    method: Annotated[str, typer.Option(help="bc, vpp, diffusion, unipi or susie.")] = "bc",
    preset: Annotated[str, typer.Option(help="tiny; bc also cortexbench; vpp also metaworld, calvin, xhand.")] = "tiny",
    encoder: Annotated[str, typer.Option(help="bc: export of an encoder; default: the registry's.")] = "",
    video: Annotated[str, typer.Option(help="Export of a video model; default: the registry's, else trained.")] = "",
    provider: Annotated[
        list[str] | None,
        typer.Option("--provider", metavar="KEY=VALUE", help="vpp: other features, e.g. kind=encoder url=EXPORT."),
    ] = None,
    data: Annotated[str, typer.Option(help="Data set of episodes; default: the simulated one.")] = "",
    from_pixels: Annotated[bool, typer.Option(help="vpp: compute features for every batch, cache nothing.")] = False,
    closed_loop: Annotated[bool, typer.Option(help="Roll out and register; off for a real robot's episodes.")] = True,
    override: Overrides = None,
    feature_override: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Dotted key of the feature cache; repeat.")
    ] = None,
    finetune_override: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Dotted key of the fine-tuning; repeat.")
    ] = None,
    simulate_override: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Dotted key of the simulation; repeat.")
    ] = None,
    evaluation_override: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Dotted key of the rollouts; repeat.")
    ] = None,
    backend: Backend = "",
    dry_run: DryRun = False,
) -> None:
    """Train a policy on a frozen model's features, roll it out beside its control arms and register it."""
    see = dict(assignment(text) for text in provider or []) or None
    if dry_run:
        _plan(method, preset, encoder=encoder, video=video, provider=see, data=data, overrides=override)
        return
    parameters = {
        "method": method,
        "preset": preset,
        "encoder": encoder,
        "video": video,
        "provider": see,
        "data": data,
        "from_pixels": from_pixels,
        "closed_loop": closed_loop,
        "overrides": override,
        "features": feature_override,
        "finetuning": finetune_override,
        "simulate": simulate_override,
        "evaluation": evaluation_override,
    }
    typer.echo(call_flow("train-policy", parameters, backend=backend))


def evaluate(
    *,
    suite: Annotated[str, typer.Argument(help="label-propagation, video-prediction, rollouts or calvin.")],
    model: Annotated[
        str,
        typer.Option("--model", "--policy", help="Export, or ws://HOST:PORT of a policy; default: the candidate."),
    ] = "",
    control: Annotated[str, typer.Option(help="For rollouts: a policy trained without pictures.")] = "",
    other: Others = None,
    data: Annotated[str, typer.Option(help="Episodes, a folder in DAVIS layout, clips, or a CALVIN checkout.")] = "",
    override: Overrides = None,
    backend: Backend = "",
) -> None:
    """Rate a model beside its control arms."""
    parameters = {
        "suite": suite,
        "model": model,
        "control": control,
        "others": dict(assignment(text) for text in other or []) or None,
        "data": data,
        "overrides": override,
    }
    typer.echo(call_flow("evaluate", parameters, backend=backend))


def serve(
    model: Annotated[str, typer.Argument(help="Export of a policy, or foreframe-policy@champion.")],
    host: Annotated[str, typer.Option(help="Other than loopback only with FOREFRAME_SERVE_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8765,
    override: Overrides = None,
) -> None:
    """Answer observations with action chunks over a websocket, in openpi's message convention."""
    from evaluation.serve import ServeConfig, serve_forever
    from infra.config import override as apply

    url = registered_url(model) if "@" in model else model
    serve_forever(apply(ServeConfig(model=url, host=host, port=port), override or []))


def convert_policy(
    source: Annotated[str, typer.Argument(help="A released dp-calvin file, or our export of a policy.")],
    output: Annotated[str, typer.Argument(help="New export; for an export: a .safetensors file.")],
    video: Annotated[str, typer.Option(help="Video model of the release: diffusers folder or export.")] = "",
    clip: Annotated[str, typer.Option(help="Folder of CLIP ViT-B/32.")] = "",
) -> None:
    """Read a released Video Prediction Policy into an export, or write an export under the release's names."""
    from pathlib import Path

    from infra.storage import absolute
    from pipelines.policy_methods import video_provider
    from training.release_policy import export_release, import_release

    if not Path(source).is_file():
        export_release(source, output)
    else:
        if not (video and clip):
            raise ConfigError("a released policy does not hold its frozen models.", remedy="Give --video and --clip.")
        import_release(Path(source), output, provider=video_provider("calvin", absolute(video)), clip=clip)
    typer.echo(output)


def _plan(
    method: str, preset: str, *, encoder: str, video: str, provider: object, data: str, overrides: list[str] | None
) -> None:
    from pipelines.cli_calls import flow_module

    flow = flow_module("train-policy")
    config = flow.planned(
        method, preset, encoder=encoder, video=video, provider=provider, data=data, overrides=overrides
    )
    show_plan(config, has_data=bool(data))
