"""Stacked bars and histograms as SVG, for the lectures and the account."""

from itertools import cycle

from data.run.charts import COLOURS, LEFT, RIGHT, TOP, WIDTH, label, write_svg


def bar_chart(path, title, bars):
    """Draw a stacked bar a row, with its sum. bars: {name: {part: value}}, all with equal parts"""
    left, right, row = 190, 80, 28
    top = max(sum(parts.values()) for parts in bars.values())
    shapes, y = [], TOP
    for name, parts in bars.items():
        x = left
        for colour, value in zip(cycle(COLOURS), parts.values()):
            width = value / top * (WIDTH - left - right)
            size = f'width="{width:.1f}" height="{row - 8}"'
            shapes.append(f'<rect x="{x:.1f}" y="{y}" {size} fill="{colour}"/>')
            x += width
        shapes.append(label(left - 8, y + 15, name, "end"))
        shapes.append(label(x + 6, y + 15, f"{sum(parts.values()):.3g}"))
        y += row
    write_svg(path, title, next(iter(bars.values())), shapes, y + 16)


def histogram(path, title, counts, marks):
    """Draw how often values from -1 to 1 occur, and below it marks on the same axis.

    counts: of intervals of equal width; marks: {name: [x, ...]}, a row of ticks each
    """
    height, bottom, width = 220, 220 + TOP, (WIDTH - LEFT - RIGHT) / len(counts)
    place = lambda x: LEFT + (x + 1) / 2 * (WIDTH - LEFT - RIGHT)
    shapes = []
    for i, count in enumerate(counts):
        high = count / max(counts) * height
        box = f'x="{LEFT + i * width:.1f}" y="{bottom - high:.1f}" width="{width:.1f}"'
        shapes.append(f'<rect {box} height="{high:.1f}" fill="#cbd5e0"/>')
    for row, (colour, xs) in enumerate(zip(cycle(COLOURS), marks.values())):
        y = bottom + 6 + 24 * row
        for x in map(place, xs):
            style = f'stroke="{colour}" stroke-width="2"'
            shapes.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 18}" {style}/>')
    y = bottom + 24 * len(marks) + 20
    shapes += [label(place(x), y, f"{x:g}", "middle") for x in (-1, -0.5, 0, 0.5, 1)]
    write_svg(path, title, marks, shapes, y + 14)
