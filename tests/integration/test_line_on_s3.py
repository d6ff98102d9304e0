"""Ingest, pre-training on Ray and the export with every byte on an S3 endpoint, by the real entry points."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.config import Config
from infra.storage import join, list_names, put_folder
from ingest.reader import ShardDataset
from ingest.recipe import IngestConfig, Recipe
from tests.helpers_media import make_corpus
from tests.helpers_training import small_pretrain
from training.export import load_encoder


def run_main(module: str, config: Config, folder: Path) -> None:
    path = folder / f"{module}.json"
    config.save(path)
    done = subprocess.run(
        [sys.executable, "-m", module, str(path)], cwd=folder, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.s3
@pytest.mark.ray
def test_the_line_leaves_nothing_on_the_local_disk(moto_s3: str, tmp_path: Path):
    make_corpus(tmp_path / "videos")
    put_folder(tmp_path / "videos", join(moto_s3, "line/videos"))
    work = tmp_path / "work"
    work.mkdir()

    data = join(moto_s3, "line/data")
    recipe = Recipe(layout="frames", short_side=48, shard_bytes=60_000)
    ingest = IngestConfig(
        corpus="folder", source=join(moto_s3, "line/videos"), output=data, name="line", recipe=recipe, workers=2
    )
    run_main("ingest.main", ingest, work)
    assert len(ShardDataset(data)) >= 4

    run = join(moto_s3, "line/run")
    steps = ("schedule.steps=4", "checkpoint.every_steps=2", "compute.workers=2")
    run_main("training.main", small_pretrain(data, run, *steps), work)
    names = list_names(run, recursive=True)
    assert any(name.startswith("checkpoints/") and name.endswith(".safetensors") for name in names)
    assert {"export/export.json", "export/model.safetensors", "metrics.jsonl", "summary.json"} <= set(names)
    assert load_encoder(join(run, "export")).embed_dim == 16
    assert [path.name for path in work.iterdir() if path.suffix != ".json"] == []
