"""From a model back to the source videos: every record names the digests it was made from, and this only follows them.

Records are found by reading the commit records below the home folder: `export.json` (a model), `manifest.json` (a data
set; its digest is the file's sha256). A digest that no record has is a source video, or something that was moved away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from infra.config import Config
from infra.digests import sha256_bytes, short
from infra.errors import InputError
from infra.storage import absolute, exists, join, list_names, read_bytes

EXPORT_RECORD, MANIFEST = "export.json", "manifest.json"
SOURCE = "source video"


class LineageNode(Config):
    """An artefact and the digests it was made from; `url` is empty for a source known by its hash alone."""

    kind: str
    id: str
    url: str = ""
    inputs: tuple[str, ...] = ()


class Lineage(Config):
    """The graph below one artefact, which comes first; every node once."""

    nodes: tuple[LineageNode, ...]

    @property
    def root(self) -> LineageNode:
        """What was traced."""
        return self.nodes[0]

    @property
    def sources(self) -> tuple[LineageNode, ...]:
        """The source videos at the end of every path."""
        return tuple(node for node in self.nodes if node.kind == SOURCE)

    def text(self, *, max_sources: int = 5) -> str:
        """An indented tree; of the sources of one data set only the first few are named."""
        return "\n".join(_lines(self.root, {node.id: node for node in self.nodes}, 0, max_sources))


def trace(target: str, *, home: str) -> Lineage:
    """Follow `target`, the url of an export or data set or a digest (or its first digits), through the records of `home`.

    Raises `InputError` when nothing below `home` has it.
    """
    records = {node.id: node for node in _records(absolute(home))}
    root = _at_url(absolute(target)) or _by_digest(target, records)
    if root is None:
        raise InputError(
            f"{target!r} is no export, data set or known digest.", remedy=f"Records are searched for below {home}."
        )
    nodes: dict[str, LineageNode] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop(0)
        if node.id in nodes:
            continue
        nodes[node.id] = node
        waiting += [records.get(digest) or LineageNode(kind=SOURCE, id=digest) for digest in node.inputs]
    return Lineage(nodes=tuple(nodes.values()))


def _records(home: str) -> Iterator[LineageNode]:
    for name in list_names(home, recursive=True):
        if name.endswith(f"/{EXPORT_RECORD}") or name.endswith(f"/{MANIFEST}"):
            node = _at_url(join(home, name.rsplit("/", 1)[0]))
            if node is not None:
                yield node


def _at_url(url: str) -> LineageNode | None:
    if exists(join(url, EXPORT_RECORD)):
        record: dict[str, Any] = json.loads(read_bytes(join(url, EXPORT_RECORD)))
        return LineageNode(kind=str(record["kind"]), id=str(record["id"]), url=url, inputs=tuple(record["inputs"]))
    if exists(join(url, MANIFEST)):
        data = read_bytes(join(url, MANIFEST))
        manifest: dict[str, Any] = json.loads(data)
        parent = [manifest["parent"]] if manifest.get("parent") else []
        return LineageNode(
            kind="data set", id=sha256_bytes(data), url=url, inputs=tuple([*manifest["inputs"], *parent])
        )
    return None


def _by_digest(digits: str, records: dict[str, LineageNode]) -> LineageNode | None:
    found = [node for digest, node in records.items() if digest.startswith(digits)] if len(digits) >= 6 else []
    if len(found) > 1:
        raise InputError(f"digest {digits!r} is ambiguous: {len(found)} records begin with it.", remedy="Give more.")
    return found[0] if found else None


def _lines(node: LineageNode, nodes: dict[str, LineageNode], depth: int, max_sources: int) -> Iterator[str]:
    yield f"{'    ' * depth}{node.kind} {short(node.id)}  {node.url}".rstrip()
    children = [nodes[digest] for digest in dict.fromkeys(node.inputs)]
    sources = [child for child in children if child.kind == SOURCE]
    for child in children:
        if child.kind != SOURCE:
            yield from _lines(child, nodes, depth + 1, max_sources)
    for child in sources[:max_sources]:
        yield f"{'    ' * (depth + 1)}{SOURCE} {child.id}"
    if len(sources) > max_sources:
        yield f"{'    ' * (depth + 1)}... and {len(sources) - max_sources} more source videos"
