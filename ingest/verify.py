"""Does a data set still hold what its manifest says? Hashes, member names, counts, records, receipts."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

from infra.digests import sha256_file
from infra.errors import ForeframeError
from infra.storage import absolute, exists, get_file, is_remote, join, read_json
from ingest.reader import load_manifest
from ingest.receipt import read_receipt
from ingest.schema import PLAN_NAME, Manifest, Receipt, SampleRecord, shard_name
from ingest.shard import iter_members


def verify(url: str) -> list[str]:
    """Every problem as one sentence; an empty list is a sound data set. Raises `InputError` where there is none."""
    place = absolute(url)
    manifest, _ = load_manifest(place)
    problems, keys, counts = [], Counter[str](), Counter[str]()
    for receipt in manifest.receipts:
        problems += _check_receipt(place, receipt, manifest.plan_id)
        with tempfile.TemporaryDirectory(prefix="foreframe-") as folder:
            problems += _check_shard(place, receipt, Path(folder), keys, counts)
    problems += [f"sample {key} is in {count} shards" for key, count in sorted(keys.items()) if count > 1]
    return problems + _check_totals(place, manifest, counts)


def _check_receipt(place: str, receipt: Receipt, plan_id: str) -> list[str]:
    try:
        stored = read_receipt(place, receipt.shard, plan_id=plan_id)
    except ForeframeError as error:
        return [str(error)]
    return [] if stored == receipt else [f"{shard_name(receipt.shard)}.receipt.json differs from the manifest's"]


def _check_shard(place: str, receipt: Receipt, folder: Path, keys: Counter[str], counts: Counter[str]) -> list[str]:
    name = shard_name(receipt.shard)
    problems = []
    for suffix, expected in (("tar", receipt.tar_sha256), ("idx", receipt.idx_sha256)):
        url = join(place, f"{name}.{suffix}")
        if not exists(url):
            return [f"{name}.{suffix} is missing"]
        local = Path(url)
        if is_remote(url):
            local = folder / f"{name}.{suffix}"
            get_file(url, local)
        if suffix == "tar":
            tar = local
        if sha256_file(local) != expected:
            problems.append(f"{name}.{suffix} does not have the sha256 that its receipt names")
    return problems + _check_members(tar, receipt, keys, counts)


def _check_members(tar: Path, receipt: Receipt, keys: Counter[str], counts: Counter[str]) -> list[str]:
    name, samples, members = shard_name(receipt.shard), set[str](), 0
    problems = []
    try:
        for member in iter_members(tar):
            members += 1
            samples.add(member.key)
            if member.suffix == "json":
                problems += _check_record(name, member.key, member.data, counts)
    except ForeframeError as error:
        return [*problems, error.message]
    keys.update(samples)
    if (len(samples), members) != (receipt.num_samples, receipt.num_members):
        problems.append(
            f"{name}.tar holds {len(samples)} samples and {members} members, its receipt says "
            f"{receipt.num_samples} and {receipt.num_members}"
        )
    return problems


def _check_record(name: str, key: str, data: bytes, counts: Counter[str]) -> list[str]:
    try:
        record = SampleRecord.parse(json.loads(data))
    except (ValueError, ForeframeError) as error:
        return [f"{name}.tar: {key}.json is not a sample record: {error}"]
    counts["samples"] += 1
    counts["frames"] += sum(camera.num_frames for camera in record.cameras.values())
    return [] if record.key == key else [f"{name}.tar: {key}.json names key {record.key!r}"]


def _check_totals(place: str, manifest: Manifest, counts: Counter[str]) -> list[str]:
    problems = [
        f"the manifest counts {expected} {what}, the shards hold {counts[what]}"
        for what, expected in (("samples", manifest.num_samples), ("frames", manifest.num_frames))
        if counts[what] != expected
    ]
    if exists(plan := join(place, PLAN_NAME)) and read_json(plan).get("plan_id") != manifest.plan_id:
        problems.append(f"{PLAN_NAME} is not the plan of the manifest")
    return problems
