"""Receipts: a shard exists when its receipt does. Resuming is listing them; no lock, no database."""

from __future__ import annotations

import re

from infra.digests import pretty_json
from infra.errors import DataError
from infra.storage import create_only, join, list_names, read_json
from ingest.schema import Failure, Receipt, shard_name

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
