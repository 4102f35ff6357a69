"""A plan as a picture: the graph coloured by stage, wrapped like text, over bars of the stages' loads."""
from __future__ import annotations

from html import escape

import networkx as nx

from partitioners.graph import topological_order
from partitioners.plan import Plan, StageCost, format_bytes, format_seconds

WIDTH, MARGIN, STEP, LANE = 1200, 40, 11, 11
Point = tuple[float, float]


def colour(stage: int, lightness: int = 52) -> str:
    """Neighbouring stages differ most: hues go round by the golden angle."""
    return f"hsl({(stage * 137.508 + 210) % 360:.0f},62%,{lightness}%)"


def draw(plan: Plan, graph: nx.DiGraph) -> str:
    """The plan as an SVG document. Hovering over a node or bar tells its figures."""
    points, bottom = _layout(graph)
    bars, height = _bars(plan, bottom + 30)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>', _caption(plan), *_edges(plan, graph, points),
        *_nodes(plan, graph, points), *bars, "</svg>"])


def _caption(plan: Plan) -> str:
    proof = "proved optimal" if plan.proved else f"at most {plan.gap:.2%} above the best"
    text = (f"{len(plan.stage_of)} nodes on {plan.num_stages} stages, bottleneck {format_seconds(plan.bottleneck)}, "
            f"{proof}")
    return f'<text x="{MARGIN}" y="24" font-size="15">{escape(text)}</text>'


def _layout(graph: nx.DiGraph) -> tuple[dict, float]:
    """Place by depth, from left to right in wrapped rows; nodes of one depth under each other."""
    depth: dict = {}
    for node in topological_order(graph):
        depth[node] = max((depth[before] + 1 for before in graph.predecessors(node)), default=0)
    per_row = (WIDTH - 2 * MARGIN) // STEP
    columns: dict[int, list] = {}
    for node, level in depth.items():
        columns.setdefault(level, []).append(node)
    rows = [range(start, min(start + per_row, len(columns))) for start in range(0, len(columns), per_row)]
    points, top = {}, 45.0
    for row in rows:
        tallest = max(len(columns[level]) for level in row)
        for level in row:
            for lane, node in enumerate(columns[level]):
                points[node] = (MARGIN + (level - row.start + 0.5) * STEP, top + (lane + 0.5) * LANE)
        top += tallest * LANE + 14
    return points, top


def _edges(plan: Plan, graph: nx.DiGraph, points: dict) -> list[str]:
    """Thin grey inside a stage, dark across a cut; edges over many columns bend below their row."""
    lines = []
    for u, v in graph.edges:
        (x, y), (a, b) = points[u], points[v]
        if abs(b - y) > 40 * LANE or a < x:
            continue
        cut = plan.stage_of[str(u)] != plan.stage_of[str(v)]
        style = 'stroke="#222" stroke-width="1.4"' if cut else 'stroke="#bbb" stroke-width="0.6"'
        bend = min(0.12 * (a - x), LANE) if a - x > 1.5 * STEP else 0.0
        middle = f"Q{(x + a) / 2:.1f} {(y + b) / 2 + bend:.1f} {a:.1f} {b:.1f}"
        lines.append(f'<path d="M{x:.1f} {y:.1f} {middle}" fill="none" {style}/>')
    return lines


def _nodes(plan: Plan, graph: nx.DiGraph, points: dict) -> list[str]:
    """Dots whose area follows the time of the node."""
    times = {node: _seconds(data) for node, data in graph.nodes(data=True)}
    largest = max(times.values()) or 1.0
    dots = []
    for node, (x, y) in points.items():
        stage, data = plan.stage_of[str(node)], graph.nodes[node]
        radius = 2.2 + 2.8 * (times[node] / largest) ** 0.5
        title = escape(f"{data.get('label') or node}: stage {stage}, {format_seconds(times[node])}, "
                       f"output {format_bytes(data.get('output_bytes', 0.0))}")
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour(stage)}">'
                    f"<title>{title}</title></circle>")
    return dots


def _seconds(data: dict) -> float:
    total = 0.0
    for name in ("forward", "backward"):
        value = data.get(name, 0.0)
        total += (min(value.values()) if value else 0.0) if isinstance(value, dict) else value
    return total


def _bars(plan: Plan, top: float) -> tuple[list[str], float]:
    """One bar per stage: forward, backward, link; a line where the bound is."""
    height, left, right = 18, MARGIN + 90, WIDTH - 330
    scale = (right - left) / (max(max(cost.load, cost.forward + cost.backward + cost.communication)
                                  for cost in plan.stages) or 1.0)
    lines = []
    for stage, cost in enumerate(plan.stages):
        y = top + stage * (height + 6)
        lines.append(f'<text x="{MARGIN}" y="{y + 13:.0f}">stage {stage} ({escape(cost.device)})</text>')
        lines += _bar(cost, stage, left, y, scale, height)
        text = (f"{format_seconds(cost.load)}, {cost.num_nodes} nodes, {format_bytes(cost.memory_bytes)}, "
                f"sends {format_bytes(cost.sent_bytes)}")
        lines.append(f'<text x="{right + 8}" y="{y + 13:.0f}">{escape(text)}</text>')
    bottom = top + len(plan.stages) * (height + 6)
    x = left + plan.lower_bound * scale
    lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6:.0f}" y2="{bottom:.0f}" stroke="#c00" '
                 'stroke-dasharray="4 3"/>')
    lines.append(f'<text x="{left}" y="{bottom + 16:.0f}" fill="#666">forward (solid), backward (lighter), link (grey); '
                 f'dashed: no plan is below {escape(format_seconds(plan.lower_bound))}</text>')
    return lines, bottom + 34


def _bar(cost: StageCost, stage: int, left: float, y: float, scale: float, height: int) -> list[str]:
    parts, x = [], left
    for name, seconds, fill in (("forward", cost.forward, colour(stage)), ("backward", cost.backward, colour(stage, 72)),
                                ("link", cost.communication, "#999")):
        parts.append(f'<rect x="{x:.1f}" y="{y:.0f}" width="{seconds * scale:.1f}" height="{height}" fill="{fill}">'
                     f"<title>{name} {escape(format_seconds(seconds))}</title></rect>")
        x += seconds * scale
    return parts
