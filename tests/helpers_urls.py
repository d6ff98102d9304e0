"""Tables of addresses and impatient configs for tests."""

from __future__ import annotations

import csv
from pathlib import Path

from ingest.downloads import DownloadConfig
from ingest.recipe import IngestConfig, Recipe

QUICK = DownloadConfig(max_attempts=3, first_delay_s=0.01, max_delay_s=0.1, read_timeout_s=5, deadline_s=20)


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def config_of(source, output, **values) -> IngestConfig:
    recipe = {"short_side": 48, "max_failure_share": 0.9, **values.pop("recipe", {})}
    common = {"corpus": "urls", "name": "web", "workers": 0, "download": QUICK, "recipe": Recipe(**recipe)}
    return IngestConfig(source=str(source), output=str(output), **{**common, **values})
