"""Draws how something grows with the number of ranks: both axes logarithmic, a line a measure, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 64, 48, 56, 24
COLOURS = ("#3564c4", "#b4552d")


def growth(
    title: str, ranks: Sequence[int], lines: dict[str, Sequence[float]], unit: str, target: float | None
) -> str:
    """An SVG of positive values over ranks. lines: values in `unit` by name, as many as ranks. target: a level that must
    not be passed."""
    every = [value for values in lines.values() for value in values] + ([] if target is None else [target])
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    first, last = math.log2(min(ranks)), math.log2(max(ranks))

    def x(count: float) -> float:
        return LEFT + (math.log2(count) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14" fill="#222">{title}</text>',
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#444">{10.0**power:g} {unit}</text>',
        ]
    for count in ranks:
        parts.append(
            f'<text x="{x(count):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#444">{count:,}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end" fill="#444">ranks</text>')
    if target is not None:
        at = y(target)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#888" stroke-dasharray="5 4"/>',
            f'<text x="{LEFT + 6}" y="{at - 5:.1f}" fill="#555">target {target:g} {unit}</text>',
        ]
    for number, (name, values) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(x(count), y(value)) for count, value in zip(ranks, values, strict=True)]
        parts.append(
            f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"><title>{name}, {count:,} ranks: {value:.2f} {unit}</title></circle>'
            for (a, b), count, value in zip(points, ranks, values, strict=True)
        ]
        parts.append(f'<text x="{LEFT + 220 * number}" y="42" fill="{colour}">● {name}</text>')
    return "\n".join([*parts, "</svg>", ""])
