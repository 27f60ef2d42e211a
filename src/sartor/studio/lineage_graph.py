"""Artefacts of a folder and their parents as a drawn graph: one column per kind, one line per parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.studio.studio_folder import FoundArtifact

COLUMNS = ("dataset", "adapter", "report", "release", "export")
WIDTH, HEIGHT = 200, 44
GAP_X, GAP_Y = 60, 16
MARGIN = 8
# nodes of a graph; more are only in the list
MAX_NODES = 60


@dataclass(frozen=True)
class GraphNode:
    """A drawn artefact. x, y: its left upper corner, in user units."""

    found: FoundArtifact
    x: int
    y: int


@dataclass(frozen=True)
class LineageGraph:
    """A drawing of the artefacts. edges: paths from parent to child, as SVG path data."""

    nodes: Sequence[GraphNode]
    edges: Sequence[str]
    width: int
    height: int


def draw_lineage(artifacts: Sequence[FoundArtifact]) -> LineageGraph:
    """Lay out the artefacts: children stand at the height of their first parent where that is free."""
    drawn = [found for found in artifacts if found.kind in COLUMNS and found.artifact][:MAX_NODES]
    rows: dict[str, int] = {}
    used: dict[str, set[int]] = {kind: set() for kind in COLUMNS}
    nodes: dict[str, GraphNode] = {}
    columns = [kind for kind in COLUMNS if any(found.kind == kind for found in drawn)]
    for kind in columns:
        for found in (item for item in drawn if item.kind == kind):
            assert found.artifact is not None
            parents = [parent["id"] for parent in found.artifact.manifest.get("parents", [])]
            wanted = min((rows[parent] for parent in parents if parent in rows), default=len(used[kind]))
            while wanted in used[kind]:
                wanted += 1
            used[kind].add(wanted)
            rows[found.id] = wanted
            x = MARGIN + columns.index(kind) * (WIDTH + GAP_X)
            nodes[found.id] = GraphNode(found, x, MARGIN + wanted * (HEIGHT + GAP_Y))
    edges = []
    for node in nodes.values():
        assert node.found.artifact is not None
        for parent in node.found.artifact.manifest.get("parents", []):
            if parent["id"] in nodes and nodes[parent["id"]].x < node.x:
                edges.append(_edge(nodes[parent["id"]], node))
    width = 2 * MARGIN + len(columns) * WIDTH + max(0, len(columns) - 1) * GAP_X
    height = max((node.y for node in nodes.values()), default=0) + HEIGHT + MARGIN
    return LineageGraph(list(nodes.values()), edges, width, height)


def _edge(parent: GraphNode, child: GraphNode) -> str:
    start_x, start_y = parent.x + WIDTH, parent.y + HEIGHT // 2
    end_x, end_y = child.x, child.y + HEIGHT // 2
    middle = end_x - GAP_X // 2
    return f"M{start_x} {start_y}H{middle - 12}C{middle} {start_y} {middle} {end_y} {middle + 12} {end_y}H{end_x}"
