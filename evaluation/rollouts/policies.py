"""A policy by its address: an export, or a server."""

from __future__ import annotations

from evaluation.rollouts.remote import RemotePolicy, is_served
from training.export import load_policy, read_record
from training.protocols import Policy

__all__ = ["is_served", "open_policy", "policy_digest"]


def open_policy(url: str) -> Policy:
    """The policy of an export, or the one that answers at a `ws://` address."""
    return RemotePolicy(url) if is_served(url) else load_policy(url)


def policy_digest(url: str) -> str:
    """What names it in results, without loading weights; a served policy is asked."""
    return RemotePolicy(url).digest if is_served(url) else str(read_record(url)["digest"])
