"""Makes `prefect deployment run pretrain-rsp` mean `pretrain-rsp/pretrain-rsp`, as all our deployments are named.

Prefect accepts FLOW/DEPLOYMENT only and has no setting for it. Its plugin hook runs whenever prefect is imported, so
nothing large is imported here. `DeploymentClient` lives in a private module: a canary test watches it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prefect.plugins import register_hook

CLIENT_MODULE = "prefect.client.orchestration._deployments.client"
CLIENT_CLASSES = ("DeploymentClient", "DeploymentAsyncClient")
METHOD = "read_deployment_by_name"


def full_name(name: str) -> str:
    """`pretrain-rsp` -> `pretrain-rsp/pretrain-rsp`; a name with a slash, or an empty one, stays as it is."""
    return name if "/" in name or not name else f"{name}/{name}"


class BareNamePlugin:
    """The plugin object that Prefect's entry-point group loads."""

    @register_hook
    def setup_environment(self, *, ctx: Any) -> None:
        """Wrap the client's lookup by name; twice is once."""
        import importlib

        module = importlib.import_module(CLIENT_MODULE)
        for class_name in CLIENT_CLASSES:
            client = getattr(module, class_name)
            method = getattr(client, METHOD)
            if not hasattr(method, "__wrapped__"):
                setattr(client, METHOD, _with_full_name(method))


def _with_full_name(method: Callable[..., Any]) -> Callable[..., Any]:
    # Returns whatever the original does: a response, or an awaitable of one.
    @functools.wraps(method)
    def lookup(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        return method(self, full_name(name), *args, **kwargs)

    return lookup


plugin = BareNamePlugin()
