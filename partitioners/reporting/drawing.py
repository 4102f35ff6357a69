"""A plan as a picture: the graph coloured by stage, wrapped like text, over bars of the stages' loads."""
from __future__ import annotations

from dataclasses import dataclass
from html import escape

import networkx as nx

from partitioners.graph import Node, topological_order
from partitioners.plan import Plan, StageCost
from partitioners.units import format_bytes, format_seconds, format_share

WIDTH, MARGIN, STEP, LANE = 1200, 40, 11, 11
ROW_GAP = 26    # between two rows, with the names of what begins there
WIDEST = 36.0   # distance between the columns of a small graph
FAR = 14        # columns, or lanes, beyond which a line is faint
LETTER = 6.6    # mean width of a letter
INSIDE, ACROSS = 'stroke="#bbb" stroke-width="0.6"', 'stroke="#222" stroke-width="1.2"'
Point = tuple[float, float]


def colour(stage: int, lightness: int = 52) -> str:
    """Neighbouring stages differ most: hues go round by the golden angle."""
    return f"hsl({(stage * 137.508 + 210) % 360:.0f},62%,{lightness}%)"


def draw(plan: Plan, graph: nx.DiGraph | None = None) -> str:
    """The plan as an SVG document: its graph, where there is one, over a bar for each stage. Hovering over a node or
    bar tells its figures."""
    picture, top = [_caption(plan)], 48.0
    if graph is not None:
        layout = _layout(graph)
        picture += [*_edges(plan, graph, layout), *_nodes(plan, graph, layout), *_labels(plan, layout),
                    *_legend(graph, layout)]
        top = layout.bottom + 48
    bars, height = _bars(plan, top)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', *picture, *bars, "</svg>"])


def _caption(plan: Plan) -> str:
    proof = "proved optimal" if plan.proved else f"at most {format_share(plan.gap, 2)} above the best"
    text = (f"{len(plan.stage_of)} nodes on {plan.num_stages} stages, bottleneck {format_seconds(plan.bottleneck)}, "
            f"{proof}")
    return f'<text x="{MARGIN}" y="24" font-size="15">{escape(text)}</text>'


@dataclass(frozen=True)
class _Layout:
    """Where each node is, in which row, the distance between columns, and where the graph ends."""
    points: dict[Node, Point]
    row: dict[Node, int]
    step: float
    bottom: float

    @property
    def size(self) -> float:
        """How much larger than at its closest."""
        return min(self.step / STEP, 2.0)


def _columns(graph: nx.DiGraph) -> list[list[Node]]:
    """Nodes by depth, each right before its first reader; those on the longest paths come first in their column."""
    order, early = topological_order(graph), {}
    for node in order:
        early[node] = max((early[before] + 1 for before in graph.predecessors(node)), default=0)
    late = dict(early)
    for node in reversed(order):
        late[node] = min((late[after] - 1 for after in graph.successors(node)), default=early[node])
    columns: list[list[Node]] = [[] for _ in range(max(late.values()) + 1)]
    for node in sorted(order, key=lambda node: late[node] - early[node]):
        columns[late[node]].append(node)
    return columns


def _layout(graph: nx.DiGraph) -> _Layout:
    """Columns from left to right in wrapped rows."""
    columns = _columns(graph)
    step = min(max((WIDTH - 2 * MARGIN) / len(columns), STEP), WIDEST)
    per_row, lane = int((WIDTH - 2 * MARGIN) / step + 1e-9), LANE * min(step / STEP, 2.0)
    points, rows, top = {}, {}, 34.0 + ROW_GAP
    for start in range(0, len(columns), per_row):
        row = columns[start:start + per_row]
        for place, nodes in enumerate(row):
            for number, node in enumerate(nodes):
                points[node] = (MARGIN + (place + 0.5) * step, top + (number + 0.5) * lane)
                rows[node] = start // per_row
        top += max(map(len, row)) * lane + ROW_GAP
    return _Layout(points, rows, step, top - ROW_GAP + 14)


def _edges(plan: Plan, graph: nx.DiGraph, layout: _Layout) -> list[str]:
    """Thin grey inside a stage; dark to the first reader on each other stage; faint where the way is long."""
    lines, seen = [], set()
    for u, v in sorted(graph.edges, key=lambda edge: layout.points[edge[1]][::-1]):
        (x, y), (a, b) = layout.points[u], layout.points[v]
        cut = plan.stage_of[str(u)] != plan.stage_of[str(v)]
        if layout.row[u] != layout.row[v]:
            # A line from row to row would run through all that lies between: it leaves the one and enters the other.
            stub, style = 0.42 * layout.step, ACROSS if cut else INSIDE
            lines.append(f'<path d="M{x:.1f} {y:.1f}h{stub:.1f}M{a - stub:.1f} {b:.1f}H{a:.1f}" fill="none" {style}/>')
            continue
        far = a - x > FAR * layout.step or abs(b - y) > FAR * LANE * layout.size
        if far and (u, plan.stage_of[str(v)]) in seen:
            continue
        seen.add((u, plan.stage_of[str(v)]))
        bend = min(0.12 * (a - x), LANE) if a - x > 1.5 * layout.step else 0.0
        middle = f"Q{(x + a) / 2:.1f} {(y + b) / 2 + bend:.1f} {a:.1f} {b:.1f}"
        lines.append(
            f'<path d="M{x:.1f} {y:.1f} {middle}" fill="none" {ACROSS if cut else INSIDE}'
            + (' opacity="0.18"/>' if far else "/>")
        )
    return lines


def _nodes(plan: Plan, graph: nx.DiGraph, layout: _Layout) -> list[str]:
    """Dots whose area follows the time of the node."""
    times = {node: _seconds(data) for node, data in graph.nodes(data=True)}
    largest = max(times.values()) or 1.0
    dots = []
    for node, (x, y) in layout.points.items():
        stage, data = plan.stage_of[str(node)], graph.nodes[node]
        radius = layout.size * _radius(times[node] / largest)
        title = escape(f"{data.get('label') or node}: stage {stage}, {format_seconds(times[node])}, "
                       f"output {format_bytes(data.get('output_bytes', 0.0))}")
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour(stage)}">'
                    f"<title>{title}</title></circle>")
    return dots


def _labels(plan: Plan, layout: _Layout) -> list[str]:
    """Above each row, where a stage begins or goes on there: its number and its first module in that row."""
    first: dict[tuple[int, int], Node] = {}
    for node in sorted(layout.points, key=lambda node: layout.points[node]):
        first.setdefault((layout.row[node], plan.stage_of[str(node)]), node)
    top = {row: min(y for node, (_, y) in layout.points.items() if layout.row[node] == row)
           for row in set(layout.row.values())}
    labels, end = [], {row: float(WIDTH - MARGIN) for row in top}
    for (row, stage), node in sorted(first.items(), key=lambda item: layout.points[item[1]], reverse=True):
        x, y = layout.points[node][0] - 3, top[row] - 5 - 4.5 * layout.size
        letters = int((end[row] - x) / (0.85 * LETTER)) - len(f"{stage}  ")
        if letters < 0:
            continue
        end[row] = x
        name = _shortened(str(node).partition(":")[0], letters) if letters > 6 else ""
        labels.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="10" fill="{colour(stage, 36)}">'
                      f"{escape(f'{stage} {name}'.strip())}</text>")
    return labels


def _legend(graph: nx.DiGraph, layout: _Layout) -> list[str]:
    """What dots and lines mean, on one line below the graph."""
    largest = max((_seconds(data) for _, data in graph.nodes(data=True)), default=0.0)
    y, x, parts = layout.bottom + 18, float(MARGIN), []
    for radius, text in ((_radius(0.0), "a node that takes no time"),
                         (_radius(1.0), f"one of {format_seconds(largest)}, forward and backward")):
        parts += [
            f'<circle cx="{x + 6:.0f}" cy="{y:.0f}" r="{layout.size * radius:.1f}" fill="#888"/>',
            _text(x + 20, y + 4, text),
        ]
        x += 44 + LETTER * len(text)
    for style, text in (
        (INSIDE, "used in its own stage"),
        (ACROSS, "needed by another stage (cut short: in another row)"),
    ):
        parts += [f'<path d="M{x:.0f} {y:.0f}h26" {style}/>', _text(x + 34, y + 4, text)]
        x += 58 + LETTER * len(text)
    return ['<g class="legend">', *parts, "</g>"]


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="#666">{escape(text)}</text>'


def _radius(share: float) -> float:
    """Radius of the dot of a node that takes ``share`` of the longest time."""
    return 2.2 + 2.8 * share ** 0.5


def _seconds(data: dict) -> float:
    total = 0.0
    for name in ("forward", "backward"):
        value = data.get(name, 0.0)
        total += (min(value.values()) if value else 0.0) if isinstance(value, dict) else value
    return total


def ends(plan: Plan, stage: int, longest: int = 1000) -> str:
    """First and last module of a stage, each by the end of its path that fits into ``longest`` characters."""
    paths = list(dict.fromkeys(name.partition(":")[0] or "(model)" for name in plan.nodes(stage)))
    return " … ".join(_shortened(path, longest) for path in paths[:1] + paths[1:][-1:])


def _shortened(path: str, longest: int) -> str:
    """Without its first modules, or letters, as far as needed."""
    if len(path) <= longest:
        return path
    while "." in path and len(path) > longest - 2:
        path = path.partition(".")[2]
    return ".." + path[max(0, len(path) + 2 - longest):]


def _names(plan: Plan) -> list[str]:
    """What the bars are called: stage, device where there are several kinds, first and last module."""
    several = len({cost.device for cost in plan.stages}) > 1
    return [f"stage {stage}: " + (f"{cost.device[-16:]}, " if several else "") + ends(plan, stage, 28)
            for stage, cost in enumerate(plan.stages)]


def _bars(plan: Plan, top: float) -> tuple[list[str], float]:
    """One bar per stage: forward, backward, link; a line where the bound is."""
    names = _names(plan)
    height, left, right = 18, MARGIN + 12 + LETTER * max(map(len, names)), WIDTH - 330
    scale = (right - left) / (max(max(cost.load, cost.forward + cost.backward + cost.communication)
                                  for cost in plan.stages) or 1.0)
    lines = []
    for stage, cost in enumerate(plan.stages):
        y = top + stage * (height + 6)
        lines.append(f'<text x="{MARGIN}" y="{y + 13:.0f}">{escape(names[stage])}</text>')
        lines += _bar(cost, stage, left, y, scale, height)
        text = (f"{format_seconds(cost.load)}, {cost.num_nodes} nodes, {format_bytes(cost.memory_bytes)}"
                + (f", sends {format_bytes(cost.sent_bytes)}" if cost.sent_bytes else ""))
        lines.append(f'<text x="{right + 8}" y="{y + 13:.0f}">{escape(text)}</text>')
    bottom = top + len(plan.stages) * (height + 6)
    x = left + plan.lower_bound * scale
    lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6:.0f}" y2="{bottom:.0f}" stroke="#c00" '
                 'stroke-dasharray="4 3"/>')
    lines.append(
        f'<text x="{left}" y="{bottom + 16:.0f}" fill="#666">forward (solid), backward (lighter), link (grey); '
        f"dashed: no plan is below {escape(format_seconds(plan.lower_bound))}</text>"
    )
    return lines, bottom + 34


def _bar(cost: StageCost, stage: int, left: float, y: float, scale: float, height: int) -> list[str]:
    parts, x = [], left
    for name, seconds, fill in (
        ("forward", cost.forward, colour(stage)),
        ("backward", cost.backward, colour(stage, 72)),
        ("link", cost.communication, "#999"),
    ):
        parts.append(f'<rect x="{x:.1f}" y="{y:.0f}" width="{seconds * scale:.1f}" height="{height}" fill="{fill}">'
                     f"<title>{name} {escape(format_seconds(seconds))}</title></rect>")
        x += seconds * scale
    return parts
