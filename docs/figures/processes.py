#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draw docs/figures/processes.png: which process does what in a step.

python docs/figures/processes.py
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

GREEN, LIGHT_GREEN = "#1a7f4b", "#d3efe0"
BLUE, LIGHT_BLUE = "#1f5fa8", "#dbe8f7"
GREY, LIGHT_GREY = "#8a8f98", "#f4f5f7"
INK = "#22262e"

# where each process stands, and its width
LANES = {
    "frontend": (0.0, 3.4),
    "engine core": (4.4, 3.6),
    "worker, one for each GPU or rank": (9.0, 4.2),
}
FRONTEND, CORE, WORKER = LANES
TOP, BOTTOM = 0.9, -7.8


def left(name: str) -> float:
    return LANES[name][0] + 0.2


def right(name: str) -> float:
    return sum(LANES[name]) - 0.2


def lane(axis: Axes, name: str) -> None:
    x, width = LANES[name]
    axis.add_patch(
        Rectangle((x, BOTTOM), width, TOP - BOTTOM, facecolor=LIGHT_GREY, edgecolor="none")
    )
    axis.text(
        x + width / 2,
        TOP - 0.25,
        name,
        ha="center",
        va="top",
        fontsize=12,
        weight="bold",
        color=INK,
    )


def box(axis: Axes, name: str, y: float, text: str, ours: bool = True, room: float = 0.2) -> None:
    """A piece of a process's work, centred at y, with some room to its left. The plugin's is
    green."""
    x, width = LANES[name]
    start, width = x + room, width - room - 0.2
    face, line = (LIGHT_GREEN, GREEN) if ours else ("white", GREY)
    style = "round,pad=0,rounding_size=0.12"
    patch = FancyBboxPatch((start, y - 0.45), width, 0.9, style, facecolor=face, edgecolor=line)
    axis.add_patch(patch)
    axis.text(start + width / 2, y, text, ha="center", va="center", fontsize=9.5, color=INK)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": BLUE, "lw": 1.5}
    axis.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def label(axis: Axes, x: float, y: float, text: str) -> None:
    axis.text(x, y, text, ha="center", va="bottom", fontsize=8.5, color=BLUE)


def between(axis: Axes, start: str, end: str, heights: tuple[float, float], text: str) -> None:
    """An arrow from one process to another, with what it carries."""
    rightwards = LANES[start][0] < LANES[end][0]
    sides = (right, left) if rightwards else (left, right)
    points = [(side(name), y) for side, name, y in zip(sides, (start, end), heights, strict=True)]
    arrow(axis, *points)
    label(axis, sum(x for x, _ in points) / 2, max(heights) + 0.08, text)


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(12.5, 8.2))
    for name in LANES:
        lane(axis, name)

    box(axis, FRONTEND, -0.6, "tokenize the prompt,\nhold numbers to the engine's limits")
    box(axis, CORE, -0.6, "schedule: 1 + nodes tokens\nand KV slots for each tree")
    box(axis, WORKER, -0.6, "target: one pass over all roots\nand nodes, with tree attention")
    box(axis, CORE, -2.2, "a grammar mask\nfor every node", room=1.0)
    box(
        axis,
        WORKER,
        -2.2,
        "edit each node's logits by its history,\nverify: accept a path, add a token",
    )
    box(
        axis,
        WORKER,
        -3.8,
        "compact: move the accepted path's\nkeys and values in the target's cache",
    )
    box(axis, FRONTEND, -3.8, "tokens to text, stop strings,\nstream to the client", ours=False)
    box(axis, CORE, -3.8, "append tokens, end requests,\ncount accepted nodes")
    box(axis, FRONTEND, -5.4, "metrics and a log line")
    box(axis, WORKER, -5.4, "draft: read the accepted tokens,\nthen the next tree, level by level")
    box(axis, WORKER, -7.0, "stays here: weights, KV caches,\ndrafted tokens, logits", ours=False)

    between(axis, FRONTEND, CORE, (-0.6, -0.6), "request")
    between(axis, CORE, WORKER, (-0.6, -0.6), "what runs")
    between(axis, CORE, WORKER, (-2.2, -2.2), "masks")
    between(axis, WORKER, CORE, (-3.8, -3.8), "tokens, paths")
    between(axis, CORE, FRONTEND, (-3.8, -3.8), "tokens")
    arrow(axis, (left(CORE) + 1, -4.25), (right(FRONTEND), -5.4))
    label(axis, 3.9, -5.55, "statistics")
    arrow(axis, (left(CORE) + 0.4, -3.35), (left(CORE) + 0.4, -1.05))
    label(axis, left(CORE) + 0.85, -3.1, "next step")
    middle = (left(WORKER) + right(WORKER)) / 2
    for y in (-1.05, -2.65, -4.25):
        arrow(axis, (middle, y), (middle, y - 0.7))
    axis.text(
        0,
        BOTTOM - 0.2,
        "Green: done or changed by the plugin. With asynchronous scheduling, the engine core "
        "schedules the next step while the worker still runs this one.",
        fontsize=9,
        color=GREY,
        va="top",
    )
    axis.set_xlim(-0.1, 13.3)
    axis.set_ylim(BOTTOM - 0.5, TOP + 0.1)
    axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
