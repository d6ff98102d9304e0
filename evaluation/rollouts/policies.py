"""A policy by its address: an export, or a server that speaks openpi's websocket convention."""

from __future__ import annotations

from training.export import load_policy, read_record
from training.protocols import Policy

SERVED = ("ws://", "wss://")


def is_served(url: str) -> bool:
    """Whether the policy answers at an address, so that there are no files of it here."""
    return url.startswith(SERVED)


def open_policy(url: str) -> Policy:
    """The policy at an address, ready to act; `InputError` when it is none, `ServiceError` when nobody answers."""
    if is_served(url):
        from evaluation.rollouts.remote import RemotePolicy

        return RemotePolicy(url)
    return load_policy(url)


def policy_digest(url: str) -> str:
    """What identifies the policy in results; an export's weights are not loaded for it."""
    if is_served(url):
        return open_policy(url).digest
    return str(read_record(url)["digest"])
