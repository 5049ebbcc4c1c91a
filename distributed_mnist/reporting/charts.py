"""Draw line charts as SVG text. The page's style sheet decides the colors, so that dark pages work."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 10, 38
_MAX_POINTS = 600
"""The most points drawn per line: a screen shows no more, and the page of a long run stays small."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    """The number of the color in the style sheet."""
    faint: bool = False
    """Drawn behind the others and not named: for raw values behind smoothed ones."""
    dots: bool = False
    """Mark each point."""


def line_chart(
    lines: Sequence[Line], *, x: str, y: Callable[[float], str], log: bool = False, title: str = ""
) -> Markup:
    """Draw these lines over the same axes, the horizontal one from 0; empty if there is nothing to draw.

    `x` names the horizontal axis, `y` formats a value of the vertical one, `log` makes the vertical axis
    logarithmic.
    """
    drawn = [line for line in (_drawable(line, log) for line in lines) if line.points]
    if not drawn:
        return Markup()
    xs = [point[0] for line in drawn for point in line.points]
    ys = [point[1] for line in drawn for point in line.points]
    left, right = min(0.0, *xs), max(*xs, 1e-9)
    scale = math.log10 if log else float
    ticks = (_decades if log else _ticks)(min(ys), max(ys))
    low, high = scale(min(ticks[0], *ys)), scale(max(ticks[-1], *ys))
    high = max(high, low + 1e-12)

    def pixels(point: tuple[float, float]) -> str:
        across = _LEFT + (point[0] - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - (scale(point[1]) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    # The script of the page computes values from pixels with these.
    frame = {"left": left, "right": right, "low": low, "high": high, "log": "1" if log else "", "x": x}
    frame |= {"width": WIDTH, "height": HEIGHT}
    frame |= {"before": _LEFT, "after": _RIGHT, "above": _TOP, "below": _BOTTOM}
    data = " ".join(f'data-{name}="{escape(value)}"' for name, value in frame.items())
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img" aria-label="{escape(title)}" {data}>'
    ]
    for tick in ticks:
        down = pixels((left, tick)).partition(",")[2]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{down}" dy=".32em">{escape(y(tick))}</text>')
    for tick in _ticks(left, right, 6):
        if not left <= tick <= right:
            continue
        across = pixels((tick, ticks[0])).partition(",")[0]
        parts.append(f'<text class="tick low" x="{across}" y="{HEIGHT - 20}">{_plain(tick)}</text>')
    parts.append(
        f'<text class="axis" x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x)}</text>'
    )
    for line in sorted(drawn, key=lambda line: not line.faint):
        path = " ".join(map(pixels, line.points))
        style = f"c{line.color % 8}{' faint' if line.faint else ''}"
        if len(line.points) > 1:
            attributes = f'class="line {style}" data-name="{escape(line.name)}"'
            parts.append(f'<polyline {attributes} points="{path}"/>')
        if line.dots or len(line.points) == 1:
            for point in line.points:
                across, _, down = pixels(point).partition(",")
                tooltip = f"{line.name}, {x} {_plain(point[0])}: {y(point[1])}"
                parts.append(
                    f'<circle class="dot {style}" cx="{across}" cy="{down}" r="3.5">'
                    f"<title>{escape(tooltip)}</title></circle>"
                )
    parts.append("</svg>")
    return Markup("".join(parts))


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return the running mean over `window` points, each at the middle of its window."""
    if window < 2 or len(points) < window:
        return list(points)
    values = np.array([value for _, value in points])
    means = np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1).tolist()
    middle = window - 1 - window // 2
    return [(points[middle + i][0], mean) for i, mean in enumerate(means)]


def _drawable(line: Line, log: bool) -> Line:
    """Drop points that cannot be drawn; if there are too many points, average neighbours."""
    points = [p for p in line.points if math.isfinite(p[1]) and (p[1] > 0 or not log)]
    group_size = -(-len(points) // _MAX_POINTS)
    if group_size > 1:
        groups = [points[i : i + group_size] for i in range(0, len(points), group_size)]
        points = [(group[-1][0], math.fsum(value for _, value in group) / len(group)) for group in groups]
    return replace(line, points=points)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round values that span from `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten that span `low` to `high`; over few decades also 2 and 5 times those."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = max([tick for tick in ticks if tick <= low], default=ticks[0])
    above = min([tick for tick in ticks if tick >= high], default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.3g}"
