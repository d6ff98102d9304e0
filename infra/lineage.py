"""Lineage: from any artefact back to the source videos, by nothing but the digests its records name.

Every record says what it is (`id`) and what it was made from (`inputs`): the gate's records, `result.json`,
`export.json`, `manifest.json`. An index of the home folder maps digests to records; a trace follows them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from infra.config import Config
from infra.digests import sha256_bytes, sha256_json, short
from infra.errors import InputError
from infra.storage import absolute, exists, join, list_names, read_bytes, read_json

log = logging.getLogger(__name__)

SOURCE, UNKNOWN = "source video", "unknown"
EXPORT_RECORD, MANIFEST, RESULT = "export.json", "manifest.json", "result.json"
PROMOTIONS = "promotions/"
LEFT_OUT = ("services/", "mlflow-artifacts/", "configs/")
DIGEST = re.compile(r"[0-9a-f]{6,64}")


class LineageNode(Config):
    """An artefact and the digests it was made from; `url` is empty for what is known by its hash alone."""

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

    @property
    def missing(self) -> tuple[LineageNode, ...]:
        """Digests whose record was not found: the trace breaks there."""
        return tuple(node for node in self.nodes if node.kind == UNKNOWN)

    def text(self, *, max_sources: int = 5) -> str:
        """An indented tree; of one data set's sources only the first are named, and nothing is drawn twice."""
        return "\n".join(_lines(self.root, {node.id: node for node in self.nodes}, 0, max_sources, set()))


def trace(target: str, *, home: str) -> Lineage:
    """Follow `target` through the records below `home`: a record's url, its folder's, or a digest's first digits.

    Raises `InputError` for what no record has, or several have.
    """
    records = index_records(absolute(home))
    is_digest = DIGEST.fullmatch(target) and not exists(target)
    root = _by_digest(target, records) if is_digest else _at_url(absolute(target))
    nodes: dict[str, LineageNode] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop(0)
        if node.id in nodes:
            continue
        nodes[node.id] = node
        # Only a data set is made from files that have no record of their own.
        leaf = SOURCE if node.kind == "data set" else UNKNOWN
        waiting += [records.get(digest) or LineageNode(kind=leaf, id=digest) for digest in node.inputs]
    return Lineage(nodes=tuple(nodes.values()))


def index_records(home: str) -> dict[str, LineageNode]:
    """Digest -> record of everything below a folder or `s3://` prefix; an unreadable one is left out, and said."""
    index: dict[str, LineageNode] = {}
    for name in list_names(home, suffix=".json", recursive=True):
        is_record = name.rsplit("/", 1)[-1] in {EXPORT_RECORD, MANIFEST, RESULT} or name.startswith(PROMOTIONS)
        if not is_record or name.startswith(LEFT_OUT):
            continue
        try:
            node = read_record(join(home, name))
        except InputError as error:
            log.warning("left out of the lineage: %s", error)
            continue
        index[node.id] = node
    return index


def read_record(url: str) -> LineageNode:
    """The node of one record file; `InputError` when it is none."""
    value = read_json(url)
    inputs = value.get("inputs", []) if isinstance(value, dict) else None
    if not isinstance(inputs, list):
        raise InputError(f"{url} is no record.", remedy="Name a data set, an export, a result or a promotion.")
    folder, _, name = url.rpartition("/")
    if name == MANIFEST:
        kind, identity = str(value.get("kind") or "data set"), sha256_bytes(read_bytes(url))
        inputs = [*inputs, value.get("parent")]
    elif name == RESULT:
        kind, identity = "evaluation", sha256_json(value)
        inputs = [value.get("model_digest"), value.get("data_digest"), *inputs]
    else:
        kind, identity = str(value.get("kind") or "promotion"), str(value.get("id") or "")
    if not identity:
        raise InputError(f"{url} has no id.", remedy="Name a data set, an export, a result or a promotion.")
    made_from = tuple(dict.fromkeys(str(item) for item in inputs if item and item != identity))
    return LineageNode(kind=kind, id=identity, url=url if kind == "promotion" else folder, inputs=made_from)


def _at_url(url: str) -> LineageNode:
    if url.endswith(".json"):
        return read_record(url)
    for name in (EXPORT_RECORD, RESULT, MANIFEST):
        if exists(join(url, name)):
            return read_record(join(url, name))
    raise InputError(f"{url} holds no record.", remedy="Name a data set, an export, a result, or a digest of one.")


def _by_digest(digits: str, records: dict[str, LineageNode]) -> LineageNode:
    found = [node for digest, node in records.items() if digest.startswith(digits)]
    if len(found) != 1:
        count = "no record has" if not found else f"{len(found)} records have"
        raise InputError(f"{count} a digest that begins with {digits!r}.", remedy="Give its folder, or more digits.")
    return found[0]


def _lines(
    node: LineageNode, nodes: dict[str, LineageNode], depth: int, max_sources: int, drawn: set[str]
) -> Iterator[str]:
    again = node.id in drawn and bool(node.inputs)
    yield f"{'    ' * depth}{node.kind} {short(node.id)}  {node.url}".rstrip() + (" (drawn above)" if again else "")
    if again:
        return
    drawn.add(node.id)
    children = [nodes[digest] for digest in node.inputs]
    sources = [child for child in children if child.kind == SOURCE]
    for child in children:
        if child.kind != SOURCE:
            yield from _lines(child, nodes, depth + 1, max_sources, drawn)
    for child in sources[:max_sources]:
        yield f"{'    ' * (depth + 1)}{SOURCE} {child.id}"
    if len(sources) > max_sources:
        yield f"{'    ' * (depth + 1)}... and {len(sources) - max_sources} more source videos"
