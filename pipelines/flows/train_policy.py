"""`train-policy`: episodes and a frozen model to a policy, its control without pictures, closed-loop rollouts."""

from __future__ import annotations

from typing import Any, NamedTuple

from prefect import flow

from infra.registry import POLICY
from infra.storage import absolute
from pipelines.clock import Clock
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.evaluate import evaluate
from pipelines.flows.finetune_tvp import HELD_OUT, finetune_tvp
from pipelines.flows.ingest_corpus import ingest_corpus
from pipelines.flows.pretrain_rsp import register
from pipelines.policy_methods import (
    RANDOM_VIDEO,
    Method,
    check_preset,
    needs_video,
    parse_given,
    random_video,
    registered_encoder,
    registered_video,
    resolve_cached,
    resolve_cloning,
    resolve_other,
    resolve_vpp,
    train,
    video_provider,
    without_place,
)
from pipelines.policy_report import PolicyOutcome, write_policy_report
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, tracked
from training.providers import FeatureProviderConfig, VideoProviderConfig
from training.recipes.policy import ProviderConfig
from training.session import RunConfig

FEW_CLIPS = ["num_clips=16"]  # enough to see a video model that learnt nothing; its own flow rates it on more


@flow(name="train-policy", flow_run_name="train-policy-{method}-{preset}", **STOPS_ITS_JOBS)
def train_policy(
    *,
    method: Method = "bc",
    preset: str = "tiny",
    encoder: str = "",
    video: str = "",
    provider: dict[str, Any] | None = None,
    data: str = "",
    from_pixels: bool = False,
    closed_loop: bool = True,
    overrides: list[str] | None = None,
    features: list[str] | None = None,
    finetuning: list[str] | None = None,
    simulate: list[str] | None = None,
    evaluation: list[str] | None = None,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Train a policy, roll it out beside its control arms, register it as candidate; returns the url of its export.

    `method`: "bc" clones behaviour on a frozen `encoder` (default: the registry's); "vpp" is the Video Prediction
    Policy on a `video` model (default: the registry's, else one is fine-tuned on the episodes first) or on any other
    `provider` of features; "diffusion" learns from pixels; "unipi" and "susie" plan with the video model.
    `data` is a data set of episodes (default: the simulated one). `from_pixels` computes features for every batch
    instead of once; without `closed_loop` (a real robot's episodes) nothing is rolled out and nothing registered.
    The lists override stages: training config, feature cache, fine-tuning, simulation, rollouts.
    """
    check_preset(method, preset)
    with tracked("train-policy", backend=backend, parent=parent_run) as run:
        child: dict[str, Any] = {"backend": backend, "parent_run": run.run.run_id}
        clock = Clock()
        with clock.stage("episodes"):
            if not data:
                held_out = [HELD_OUT] if needs_video(method) else None
                data = ingest_corpus(layout="video", overrides=held_out, simulate=simulate, **child)
            data = absolute(data)
        if needs_video(method) and provider is None:
            with clock.stage("video model"):
                video = absolute(video) if video else registered_video(run)
                video = video or finetune_tvp(data=[data], overrides=finetuning, evaluation=FEW_CLIPS, **child)
        with clock.stage("policy and its controls"):
            if method == "vpp":
                see = parse_given(provider) or video_provider(preset, video)
                learnt = train_vpp(
                    run, preset, provider=see, data=data, overrides=overrides, features=features,
                    from_pixels=from_pixels, compared=closed_loop,
                )  # fmt: skip
            else:
                learnt = train_other(run, method, preset, encoder=encoder, video=video, data=data, overrides=overrides)
        if closed_loop:
            register(run, POLICY, learnt.export, learnt.train_run)
            rated = {"model": learnt.export, "control": learnt.control, "others": learnt.others, "data": data}
            with clock.stage("rollouts"):
                result = evaluate(suite="rollouts", overrides=evaluation, **rated, **child)
            found = {"trained": learnt.trained, "result": result, "data": data, "seconds": clock.seconds}
            page = write_policy_report(PolicyOutcome(method=method, export=learnt.export, **found))
            run.link("train-policy-report", page if "://" in page else "", "Report")
        return learnt.export


def planned(
    method: Method,
    preset: str,
    *,
    encoder: str,
    video: str,
    provider: dict[str, Any] | None,
    data: str,
    overrides: list[str] | None,
) -> RunConfig:
    """The training config that a run would have, for `--dry-run`; without a frozen model it is that of the control."""
    check_preset(method, preset)
    if method == "vpp":
        see = parse_given(provider) or (video_provider(preset, absolute(video)) if video else None)
        return resolve_vpp(preset, see, data, overrides)
    if method == "bc":
        given = ProviderConfig(kind="export", url=encoder) if encoder else ProviderConfig(kind="none")
        return resolve_cloning(preset, given, data, overrides)
    return resolve_other(method, preset, video=video, data=data, overrides=overrides)


class Learnt(NamedTuple):
    """What a method leaves: the policy and its tracker run, its control without pictures, policies to report beside."""

    export: str
    train_run: str
    control: str
    others: dict[str, str]

    @property
    def trained(self) -> dict[str, str]:
        """Exports by what a report calls them."""
        return {"policy": self.export, "proprioception": self.control, **self.others}


def train_vpp(
    run: FlowRun,
    preset: str,
    *,
    provider: FeatureProviderConfig,
    data: str,
    overrides: list[str] | None,
    features: list[str] | None,
    from_pixels: bool,
    compared: bool,
) -> Learnt:
    """The policy, its control of equal steps, and, where `compared`, the same policy on an untrained video model."""

    def trained(name: str, see: FeatureProviderConfig, wanted: list[str] | None) -> tuple[str, str]:
        if from_pixels:
            config = resolve_vpp(preset, see, data, wanted)
        else:
            config = resolve_cached(run, preset, see, data, overrides=wanted, features=features)
        return train(run, name, config, data)

    export, train_run = trained("vpp", provider, overrides)
    others = {}
    if compared and isinstance(provider, VideoProviderConfig) and provider.random_seed is None:
        others[RANDOM_VIDEO], _ = trained(RANDOM_VIDEO, random_video(provider), without_place(overrides))
    # The control feels the robot's state even where the policy does not: what a policy without eyes can do at all.
    sightless = [text for text in without_place(overrides) if not text.startswith("provider.")]
    sightless.append("data.proprioception=true")
    control, _ = train(run, "proprioception", resolve_vpp(preset, None, data, sightless), data)
    return Learnt(export, train_run, control, others)


def train_other(
    run: FlowRun,
    method: str,
    preset: str,
    *,
    encoder: str,
    video: str,
    data: str,
    overrides: list[str] | None,
) -> Learnt:
    """Behaviour cloning or a policy beside the Video Prediction Policy, and cloning without pictures as control."""
    blind = ProviderConfig(kind="none")
    if method == "bc":
        see = ProviderConfig(kind="export", url=absolute(encoder) if encoder else registered_encoder(run))
        export, train_run = train(run, "policy", resolve_cloning(preset, see, data, overrides), data)
        # The candidate's recipe with nothing to see, whatever the candidate's overrides were.
        control, _ = train(run, "proprioception", resolve_cloning(preset, blind, data, None), data)
    else:
        config = resolve_other(method, preset, video=video, data=data, overrides=overrides)
        export, train_run = train(run, method, config, data)
        control, _ = train(run, "proprioception", resolve_cloning("tiny", blind, data, None), data)
    return Learnt(export, train_run, control, {})
