"""The run's lineage as a drawing: what was made from what. On a narrow page the same nodes are a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmctl import console
from llmctl.reporting.charts import SIDE, small
from llmctl.reporting.markup import Html, section, tag
from llmctl.reporting.story import Part, Story, number, say, source_name, word

NODE, ROW, ROOF = 104, 128, 30  # pixels: a node's height, from one row to the next, above them for the arcs
LEDE = "What was made from what. Eight digits name an artifact; the bar is its share of the time."
SOURCES = 4  # of one part that have a node each
SHARE = 0.84  # of a column that its node takes


@dataclass(frozen=True)
class Node:
    """A source, or a part of the run, and where it stands."""

    key: str
    title: str
    identity: str
    figures: tuple[str, ...]
    part: Part | None = None
    column: int = 0
    row: int = 0


@dataclass(frozen=True)
class Edge:
    """`target` was made from `source`."""

    source: str
    target: str
    kind: str = ""  # outdated: from what lay there before; presumed: its manifest can't be read


def draw(story: Story) -> Html:
    """The section."""
    nodes, edges = graph(story)
    columns = max(node.column for node in nodes.values()) + 1
    width = 100 / (columns - 1 + SHARE)
    lines = [_edge(nodes[edge.source], nodes[edge.target], edge, width) for edge in edges]
    arcs = any(_is_arc(nodes[edge.source], nodes[edge.target]) for edge in edges)
    rows = max(node.row for node in nodes.values()) + 1
    height, roof = (rows - 1) * ROW + NODE, ROOF if arcs else 0
    svg = tag(
        "svg",
        *lines,
        viewBox=f"0 {-roof} {SIDE} {height + roof}",
        preserveAspectRatio="none",
        style=f"top:0;height:{height + roof}px",
        aria_hidden="true",
    )
    longest = sum(part.seconds for part in story.parts.values())
    made = [_node(node, edges, nodes, story, width, roof, longest) for node in nodes.values()]
    drawing = tag("div", svg, tag("ol", *made), class_="lineage", style=f"--height:{height + roof}px")
    return section("lineage", "Lineage", LEDE, drawing)


def graph(story: Story) -> tuple[dict[str, Node], list[Edge]]:
    """Nodes by key, each in its column and row, and the edges between them."""
    nodes: dict[str, Node] = {}
    edges: list[Edge] = []
    for part in story.parts.values():
        before: list[Node] = []
        for entry in part.inputs:
            place, identity = word(entry, "path"), word(entry, "identity")
            now = story.part(place)
            key = place if now is not None and place in nodes else f"outside {identity}"
            if key not in nodes:
                nodes[key] = Node(key, _outside(place), identity[:8], ("not in this run",), None, -1)
            before.append(nodes[key])
            outdated = now is not None and now.identity not in ("", identity)
            edges.append(Edge(key, part.place, "outdated" if outdated else ""))
        if not part.inputs and (place := _before(part, nodes)):
            before.append(nodes[place])
            edges.append(Edge(place, part.place, "presumed"))
        for name, entry in _sources(part):
            key = f"source {name}"
            if key not in nodes:
                files = number(entry, "files")
                nodes[key] = Node(key, source_name(name), word(entry, "sha256")[:8], _files(files), None, -1)
            before.append(nodes[key])
            edges.append(Edge(key, part.place))
        column = 1 + max((node.column for node in before if node.column >= 0), default=-1)
        column = max(column, 1) if any(node.column < 0 for node in before) else column
        for node in before:
            if node.column < 0:  # a source stands just before the first part that reads it
                nodes[node.key] = replace(node, column=column - 1)
        nodes[part.place] = Node(part.place, _title(part), part.short, _figures(part), part, column)
    return _in_rows(nodes), edges


def _in_rows(nodes: dict[str, Node]) -> dict[str, Node]:
    """The parts of the run stand on the first row, sources of later ones and the others of a column below."""
    columns: dict[int, list[Node]] = {}
    for node in nodes.values():
        columns.setdefault(node.column, []).append(node)
    placed = {}
    for column in columns.values():
        for row, node in enumerate(sorted(column, key=lambda node: node.part is None)):
            placed[node.key] = replace(node, row=row)
    order = sorted(nodes, key=lambda key: (placed[key].column, placed[key].row))
    return {key: placed[key] for key in order}


def _before(part: Part, nodes: Mapping[str, Node]) -> str:
    """What a part is made from where it does not say so itself; empty where that is not there."""
    subject = part.place.split("/")[1:2]
    places = {"pretrain": ["prep"], "finetune": ["pretrain", "import"]}.get(part.stage, subject)
    return next((place for place in places if place in nodes), "")


def _sources(part: Part) -> list[tuple[str, Mapping[str, Any]]]:
    """Its sources; of many, the first ones and how many there are beside them."""
    found = list(part.sources.items())
    if len(found) <= SOURCES:
        return found
    shown = found[: SOURCES - 1]
    files = sum(number(entry, "files") or 0.0 for _, entry in found[len(shown) :])
    return [*shown, (f"{len(found) - len(shown)} more sources of {part.place}", {"files": files})]


def _title(part: Part) -> str:
    if part.stage == "export":
        return part.place.split("/")[-1]
    subject = part.place.partition("/")[2]
    return f"eval of {subject}" if subject and subject not in ("pretrain", "finetune", "import") else part.stage


def _outside(place: str) -> str:
    return place.rstrip("/").rsplit("/", 1)[-1] or "a model"


def _files(files: float | None) -> tuple[str, ...]:
    return (f"{files:,.0f} {'file' if files == 1 else 'files'}",) if files else ()


def _figures(part: Part) -> tuple[str, ...]:
    """The two lines that say what a part is and how good it is."""
    metrics = part.metrics
    answers = say(metrics, "answer_bits_per_byte", "answers {} bits/byte", "{:.2f}".format)
    if part.unfinished:
        return ("stopped by its parity gate" if part.stage == "export" else "not finished",)
    if part.stage == "prep":
        return _some(say(metrics, "documents", "{} documents"), say(metrics, "tokens", "{} tokens"))
    right = say(metrics, "val_accuracy", "{} of hidden tokens", "{:.1%}".format).replace("%", " %")
    if part.stage in ("pretrain", "import"):
        bits = say(metrics, "val_bits_per_byte", "{} bits/byte", "{:.3f}".format)
        return _some(say(metrics, "parameters", "{} parameters"), bits, right)
    if part.stage == "finetune":
        chats = say(metrics, "conversations", "{} conversations") if number(metrics, "conversations") else ""
        return _some(chats, answers or say(metrics, "val_bits_per_byte", "{} bits/byte", "{:.3f}".format))
    if part.stage == "eval":
        return _some(say(metrics, "val_bits_per_byte", "text {} bits/byte", "{:.2f}".format), right, answers)
    if not part.place.endswith("onnx-ort"):
        return ("for transformers, vLLM",) if part.place.endswith("/hf") else ()
    equal, tokens = number(metrics, "greedy_equal"), number(metrics, "greedy_tokens")
    greedy = f"greedy {equal:.0f}/{tokens:.0f} equal" if equal is not None and tokens is not None else ""
    return _some(say(metrics, "parity_error", "parity {}", small), greedy)


def _some(*lines: str) -> tuple[str, ...]:
    return tuple(filter(None, lines))


def _node(
    node: Node,
    edges: Sequence[Edge],
    nodes: dict[str, Node],
    story: Story,
    width: float,
    roof: int,
    total: float,
) -> Html:
    fed = [edge for edge in edges if edge.target == node.key]
    origin = [f"{nodes[edge.source].title} {nodes[edge.source].identity}".strip() for edge in fed]
    lines: list[str] = [tag("span", line) for line in node.figures]
    kind = "node source" if node.part is None else "node"
    if node.part is not None:
        size, seconds = sum(node.part.files.values()), node.part.seconds
        cost = " · ".join(filter(None, [console.size(size) if size else "", console.duration(seconds) if size else ""]))
        lines.append(tag("small", cost))
        if node.part.damage:
            kind, lines = f"{kind} damaged", [tag("strong", "damaged"), tag("small", cost)]
        elif outdated := story.outdated(node.part):
            lines[-1] = tag("strong", f"from an older {outdated}")
        share = tag("i", style=f"width:{seconds / total if total else 0:.1%}")
        lines.append(tag("i", share, class_="share", title="its share of the time"))
    if origin:
        lines.append(tag("small", f"from {', '.join(origin)}", class_="from"))
    ways = {_is_arc(nodes[edge.source], node) for edge in fed}
    kind += " fed" * (False in ways) + " topped" * (True in ways)
    title = tag("b", node.title, title=node.title)
    head: Html = tag("a", title, href=f"#{node.part.stage}") if node.part is not None else title
    return tag(
        "li",
        tag("div", head, tag("code", node.identity)),
        *lines,
        class_=kind,
        style=f"left:{node.column * width:.2f}%;width:{width * SHARE:.2f}%;top:{roof + node.row * ROW}px",
    )


def _is_arc(source: Node, target: Node) -> bool:
    """Whether the edge passes over nodes that stand between the two."""
    return source.row == target.row == 0 and target.column - source.column > 1


def _edge(source: Node, target: Node, edge: Edge, width: float) -> Html:
    """A curve from one side to the other; over the roof where other nodes stand between."""
    unit = SIDE / 100 * width
    kind = f"edge {edge.kind}".strip()
    if _is_arc(source, target):
        start, end = (source.column + SHARE * 0.5) * unit, (target.column + SHARE * 0.35) * unit
        lift = -ROOF * (0.75 + 0.2 * min(2, target.column - source.column - 1))
        return tag("path", d=f"M{start:.0f} 0C{start:.0f} {lift:.0f} {end:.0f} {lift:.0f} {end:.0f} 0", class_=kind)
    x, right = (source.column + SHARE) * unit, target.column * unit
    y, low = source.row * ROW + NODE / 2, target.row * ROW + NODE / 2
    bend = right - (1 - SHARE) * unit / 2
    start = bend - (1 - SHARE) * unit / 2
    return tag(
        "path",
        d=f"M{x:.0f} {y:.0f}H{start:.0f}C{bend:.0f} {y:.0f} {bend:.0f} {low:.0f} {right:.0f} {low:.0f}",
        class_=kind,
    )
