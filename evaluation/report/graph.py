"""Lineage as a tree of digests, from what nothing was made of down to the source hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.report.inputs import LineageNode
from infra.digests import short

SOURCE_KIND = "source video"
MAX_DEPTH = 24


@dataclass(frozen=True)
class Branch:
    """A node of the drawn tree. `repeated`: drawn in full elsewhere, so its inputs are left out here."""

    kind: str
    id: str
    url: str
    children: tuple[Branch, ...] = ()
    leaves: tuple[tuple[str, tuple[LineageNode, ...]], ...] = ()
    repeated: bool = False

    @property
    def label(self) -> str:
        """The first digits of the digest."""
        return short(self.id)


@dataclass(frozen=True)
class LineageView:
    """The roots (what nothing else was made of) and how much there is below them."""

    roots: tuple[Branch, ...]
    num_nodes: int
    num_sources: int
    notes: tuple[str, ...] = ()


def lineage_view(nodes: Sequence[LineageNode]) -> LineageView:
    """Turn nodes into trees. Digests without a node are sources; a cycle is cut and said."""
    known = {node.id: node for node in nodes}
    used = {digest for node in nodes for digest in node.inputs if digest != node.id}
    roots = [node for node in known.values() if node.id not in used] or list(known.values())[:1]
    drawn: set[str] = set()
    trees = tuple(_branch(node, known, drawn, depth=0) for node in roots)
    sources = {digest for digest in used if digest not in known or not known[digest].inputs}
    unreached = {node.id for node in known.values() if node.inputs} - drawn
    notes = (f"{len(unreached)} records refer to one another in a circle and are not drawn.",) if unreached else ()
    return LineageView(trees, num_nodes=len(known), num_sources=len(sources), notes=notes)


def _branch(node: LineageNode, known: dict[str, LineageNode], drawn: set[str], *, depth: int) -> Branch:
    if node.id in drawn or depth > MAX_DEPTH:
        return Branch(node.kind, node.id, node.url, repeated=True)
    drawn.add(node.id)
    children: list[Branch] = []
    leaves: dict[str, list[LineageNode]] = {}
    for digest in dict.fromkeys(node.inputs):
        child = known.get(digest) or LineageNode(kind=SOURCE_KIND, id=digest)
        if child.inputs:
            children.append(_branch(child, known, drawn, depth=depth + 1))
        else:
            leaves.setdefault(child.kind, []).append(child)
    return Branch(
        node.kind, node.id, node.url, tuple(children), tuple((kind, tuple(group)) for kind, group in leaves.items())
    )
