"""`foreframe ingest`, `verify` and `view`: source videos to a data set, and what is in it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pipelines.cli_calls import DryRun, Overrides

# What each source format is, for `--help`, which must not import them; a test holds the names to ingest.corpora.
CORPORA = {
    "annotated": "Bridge, RT-1, SSv2, xhand as VPP publishes them: annotation/SPLIT/NAME.json, videos/",
    "calvin": "CALVIN: episode_*.npz and lang_annotations/auto_lang_ann.npy, both cameras",
    "folder": "any folder of videos; optional labels.csv, .json, .jsonl or .parquet",
    "kinetics400": "class folders, or the published CSV beside cut or whole videos",
    "lerobot": "LeRobotDataset 2.0, 2.1 and 3.0: meta/info.json, data/, videos/",
    "metaworld": "simulated episodes; --simulate makes them first",
    "rlds": "Open X-Embodiment: features.json and TFRecords",
    "something_something_v2": "ID.webm and the published label files",
    "urls": "a CSV or Parquet of addresses, fetched first",
}

MEND = (
    "To mend it: remove manifest.json and the damaged shards' .receipt.json, then run the same ingest again. "
    "Shards are a function of the plan, so the manifest becomes the very same one."
)


def ingest(
    *,
    corpus: Annotated[str, typer.Argument(help=f"Source format: {', '.join(CORPORA)}.")],
    source: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the corpus; for urls, its table.")],
    out: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the data set.")],
    layout: Annotated[str, typer.Option(help="frames (pictures) or video (H.264).")] = "frames",
    name: Annotated[str, typer.Option(help="Name of the data set; default: the corpus's.")] = "",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Shards at a time; default: all CPUs, 0: in this process.")
    ] = None,
    replay_failures: Annotated[
        str, typer.Option(metavar="DATASET", help="Only the clips that failed there; OUT becomes its child.")
    ] = "",
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="urls: fetch again what failed, and nothing else.")
    ] = False,
    simulate: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help='metaworld: make the episodes in SOURCE, e.g. tasks=["all"]; repeat.'),
    ] = None,
    override: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Turn a corpus into a data set. Killed or repeated, it goes on from what is committed."""
    from infra.config import override as apply
    from ingest import job, main
    from ingest.recipe import IngestConfig

    values: dict[str, Any] = {
        "corpus": corpus,
        "source": source,
        "output": out,
        "name": name or corpus,
        "recipe": {"layout": layout},
    }
    values |= {"workers": workers, "replay_failures": replay_failures, "retry_failed": retry_failed}
    config = apply(IngestConfig.parse(values), override or [])
    if simulate is not None:
        _simulate(corpus, source, simulate, dry_run=dry_run)
    if dry_run:
        typer.echo(json.dumps(job.describe(config), indent=2))
        return
    manifest = main.run(config)
    typer.echo(f"{out}: {manifest.num_samples} samples, {manifest.num_frames} frames, {manifest.num_failures} refused")


def verify(url: Annotated[str, typer.Argument(help="Folder or s3:// prefix of a data set.")]) -> None:
    """Check a data set against its manifest: hashes, names, counts. Exit code 1 if something is wrong."""
    from ingest.reader import load_manifest
    from ingest.verify import verify as check

    problems = check(url)
    manifest, version = load_manifest(url)
    counts = f"{len(manifest.receipts)} shards, {manifest.num_samples} samples, {manifest.num_frames} frames"
    typer.echo("\n".join([*problems, MEND]) if problems else f"sound: {counts}, version {version[:12]}")
    raise typer.Exit(bool(problems))


def view(
    url: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3:// prefix of a data set.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
) -> None:
    """Browse a data set on loopback: clips with cameras, captions and arrays, and what was refused. Ctrl-C ends it."""
    from evaluation.view.run import view as show

    show(url, port=port, browser=browser, announce=typer.echo)


def _simulate(corpus: str, source: str, overrides: list[str], *, dry_run: bool) -> None:
    """Episodes of the scripted oracles in SOURCE, unless they are there."""
    from infra.config import override as apply
    from infra.errors import ConfigError
    from ingest.simulators import generate
    from ingest.simulators.config import SimulateConfig

    if corpus != "metaworld":
        raise ConfigError(f"--simulate makes episodes of metaworld, not of {corpus!r}.")
    if dry_run:
        raise ConfigError("--simulate and --dry-run do not go together.", remedy="Make the episodes first.")
    generate.run(apply(SimulateConfig(output=source, tasks=("all",)), overrides))
