"""Curves as SVG, written by hand, which a browser or a Hub page shows."""

import math
from html import escape
from itertools import cycle

from data import InputError, leaf
from data.formats.files import write_atomically

WIDTH, LEFT, RIGHT, TOP = 720, 64, 24, 64  # of a picture and of its margins, in pixels
COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280", "#718096")


def line_chart(path, title, x_label, lines, ticks=None):
    """Draw curves from 0 upwards, or from the lowest below it, without what is not finite.

    lines: {name: [(x, y), ...]}; ticks: {x: text below it}, in place of round numbers
    """
    height, bottom = 300, 300 + TOP
    lines = {name: [p for p in line if math.isfinite(p[1])] for name, line in lines.items()}
    points = [(0, 0), *(point for line in lines.values() for point in line)]
    x_step, x_top = round_scale(max(x for x, _ in points))
    top, low = max(y for _, y in points), min(y for _, y in points)
    y_step, _ = round_scale(max(top, -low))
    y_top, y_low = y_step * max(1, math.ceil(top / y_step)), y_step * math.floor(low / y_step)

    def place(x, y):
        part = (y - y_low) / (y_top - y_low)
        return LEFT + x / x_top * (WIDTH - LEFT - RIGHT), bottom - part * height

    shapes = []
    for i in range(round(y_low / y_step), round(y_top / y_step) + 1):
        _, y = place(0, i * y_step)
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        shapes.append(f'<line {ends} stroke="#e2e8f0"/>')
        shapes.append(label(LEFT - 8, y + 4, f"{i * y_step:g}", "end"))
    round_numbers = {i * x_step: f"{i * x_step:g}" for i in range(round(x_top / x_step) + 1)}
    for x, text in (ticks or round_numbers).items():
        shapes.append(label(place(x, 0)[0], bottom + 18, text, "middle"))
    shapes.append(label(WIDTH - RIGHT, bottom + 36, x_label, "end"))
    for colour, curve in zip(cycle(COLOURS), lines.values()):
        corners = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        style = f'fill="none" stroke="{colour}" stroke-width="2"'
        shapes.append(f'<polyline points="{corners}" {style}/>')
    write_svg(path, title, lines, shapes, bottom + 48)


def round_scale(top):
    """A round step of some five to `top`, and the end of the last: 37 -> 10, 40."""
    power = 10.0 ** math.floor(math.log10(max(top, 1e-9) / 5))
    step = next(s * power for s in (1, 2, 5, 10) if s * power * 5 >= top)
    return step, max(step, step * -(-top // step))


def label(x, y, text, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(str(text))}</text>'


def write_svg(path, title, names, shapes, height):
    """Put a title, a legend and a white ground to the shapes, and write the file, or say that it
    cannot be written: a picture does not end a run."""
    x, legend = LEFT, []
    for colour, name in zip(cycle(COLOURS), names):
        legend.append(f'<rect x="{x}" y="36" width="10" height="10" fill="{colour}"/>')
        legend.append(label(x + 15, 45, name))
        x += 35 + 7 * len(name)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
    style = 'font-family="sans-serif" font-size="12" fill="#2d3748"'
    text = leaf("command").printable("\n".join([
        f'{head} {style}>', '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *legend, *shapes, "</svg>\n",
    ]))
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except InputError as error:
        print(f"warning: {error}", flush=True)
