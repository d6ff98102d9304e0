"""`demo`: the whole line, from no data at all to a promoted policy, a refused one, and a report."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from prefect import flow

from infra.digests import sha256_json, short
from infra.registry import ENCODER, POLICY
from infra.settings import settings
from infra.storage import join, write_json
from pipelines.clock import Clock
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.flows.ingest_corpus import ingest_corpus
from pipelines.flows.pretrain_rsp import pretrain_rsp
from pipelines.flows.promote import promote
from pipelines.flows.train_policy import train_policy
from pipelines.ray_backend import Backend, local_ray
from pipelines.reporting import DemoOutcome, write_report
from pipelines.tasks import tracked

RAY_CPUS = 4  # logical: training holds two while a data task runs
# A candidate that has seen a single batch: the gate must refuse it, and say why.
BAD_CANDIDATE = ["schedule.steps=1", "checkpoint.every_steps=1"]
BAD_NOTE = "deliberately bad: one training step"


@flow(name="demo", flow_run_name="demo", **STOPS_ITS_JOBS)
def demo(
    *,
    simulate: list[str] | None = None,
    pretraining: list[str] | None = None,
    cloning: list[str] | None = None,
    label_propagation: list[str] | None = None,
    rollouts: list[str] | None = None,
    backend: Backend | None = None,
) -> dict[str, Any]:
    """Everything on the tiny presets; each list overrides one stage. Returns the table and the report's path."""
    chosen = backend or settings().backend
    stages = {
        "simulate": simulate,
        "pretraining": pretraining,
        "cloning": cloning,
        "label_propagation": label_propagation,
        "rollouts": rollouts,
    }
    with local_ray(RAY_CPUS) if chosen == "local" else nullcontext():
        return run_line(stages, chosen)


def run_line(overrides: dict[str, list[str] | None], backend: Backend) -> dict[str, Any]:
    """The stages in order, under one tracker run; `overrides` by stage."""
    clock = Clock()
    with tracked("demo", backend=backend) as run:
        child: dict[str, Any] = {"backend": backend, "parent_run": run.run.run_id}
        with clock.stage("simulate and ingest frames"):
            frames = ingest_corpus(simulate=overrides["simulate"], **child)
        with clock.stage("ingest episodes"):
            episodes = ingest_corpus(layout="video", simulate=overrides["simulate"], **child)
        extra = ""
        if source := settings().corpus:
            with clock.stage("ingest your annotated corpus"):
                extra = ingest_corpus(corpus="annotated", source=source, layout="video", **child)
        with clock.stage("pre-train and evaluate the encoder"):
            encoder = pretrain_rsp(
                data=frames,
                overrides=overrides["pretraining"],
                evaluation=overrides["label_propagation"],
                **child,
            )
        with clock.stage("gate the encoder"):
            encoder_gate = promote(model=ENCODER, **child)
        policies: dict[str, Any] = {"encoder": encoder, "data": episodes, "evaluation": overrides["rollouts"]}
        with clock.stage("train and roll out the policy"):
            policy = train_policy(overrides=overrides["cloning"], **policies, **child)
        with clock.stage("gate the policy"):
            policy_gate = promote(model=POLICY, **child)
        with clock.stage("a deliberately bad candidate"):
            bad = train_policy(overrides=[*(overrides["cloning"] or []), *BAD_CANDIDATE], **policies, **child)
            bad_gate = {**promote(model=POLICY, **child), "note": BAD_NOTE}
        outcome = DemoOutcome(
            frames=frames,
            episodes=episodes,
            extra=extra,
            encoder=encoder,
            policy=policy,
            bad_policy=bad,
            gates=(encoder_gate, policy_gate, bad_gate),
            seconds=clock.seconds,
        )
        folder = settings().at("reports", f"demo-{short(sha256_json([encoder, policy, bad]))}")
        with clock.stage("report"):
            summary = write_report(outcome, run.tracker, folder)
        write_json(join(folder, "summary.json"), summary)
        run.link("demo-report", summary["report"] if "://" in summary["report"] else "", "Report")
        return summary
