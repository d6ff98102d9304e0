"""`train-policy`: behaviour cloning on a frozen encoder, its control without pictures, closed-loop rollouts."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from infra.errors import ConfigError, InputError
from infra.registry import CANDIDATE, CHAMPION, ENCODER, POLICY, Registry
from infra.storage import absolute, join
from ingest.reader import load_manifest
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.evaluate import evaluate
from pipelines.flows.ingest_corpus import ingest_corpus
from pipelines.flows.pretrain_rsp import register
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, resolve, tracked
from training.launch import EXPORT
from training.recipes import policy
from training.recipes.policy import PolicyConfig, ProviderConfig

Preset = Literal["tiny", "cortexbench"]
PRESETS = {"tiny": policy.tiny, "cortexbench": policy.cortexbench}


@flow(name="train-policy", flow_run_name="train-policy-{preset}", **STOPS_ITS_JOBS)
def train_policy(
    *,
    preset: Preset = "tiny",
    encoder: str = "",
    data: str = "",
    overrides: list[str] | None = None,
    simulate: list[str] | None = None,
    evaluation: list[str] | None = None,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Train a policy, roll it out beside its control arms, register it as candidate; returns the url of its export.

    `encoder` is an export (default: the registry's champion, else its candidate), `data` a data set of episodes
    (default: the simulated one). `overrides` are dotted keys of the training config, `evaluation` of the rollouts.
    """
    with tracked("train-policy", backend=backend, parent=parent_run) as run:
        encoder = absolute(encoder) if encoder else registered_encoder(run)
        run_id = run.run.run_id
        if not data:
            data = ingest_corpus(layout="video", simulate=simulate, backend=backend, parent_run=run_id)
        data = absolute(data)
        see = ProviderConfig(kind="export", url=encoder)
        export, train_run = train(run, "policy", resolve_policy(preset, see, data, overrides))
        blind = ProviderConfig(kind="none")
        # The control has the candidate's recipe with nothing to see, whatever the candidate's overrides were.
        control, _ = train(run, "proprioception", resolve_policy(preset, blind, data, None))
        register(run, POLICY, export, train_run)
        evaluate(
            suite="rollouts",
            model=export,
            control=control,
            data=data,
            overrides=evaluation,
            backend=backend,
            parent_run=run_id,
        )
        return export


def train(run: FlowRun, name: str, config: PolicyConfig) -> tuple[str, str]:
    """Train one policy; returns (url of its export, tracker run)."""
    manifest, version = load_manifest(config.data.url)
    step = f"train-{name}"
    train_run = run.step("training.main", config, name=step, dataset=(manifest.name, config.data.url, version))
    return join(config.output, EXPORT), train_run


def resolve_policy(preset: str, provider: ProviderConfig, data: str, overrides: list[str] | None) -> PolicyConfig:
    """A preset with its overrides, placed below the home folder."""
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}.", remedy=f"Known: {', '.join(PRESETS)}.")
    config = PRESETS[preset](provider=provider, data=data, output="unplaced")
    return resolve(config, overrides, folder="runs", name=f"policy-{preset}")


def registered_encoder(run: FlowRun) -> str:
    """The encoder in office, else the candidate."""
    registry = Registry(run.tracker)
    for alias in (CHAMPION, CANDIDATE):
        if found := registry.alias(ENCODER, alias):
            return found.url
    raise InputError(f"the registry holds no {ENCODER}.", remedy="Run pretrain-rsp first, or name an encoder's export.")
