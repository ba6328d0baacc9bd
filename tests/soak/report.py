"""Figures of a run: a table for the terminal, a drawing for the eye."""

from collections import Counter
from pathlib import Path

from workload import Outcome

WIDTH, HEIGHT, LEFT, TOP = 860, 180, 60, 26


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(outcomes: list[Outcome]) -> str:
    """Per kind: how many, how they ended, and how long they took."""
    lines = [f"{'kind':<10} {'sent':>7} {'answered':>9} {'429':>6} {'503':>5} {'refused':>8} {'faults':>7}"
             f" {'p50 ms':>8} {'p99 ms':>8} {'TTFT p50':>9} {'TTFT p99':>9}"]
    for kind in sorted({outcome.kind for outcome in outcomes}):
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        statuses = Counter(outcome.status for outcome in own)
        answered = [outcome for outcome in own if outcome.status == 200]
        refused = sum(number for status, number in statuses.items() if isinstance(status, int) and 400 <= status < 500 and status != 429)
        latencies = [1000 * outcome.latency for outcome in answered]
        firsts = [1000 * outcome.first for outcome in answered if outcome.first is not None]
        columns = [quantile(values, share) for values in (latencies, firsts) for share in (0.5, 0.99)]
        shown = [f"{value:.0f}" if value == value else "-" for value in columns]
        faults = sum(outcome.fault is not None for outcome in own)
        lines.append(f"{kind:<10} {len(own):>7} {len(answered):>9} {statuses[429]:>6} {statuses[503]:>5} {refused:>8} {faults:>7}"
                     f" {shown[0]:>8} {shown[1]:>8} {shown[2]:>9} {shown[3]:>9}")
    return "\n".join(lines)


def drawing(samples: list[dict], outcomes: list[Outcome], began: float, path: Path) -> None:
    """Memory, load and latency over time, as an SVG file."""
    end = max(sample["at"] for sample in samples)
    answered = [outcome for outcome in outcomes if outcome.status == 200 and outcome.kind in ("chat", "stream", "compare")]
    step = max(1, len(answered) // 1500)
    dots = [(outcome.began - began, outcome.latency) for outcome in answered[::step]]
    panels = [
        panel(0, "resident memory, MiB", end, lines=[("#2f56bd", [(sample["at"], sample["resident"]) for sample in samples])]),
        panel(1, "waiting requests (brown) and running samples (blue)", end, lines=[
            (color, [(sample["at"], sample[name]) for sample in samples if name in sample])
            for color, name in (("#a3560b", "waiting"), ("#2f56bd", "running"))]),
        panel(2, "seconds from request to the end of its answer", end, dots=dots),
    ]
    height = 3 * (HEIGHT + TOP + 24)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
                    f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n')


def panel(place: int, title: str, end: float, lines=(), dots=()) -> str:
    """One coordinate system with its axis from 0 to the largest value."""
    values = [value for _, points in lines for _, value in points] + [value for _, value in dots]
    top = max(values, default=1) * 1.05 or 1
    floor = TOP + HEIGHT + place * (HEIGHT + TOP + 24)
    at = lambda point: (LEFT + point[0] / end * (WIDTH - LEFT - 12), floor - point[1] / top * HEIGHT)
    parts = [f'<text x="{LEFT}" y="{floor - HEIGHT - 8}">{title}</text>']
    for share in (0, 0.5, 1):
        y = floor - share * HEIGHT
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - 12}" stroke="#ddd"/><text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{share * top:.3g}</text>')
    parts.append(f'<text x="{WIDTH - 12}" y="{floor + 15}" text-anchor="end">{end:.0f} s</text>')
    for color, points in lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
    for x, y in map(at, dots):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.5" fill="#2f56bd" fill-opacity="0.5"/>')
    return "".join(parts)
