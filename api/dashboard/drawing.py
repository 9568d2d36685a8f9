"""Geometry of the inline SVG: pure functions from numbers to paths."""

from collections.abc import Sequence

from api.dashboard.contexts import Curve

LEFT, RIGHT, TOP, BOTTOM = 62.0, 1152.0, 12.0, 178.0
"""The plot's edges inside a view box of 1160 x 204; the rest holds labels."""
MOST_POINTS = 300
HEAT_STEPS = 20


def heat(score: float) -> int:
    """Colour step of a score in [0, 1]."""
    return round(min(1.0, max(0.0, score)) * HEAT_STEPS)


def curve(points: Sequence[tuple[int, float]], name: str) -> Curve | None:
    """`points` are (step, value), steps rising. None below two points: there is no line to draw."""
    if len(points) < 2:
        return None
    shown = _thinned(points)
    first, last = shown[0][0], shown[-1][0]
    values = [value for _, value in shown]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0

    def x(step: int) -> float:
        return LEFT + (RIGHT - LEFT) * (step - first) / max(1, last - first)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / spread if high > low else (TOP + BOTTOM) / 2

    line = " ".join(
        f"{'M' if index == 0 else 'L'}{x(step):.1f},{y(value):.1f}"
        for index, (step, value) in enumerate(shown)
    )
    return Curve(
        line=line,
        area=f"{line} L{x(last):.1f},{BOTTOM:.1f} L{x(first):.1f},{BOTTOM:.1f} Z",
        last_x=round(x(last), 1),
        last_y=round(y(values[-1]), 1),
        last=f"{values[-1]:.3g}",
        top=f"{high:.3g}",
        bottom=f"{low:.3g}",
        first_step=first,
        last_step=last,
        description=f"{name} from {values[0]:.3g} at step {first} to {values[-1]:.3g} at step {last}",
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS points, each the mean of its stretch; the newest point stays exact."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = -(-len(points) // (MOST_POINTS - 1))
    body, last = points[:-1], points[-1]
    means = []
    for start in range(0, len(body), stretch):
        part = body[start : start + stretch]
        means.append((part[-1][0], sum(value for _, value in part) / len(part)))
    return [*means, last]
