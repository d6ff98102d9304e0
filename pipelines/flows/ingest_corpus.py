"""`ingest-corpus`: source videos (or a simulated corpus) into shards and a manifest."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from evaluation.report import write
from evaluation.report.run import REPORT_NAME, dataset_inputs, save_inputs
from infra.digests import short
from infra.settings import settings
from infra.storage import absolute, exists, join
from ingest.progress import counters_of
from ingest.reader import MANIFEST_NAME, load_manifest
from ingest.receipt import failure_ledger
from ingest.recipe import IngestConfig, Recipe, small_pictures
from ingest.schema import Layout, Manifest
from ingest.simulators.config import SimulateConfig
from pipelines.flows import STOPS_ITS_JOBS
from pipelines.ray_backend import Backend
from pipelines.tasks import FlowRun, artifact_key, logger, resolve, tracked

# Tasks that pictures help with: proprioception alone solves half of them at best (docs/log.md).
TASKS = ("button-press-topdown", "drawer-open", "window-open", "coffee-button", "handle-press", "drawer-close")
SIMULATED = "metaworld"


@flow(name="ingest-corpus", flow_run_name="ingest-{corpus}-{layout}", **STOPS_ITS_JOBS)
def ingest_corpus(
    *,
    corpus: str = SIMULATED,
    source: str = "",
    layout: Layout = "frames",
    name: str = "",
    overrides: list[str] | None = None,
    simulate: list[str] | None = None,
    backend: Backend | None = None,
    parent_run: str = "",
) -> str:
    """Build a data set and return its url.

    `corpus` is a source format, `source` its folder. Without a source, demonstrations of the Meta-World oracles are
    made first (`simulate` overrides how many and which). `overrides` are dotted keys of the ingest config.
    """
    with tracked("ingest-corpus", backend=backend, parent=parent_run) as run:
        if not source:
            source = simulate_corpus(run, simulate)
            recipe = small_pictures(layout)
        else:
            source, recipe = absolute(source), Recipe(layout=layout)
        title = name or f"{corpus}-{layout}"
        config = resolve(
            IngestConfig(corpus=corpus, source=source, output="unplaced", name=title, recipe=recipe),
            overrides,
            folder="datasets",
            name=title,
        )
        run.step("ingest.main", config, name=f"ingest-{layout}")
        report_data_set(run, config.output, source=source)
        return config.output


def simulate_corpus(run: FlowRun, overrides: list[str] | None) -> str:
    """Demonstrations of the scripted oracles, broken videos planted among them; returns the folder."""
    wanted = SimulateConfig(output=settings().at("unplaced"), tasks=TASKS, damage=True)
    config = resolve(wanted, overrides, folder="sources", name=SIMULATED)
    if not exists(join(config.output, "corpus.json")):
        run.step("ingest.main", config, name="simulate")
    return config.output


def report_data_set(run: FlowRun, url: str, *, source: str = "") -> str:
    """A data set's page, and its counters, quarantine and length checks on the flow's page and its tracker run.

    Returns the page's path. It lies below the home folder, named by the data set's version: the data set never changes.
    """
    manifest, version = load_manifest(url)
    run.run.log_tags({"data.url": url, "data.manifest_sha256": version})
    counters = counters_of(manifest.receipts) | length_counters(manifest)
    run.run.log_metrics({"samples": manifest.num_samples, "frames": manifest.num_frames, **counters})
    failures = failure_ledger(manifest.receipts)
    summary = f"{manifest.num_samples} samples, {len(failures)} refused or set aside: {url}/{MANIFEST_NAME}"
    run.table(f"counters-{manifest.name}", [{"counter": k, "value": v} for k, v in counters.items()], summary)
    run.table(
        f"quarantine-{manifest.name}",
        [{"source": item.source_id, "reason": item.reason, "message": item.message} for item in failures],
        summary,
    )
    folder = settings().at("reports", f"dataset-{artifact_key(manifest.name)}-{short(version)}")
    inputs = dataset_inputs(url, source=source, name=manifest.name, folder=folder)
    save_inputs(inputs, folder)
    page = join(folder, REPORT_NAME)
    write(inputs, page)
    run.run.log_tags({"data.report": page})
    run.note(f"report-{manifest.name}", f"[Report of the data set]({_address(page)})\n\n`{page}`")
    logger().info("%s: %d samples, %d refused, version %s", url, manifest.num_samples, len(failures), version[:12])
    logger().info("report: %s", page)
    return page


def length_counters(manifest: Manifest) -> dict[str, float]:
    """`ingest/length/HOW`: what cameras had their number of frames held against, where the receipts count it."""
    counted = manifest.statistics.get("length")
    if not isinstance(counted, dict):
        return {}
    return {f"ingest/length/{how}": float(count) for how, count in sorted(counted.items())}


def _address(page: str) -> str:
    return page if "://" in page else Path(page).absolute().as_uri()
