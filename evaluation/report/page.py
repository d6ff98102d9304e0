"""The page: one HTML file that needs no network, no script and no second file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from evaluation.report.assets import AssetBox
from evaluation.report.inputs import ReportInputs
from evaluation.report.sections import build_sections
from evaluation.report.text import grouped, show, size, visible
from infra import storage

# Nothing may be fetched or run: a hostile string that slipped through would still do nothing.
CONTENT_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"


def render(inputs: ReportInputs, *, thumbnails: Mapping[str, bytes] | None = None) -> str:
    """The whole page as HTML.

    `thumbnails` maps the path of a quarantined source to image bytes; without it, and with a data set's `source`
    given, the first frame that decodes is shown. Missing inputs are said on the page and raise nothing.
    """
    box = AssetBox(max_bytes=inputs.max_bytes)
    sections = build_sections(inputs, box, thumbnails=thumbnails or {})
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            inputs=inputs,
            sections=sections,
            left_out=box.left_out,
            assets_size=size(box.spent_bytes),
            content_policy=CONTENT_POLICY,
        )
    )


def write(inputs: ReportInputs, path: str | Path, *, thumbnails: Mapping[str, bytes] | None = None) -> None:
    """Render to a local path or an `s3://` address, atomically."""
    storage.write_bytes(path, render(inputs, thumbnails=thumbnails).encode("utf-8"))


def _finalize(value: object) -> object:
    """Every expression of every template passes here before it is escaped."""
    if isinstance(value, Markup):
        return value
    return visible(show(value) if not isinstance(value, str) else value)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evaluation.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["grouped"] = grouped
    return environment
