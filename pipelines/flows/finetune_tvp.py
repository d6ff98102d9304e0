"""`finetune-tvp`: episodes -> small autoencoder -> cached latents -> video model -> previews, evaluation, candidate.

Weights given with `initial` bring their own autoencoder; without them a small one is fitted on the corpus first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from prefect import flow

from infra.config import override
from infra.digests import short
from infra.registry import VIDEO
from infra.storage import absolute, join
from ingest.reader import load_manifest
from ingest.windows import ClipSource, WindowRule
from pipelines.clock import Clock
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.evaluate import evaluate
from pipelines.flows.ingest_corpus import SIMULATED, ingest_corpus
from pipelines.flows.pretrain_rsp import register
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, resolve, tracked
from pipelines.video_data import ANNOTATED, check_request, training_sources
from pipelines.video_report import FinetuneOutcome, record_given_weights, write_video_report
from training.cache import CacheConfig
from training.launch import EXPORT
from training.recipes import tvp, vae
from training.recipes.sources import with_latents
from training.recipes.tvp import FinetuneConfig
from training.recipes.vae import FitVAEConfig

Preset = Literal["tiny", "svd"]
UNPLACED = "unplaced"
HELD_OUT = "recipe.validation_share=0.2"  # what losses, previews and the gate are measured on


@flow(name="finetune-tvp", flow_run_name="finetune-tvp-{preset}", **STOPS_ITS_JOBS)
def finetune_tvp(
    *,
    preset: Preset = "tiny",
    data: list[str] | None = None,
    corpus: str = "",
    initial: str = "",
    mixture: str = "",
    from_pixels: bool = False,
    overrides: list[str] | None = None,
    clips: list[str] | None = None,
    vae_overrides: list[str] | None = None,
    cache_overrides: list[str] | None = None,
    ingest: list[str] | None = None,
    simulate: list[str] | None = None,
    evaluation: list[str] | None = None,
    candidate: bool = True,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Fine-tune a text-guided video model, evaluate it, register it as candidate; returns the url of its export.

    `data` are data sets of layout `video`; else `corpus` is a folder in the annotated layout, ingested first; else
    demonstrations of the simulator are made (`simulate` overrides which). `mixture` names published shares.
    `initial` is a diffusers folder or an export; `from_pixels` encodes at every step instead of once. Without
    `candidate` the model is a means to something else and is not registered. Each list
    overrides one stage: training config, frame rule of clips, autoencoder, cache, ingest, evaluation.
    """
    with tracked("finetune-tvp", backend=backend, parent=parent_run) as run:
        clock = Clock()
        check_request(preset, data or [], corpus=corpus, initial=initial)
        with clock.stage("episodes"):
            urls = data_sets(run, data or [], corpus=corpus, ingest=ingest, simulate=simulate)
        sources = training_sources(urls, rule=frame_rule(preset, clips), mixture=mixture)
        start = absolute(initial) if initial else ""
        if not start:
            with clock.stage("autoencoder"):
                start = fit_vae(run, sources, vae_overrides)
        wanted: dict[str, Any] = {"start": start, "is_vae": not initial, "overrides": overrides}
        config = configure(preset, sources, **wanted)
        if not from_pixels:
            with clock.stage("latent caches"):
                caches = {url: cache_latents(run, url, config, start, cache_overrides) for url in urls}
            config = configure(preset, with_latents(sources, caches), **wanted)
        with clock.stage("video model"):
            export = fine_tune(run, config, candidate=candidate)
        with clock.stage("evaluation"):
            child: dict[str, Any] = {"backend": backend, "parent_run": run.run.run_id}
            result = evaluate(suite="video-prediction", model=export, overrides=evaluation, **child)
        outcome = FinetuneOutcome(
            export=export,
            autoencoder="" if initial else start,
            result=result,
            data=tuple(urls),
            seconds=clock.seconds,
        )
        page = write_video_report(outcome)
        run.link("finetune-tvp-report", page if "://" in page else "", "Report")
        return export


def fine_tune(run: FlowRun, config: FinetuneConfig, *, candidate: bool = True) -> str:
    """Train and, unless it is only a means, register as candidate; returns the url of the export."""
    train_run = run.step("training.main", config, name="finetune-tvp", dataset=described(config.data.sources[0].url))
    export = join(config.output, EXPORT)
    record_given_weights(config)
    if candidate:
        register(run, VIDEO, export, train_run)
    return export


def data_sets(
    run: FlowRun, data: Sequence[str], *, corpus: str, ingest: list[str] | None, simulate: list[str] | None
) -> list[str]:
    """The data sets given, else one made from the corpus folder or from simulated demonstrations."""
    if data:
        return [absolute(url) for url in dict.fromkeys(data)]
    made = ingest_corpus(
        corpus=ANNOTATED if corpus else SIMULATED,
        source=corpus,
        layout="video",
        overrides=[HELD_OUT, *(ingest or [])],
        simulate=simulate,
        backend=run.backend,
        parent_run=run.run.run_id,
    )
    return [made]


def frame_rule(preset: str, overrides: list[str] | None) -> WindowRule:
    """How the preset cuts clips out of episodes, with its overrides."""
    return override(base(preset, UNPLACED).data.sources[0].rule, overrides or [])


def base(preset: str, data: str | Sequence[str | ClipSource]) -> FinetuneConfig:
    """The preset as it is, starting from nothing yet."""
    if preset == "svd":
        return tvp.svd(initial="", data=data, output=UNPLACED)
    return tvp.tiny(vae="", data=data, output=UNPLACED)


def configure(
    preset: str, sources: Sequence[ClipSource], *, start: str, is_vae: bool, overrides: list[str] | None
) -> FinetuneConfig:
    """A preset on these clips, from these weights, with its overrides, placed below the home folder."""
    wanted = base(preset, UNPLACED).to_json()
    wanted["data"]["sources"] = [source.to_json() for source in sources]
    wanted["model"]["num_frames"] = sources[0].rule.num_frames
    wanted["vae" if is_vae else "initial"] = start
    return resolve(FinetuneConfig.parse(wanted), overrides, folder="runs", name=f"tvp-{preset}")


def configure_vae(sources: Sequence[ClipSource], overrides: list[str] | None) -> FitVAEConfig:
    """The small autoencoder's run on the same episodes."""
    return resolve(vae.tiny(data=list(sources), output=UNPLACED), overrides, folder="runs", name="vae-tiny")


def fit_vae(run: FlowRun, sources: Sequence[ClipSource], overrides: list[str] | None) -> str:
    """Fit the small autoencoder; returns the url of its export."""
    config = configure_vae(sources, overrides)
    run.step("training.main", config, name="fit-vae", dataset=described(sources[0].url))
    return join(config.output, EXPORT)


def cache_latents(run: FlowRun, url: str, config: FinetuneConfig, start: str, overrides: list[str] | None) -> str:
    """Encode one data set with the autoencoder the run starts from; returns the cache's url."""
    wanted = CacheConfig(
        data=url,
        vae=start,
        text=config.model.text,
        image_size=config.model.image_size,
        use_gpu=config.compute.use_gpu,
        output=UNPLACED,
    )
    cache = resolve(wanted, overrides, folder="caches", name=load_manifest(url)[0].name)
    run.step("training.main", cache, name=f"cache-latents-{short(load_manifest(url)[1])}", dataset=described(url))
    return cache.output


def described(url: str) -> tuple[str, str, str]:
    """(name, url, manifest digest) of a data set."""
    manifest, version = load_manifest(url)
    return manifest.name, url, version


def describe(
    *,
    preset: str = "tiny",
    data: Sequence[str] | None = None,
    initial: str = "",
    mixture: str = "",
    overrides: list[str] | None = None,
    clips: list[str] | None = None,
    vae_overrides: list[str] | None = None,
    gpu: str = "",
    num_gpus: int = 0,
) -> dict[str, Any]:
    """What a run would do, without doing it: each stage's resolved config, and its plan where the data is there.

    The training is planned from pixels, for caches and a fitted autoencoder do not exist yet: a run from a cache is
    spared the encoding, about a fifth of the arithmetic. With `num_gpus` the plan estimates memory and hours on these.
    """
    from training.cost import GpuPlan
    from training.plan import dry_run

    check_request(preset, data or [], initial=initial, is_plan=True)
    rule = frame_rule(preset, clips)
    sources = training_sources(data, rule=rule, mixture=mixture) if data else base(preset, UNPLACED).data.sources
    start = absolute(initial) if initial else ""
    config = configure(preset, sources, start=start, is_vae=False, overrides=overrides)
    has_own_vae = bool(initial) or preset == "svd"
    stages: dict[str, Any] = {} if has_own_vae else {"fit-vae": configure_vae(sources, vae_overrides)}
    stages["finetune-tvp"] = config
    named = {"gpu": gpu} if gpu else {}
    machines = GpuPlan.parse({**named, "num_gpus": num_gpus}) if num_gpus else None
    plans = {
        name: {"plan": dry_run(stage, machines if stage is config else None)} if data else {}
        for name, stage in stages.items()
    }
    return {name: plans[name] | {"config": stage.to_json()} for name, stage in stages.items()}
