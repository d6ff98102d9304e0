"""Receipts: a shard exists when its receipt does. Resuming is listing them; no lock, no database.

Whatever builds shards (data sets, latent caches) writes them in a `workspace` and commits with `publish_shard`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from infra.digests import pretty_json
from infra.errors import DataError
from infra.faults import fault_point
from infra.storage import create_only, is_remote, join, list_names, put_file, read_json
from ingest.schema import Failure, Receipt, shard_name
from ingest.shard import index_path

BUILDING = ".building"
STALE_S = 3600.0
RECEIPT_SUFFIX = ".receipt.json"
RECEIPT_NAME = re.compile(r"shard-(\d{5,})\.receipt\.json")


def receipt_url(output: str, shard: int) -> str:
    """Where a shard's commit record lies."""
    return join(output, shard_name(shard) + RECEIPT_SUFFIX)


def committed_shards(output: str) -> list[int]:
    """Numbers of the shards that exist, ascending: one listing."""
    matches = (RECEIPT_NAME.fullmatch(name) for name in list_names(output, suffix=RECEIPT_SUFFIX))
    return sorted(int(match[1]) for match in matches if match)


def read_receipt(output: str, shard: int, *, plan_id: str) -> Receipt:
    """One receipt; `DataError` if it belongs to another plan."""
    receipt = Receipt.parse(read_json(receipt_url(output, shard)))
    if (receipt.shard, receipt.plan_id) != (shard, plan_id):
        raise DataError(
            f"{receipt_url(output, shard)} belongs to plan {receipt.plan_id[:12]}, not {plan_id[:12]}.",
            remedy="Give each data set an output of its own.",
        )
    return receipt


def commit_receipt(output: str, receipt: Receipt) -> bool:
    """Make the shard exist. False if another worker was first with the same bytes; `DataError` if with others."""
    if create_only(receipt_url(output, receipt.shard), pretty_json(receipt.to_json())):
        return True
    winner = read_receipt(output, receipt.shard, plan_id=receipt.plan_id)
    if winner != receipt:
        raise DataError(
            f"{shard_name(receipt.shard)} was built twice with different results: "
            f"engines {winner.engine} and {receipt.engine}.",
            remedy="Delete that shard's files and run again on machines with equal versions.",
        )
    return False


def failure_ledger(receipts: list[Receipt] | tuple[Receipt, ...]) -> list[Failure]:
    """Every rejected clip of a data set, in shard order: the union of the receipts' failures."""
    return [failure for receipt in receipts for failure in receipt.failures]


def publish_shard(tar: Path, output: str, receipt: Receipt, *, stage: str) -> None:
    """Move a finished tar and its index to `output` and commit them; `stage` names the fault points."""
    name = shard_name(receipt.shard)
    index = index_path(tar)
    fault_point(f"{stage}.before_tar")
    put_file(tar, join(output, f"{name}.tar"))
    fault_point(f"{stage}.after_tar")
    put_file(index, join(output, f"{name}.idx"))
    fault_point(f"{stage}.after_idx")
    commit_receipt(output, receipt)
    fault_point(f"{stage}.after_receipt")


@contextlib.contextmanager
def workspace(output: str, shard: int) -> Iterator[Path]:
    """An empty folder for the unfinished tar: on the output's disk, so that publishing is a rename."""
    if is_remote(output):
        with tempfile.TemporaryDirectory(prefix="foreframe-") as name:
            yield Path(name)
        return
    # The name says who may still be using it.
    name = f"{shard_name(shard)}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    folder = Path(output) / BUILDING / name
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_workspaces(output: str) -> None:
    """Remove the workspaces and half-written files that dead builders of this machine left in a local output."""
    for path in Path(output).glob(".*.part"):
        # A write that was killed halfway; a young one may belong to another run.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
    building = Path(output) / BUILDING
    for folder in building.glob("*") if building.is_dir() else ():
        host, _, pid = folder.name.partition(".")[2].rpartition(".")[0].rpartition(".")
        if host == socket.gethostname() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # in use, or not there
        building.rmdir()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
