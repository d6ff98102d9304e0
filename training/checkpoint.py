"""Checkpoints: a folder of safetensors and JSON whose checksum file is written last.

A folder without a checksum file, or with one that disagrees, does not exist for resume: the newest valid folder is
taken and what was skipped is said.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infra.config import Config
from infra.digests import pretty_json, sha256_file
from infra.errors import CheckpointError, InputError
from infra.faults import fault_point
from infra.storage import get_folder, join, list_names, put_folder, remove
from training.state import TrainState

log = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"
RECORD = "state.json"
FOLDER = re.compile(r"^step-(\d{8})$")


class CheckpointConfig(Config):
    """How often to save and how many to keep; the last step is always saved."""

    every_steps: int = Field(default=500, gt=0)
    keep: int = Field(default=2, ge=1)


def folder_name(step: int) -> str:
    """`step-00000123`."""
    return f"step-{step:08d}"


def write_checkpoint(folder: Path, state: TrainState) -> None:
    """Write a local checkpoint folder, checksums last."""
    fault_point("checkpoint.before")
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in state.tensors().items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / RECORD).write_bytes(pretty_json(state.record()))
    lines = [f"{sha256_file(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != CHECKSUMS]
    (folder / CHECKSUMS).write_text("".join(lines))


def publish_checkpoint(folder: Path, url: str) -> None:
    """Copy a local checkpoint folder to its place; visible as complete only with its checksum file."""
    fault_point("checkpoint.publish")
    put_folder(folder, url, last=CHECKSUMS)
    fault_point("checkpoint.after")


def verify_checkpoint(folder: Path) -> None:
    """Raise `CheckpointError` unless every file is there and has the recorded sha256."""
    checksums = folder / CHECKSUMS
    if not checksums.is_file():
        raise CheckpointError(f"{folder.name} has no {CHECKSUMS}: it was not finished.")
    lines = (line.partition("  ") for line in checksums.read_text().splitlines())
    listed = {name: digest for digest, _, name in lines}
    if RECORD not in listed:
        raise CheckpointError(f"{folder.name}/{CHECKSUMS} is damaged: it does not list {RECORD}.")
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            raise CheckpointError(f"{folder.name}/{name} is missing or damaged.")


def list_checkpoints(url: str) -> list[str]:
    """Names of the checkpoint folders below `url`, newest first, valid or not."""
    found = {name.split("/", 1)[0] for name in list_names(url, recursive=True)}
    return sorted((name for name in found if FOLDER.match(name)), reverse=True)


def newest_valid(url: str) -> str | None:
    """Url of the newest valid checkpoint folder below `url`, None if there is none. Skipped ones are logged."""
    for name in list_checkpoints(url):
        candidate = join(url, name)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                verify_checkpoint(get_folder(candidate, Path(scratch)))
        except (CheckpointError, InputError) as error:
            log.warning("skipping checkpoint %s: %s", candidate, error)
            continue
        return candidate
    return None


def load_checkpoint(url: str, state: TrainState) -> None:
    """Restore `state` from a checkpoint folder, verified first."""
    state.restore(*read_checkpoint(url))
    log.info("resumed at step %d from %s", state.step, url)


def read_checkpoint(url: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(tensors by file, record) of a checkpoint folder, verified first."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = get_folder(url, Path(scratch))
        verify_checkpoint(folder)
        files = {path.stem: _load_tensors(path) for path in sorted(folder.glob("*.safetensors"))}
        return files, json.loads((folder / RECORD).read_text())


def prune_checkpoints(url: str, *, keep: int) -> None:
    """Delete all but the newest `keep` folders."""
    for name in list_checkpoints(url)[keep:]:
        # The checksum file goes first, so that a deletion cut short leaves nothing that looks complete.
        remove(join(url, name, CHECKSUMS))
        remove(join(url, name), recursive=True)


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        # A copy: the file may be gone before a lazily mapped page is read.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path.name} is not a safetensors file: {error}.") from None
