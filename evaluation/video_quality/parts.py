"""Finished parts of an evaluation, so that a killed one resumes: items as JSON, features as npz, JSON last."""

from __future__ import annotations

import io

import numpy as np

from evaluation.result import Item
from evaluation.video_quality.rate import Rated
from infra.digests import short
from infra.errors import InputError
from infra.storage import exists, join, read_bytes, read_json, write_bytes, write_json

FOLDER = "parts"


def save_part(output: str, number: int, rated: Rated, *, model_digest: str) -> None:
    """Write what was rated of one part; it exists once its JSON does."""
    buffer = io.BytesIO()
    arrays = {f"{extractor}/{arm}": np.concatenate(rows) for (extractor, arm), rows in rated.features.items()}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    write_bytes(_place(output, number, "npz"), buffer.getvalue())
    record = {
        "model_digest": model_digest,
        "items": {arm: [item.to_json() for item in items] for arm, items in rated.items.items()},
        "artefacts": rated.artefacts,
    }
    write_json(_place(output, number, "json"), record)


def load_part(output: str, number: int, *, model_digest: str) -> Rated | None:
    """A finished part, None when there is none; `InputError` when other weights were rated."""
    place = _place(output, number, "json")
    if not exists(place):
        return None
    record = read_json(place)
    if record["model_digest"] != model_digest:
        raise InputError(
            f"{output} holds parts of a rating of {short(record['model_digest'])}, the model is {short(model_digest)}.",
            remedy="Choose another output folder.",
        )
    items = {arm: [Item.parse(item) for item in items] for arm, items in record["items"].items()}
    rated = Rated(items=items, artefacts=dict(record["artefacts"]))
    with np.load(io.BytesIO(read_bytes(_place(output, number, "npz"))), allow_pickle=False) as arrays:
        for name in arrays.files:
            extractor, _, arm = name.partition("/")
            rated.features[int(extractor), arm] = [arrays[name]]
    return rated


def join_parts(parts: list[Rated]) -> Rated:
    """All parts as one, in their order."""
    whole = Rated()
    for part in parts:
        for arm, items in part.items.items():
            whole.items.setdefault(arm, []).extend(items)
        for key, rows in part.features.items():
            whole.features.setdefault(key, []).extend(rows)
        whole.artefacts.update(part.artefacts)
    return whole


def _place(output: str, number: int, suffix: str) -> str:
    return join(output, FOLDER, f"part-{number:05d}.{suffix}")
