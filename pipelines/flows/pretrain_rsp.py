"""`pretrain-rsp`: shards -> RSP on Ray Train -> export -> label propagation -> candidate in the registry."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from infra.errors import ConfigError
from infra.registry import ENCODER, Registry
from infra.storage import absolute, join
from ingest.reader import load_manifest
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.evaluate import evaluate
from pipelines.flows.ingest_corpus import ingest_corpus
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, logger, resolve, tracked
from training.export import read_record
from training.launch import EXPORT
from training.recipes import rsp
from training.recipes.rsp import PretrainConfig

Preset = Literal["tiny", "vits16", "vitb16"]
PRESETS = {"tiny": rsp.tiny, "vits16": rsp.vits16, "vitb16": rsp.vitb16}


@flow(name="pretrain-rsp", flow_run_name="pretrain-rsp-{preset}", **STOPS_ITS_JOBS)
def pretrain_rsp(
    *,
    preset: Preset = "tiny",
    data: str = "",
    overrides: list[str] | None = None,
    simulate: list[str] | None = None,
    evaluation: list[str] | None = None,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Pre-train an encoder, evaluate it, register it as candidate; returns the url of its export.

    `data` is a data set of layout `frames`; without one the simulated corpus is built (`simulate` overrides it).
    `overrides` are dotted keys of the training config, `evaluation` of the label propagation suite.
    """
    with tracked("pretrain-rsp", backend=backend, parent=parent_run) as run:
        url = absolute(data) if data else ingest_corpus(simulate=simulate, backend=backend, parent_run=run.run.run_id)
        config = resolve_pretraining(preset, url, overrides)
        manifest, version = load_manifest(url)
        train_run = run.step("training.main", config, name="pretrain-rsp", dataset=(manifest.name, url, version))
        export = join(config.output, EXPORT)
        register(run, ENCODER, export, train_run)
        evaluate(
            suite="label-propagation",
            model=export,
            overrides=evaluation,
            backend=backend,
            parent_run=run.run.run_id,
        )
        return export


def resolve_pretraining(preset: str, data: str, overrides: list[str] | None) -> PretrainConfig:
    """A preset with its overrides, placed below the home folder."""
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}.", remedy=f"Known: {', '.join(PRESETS)}.")
    config = PRESETS[preset](data=data, output="unplaced")
    return resolve(config, overrides, folder="runs", name=f"rsp-{preset}")


def register(run: FlowRun, name: str, export: str, train_run: str) -> int:
    """Register an export as candidate; returns its version."""
    version = Registry(run.tracker).register(name, export, digest=str(read_record(export)["digest"]), run_id=train_run)
    logger().info("%s version %d is candidate: %s", name, version.version, export)
    return version.version
