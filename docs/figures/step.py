#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draw docs/figures/step.png: one step of the demo pair, with its own tokens and probabilities.

python docs/figures/step.py
"""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from vllm_spechub import TokenTree
from vllm_spechub.offline.explain import Step, node_rows, trace
from vllm_spechub.offline.simulation.texts import ModelPair

ROOT = Path(__file__).parents[2]
PAIR = ROOT / "scripts" / "demo_pair"
PROMPT = "class Reader:\n    def read(self, size):\n        return self."
TREE = TokenTree((0, 0, 1, 1, 2, 2))
SEED = 23  # accepts a path that is not in consecutive slots, so that compaction has work
CONTEXT = 2  # cached tokens before the root that are shown

GREEN, LIGHT_GREEN = "#1a7f4b", "#d3efe0"
BLUE, LIGHT_BLUE = "#1f5fa8", "#dbe8f7"
GREY, LIGHT_GREY = "#8a8f98", "#eef0f3"
INK = "#22262e"


def title(axis: Axes, number: int, name: str, text: str) -> None:
    axis.set_title(f"{number}  {name}", loc="left", fontsize=13, weight="bold", color=INK, pad=26)
    axis.text(0, 1.03, text, transform=axis.transAxes, fontsize=9.5, color=GREY, va="bottom")
    axis.set_axis_off()


def label(axis: Axes, x: float, y: float, text: str, color: str = GREY, **options) -> None:
    options = {"fontsize": 8.5, "ha": "center", "va": "center"} | options
    axis.text(x, y, text, color=color, **options)


def box(
    axis: Axes, x: float, y: float, text: str, face: str, edge: str, note: str = "", size: int = 11
) -> None:
    """A token, centred at (x, y), with a note below it."""
    width, height = (1.2, 0.78 if note else 0.56) if size > 10 else (0.9, 0.56)
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axis.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=face, edgecolor=edge))
    label(axis, x, y + (0.13 if note else 0), text, INK, family="monospace", fontsize=size)
    label(axis, x, y - 0.2, note, fontsize=8)


def places() -> list[tuple[float, float]]:
    """Where each node stands, the root on top."""
    rows = zip(node_rows(TREE), TREE.depths, strict=True)
    return [(1.6 * row, -1.5 * int(depth)) for row, depth in rows]


def tree(axis: Axes, step: Step, verified: bool) -> None:
    """The drafted tree with the draft's probabilities, or the walk through it with both models'."""
    at = places()
    for node, parent in enumerate(TREE.parents, start=1):
        taken = verified and node in step.path
        ends = zip(at[parent], at[node], strict=True)
        axis.plot(*ends, color=GREEN if taken else GREY, lw=2.4 if taken else 1.0, zorder=0)
    face, edge = (LIGHT_GREEN, GREEN) if verified else (LIGHT_GREY, INK)
    box(axis, *at[0], step.root, face, edge)
    for node, seen in enumerate(step.nodes, start=1):
        taken = verified and seen.accepted
        face, edge = (LIGHT_GREEN, GREEN) if taken else ("white", GREY if verified else INK)
        note = f"q {seen.draft_prob:.2f}"
        if verified:
            note += f"  p {seen.target_prob:.2f}"
        box(axis, *at[node], seen.token, face, edge, note)
    for node, (x, y) in enumerate(at):
        label(axis, x - 0.66, y + 0.3, str(node), BLUE, ha="right")
    if verified:
        x, y = at[step.path[-1]]
        axis.plot([x, x], [y, y - 1.35], color=BLUE, lw=2.4, zorder=0)
        box(axis, x, y - 1.35, step.bonus, LIGHT_BLUE, BLUE, f"p {step.bonus_prob:.2f}")
        label(axis, x + 0.75, y - 1.35, "bonus token", BLUE, ha="left")
    axis.set_xlim(-1.1, 5.9)
    axis.set_ylim(-4.9, 0.6)


def mask(axis: Axes, step: Step, root: int) -> None:
    """Who sees whom: a row for each token of the step, a column for each slot."""
    tokens = [step.root, *(seen.token for seen in step.nodes)]
    width, height = CONTEXT + len(tokens), len(tokens)
    for row, (token, path) in enumerate(zip(tokens, TREE.paths, strict=True)):
        y = -row - 0.5
        for column in range(width):
            node = column - CONTEXT
            visible = node < 0 or node in path
            face = (LIGHT_GREY if node < 0 else LIGHT_BLUE) if visible else "white"
            axis.add_patch(Rectangle((column, -row), 1, -1, facecolor=face, edgecolor="#d5d9df"))
            if visible:
                axis.plot(column + 0.5, y, "o", ms=5, color=GREY if node < 0 else BLUE)
        label(axis, -2.0, y, str(row), BLUE)
        label(axis, -0.25, y, token, INK, family="monospace", fontsize=10, ha="right")
        label(axis, width + 0.9, y, str(root + int(TREE.depths[row])), INK, fontsize=10)
    for column in range(width):
        label(axis, column + 0.5, 0.45, str(root - CONTEXT + column))
    label(axis, -2.0, 0.45, "node")
    label(axis, -0.25, 0.45, "slot", ha="right")
    label(axis, width + 0.9, 0.45, "position")
    label(axis, CONTEXT / 2, -height - 0.45, "cached")
    label(axis, CONTEXT + height / 2, -height - 0.45, "this step's slots")
    axis.set_xlim(-2.6, width + 1.9)
    axis.set_ylim(-height - 0.8, 0.9)


def slots(axis: Axes, step: Step, root: int, cached: list[str]) -> None:
    """A request's KV slots as the target wrote them, and after the accepted path has moved."""
    tokens = [step.root, *(seen.token for seen in step.nodes)]
    top, bottom, size = 0.0, -2.2, 9
    label(axis, -0.75, top + 0.55, "slot", ha="right")
    for column in range(CONTEXT + len(tokens)):
        node = column - CONTEXT
        label(axis, column, top + 0.55, str(root + node))
        if node < 0:
            for y in (top, bottom):
                box(axis, column, y, cached[column], LIGHT_GREY, GREY, size=size)
            continue
        face, edge = (LIGHT_GREEN, GREEN) if node in step.path else ("white", GREY)
        box(axis, column, top, tokens[node], face, edge, size=size)
        if node < len(step.path):
            box(axis, column, bottom, tokens[step.path[node]], LIGHT_GREEN, GREEN, size=size)
        elif node == len(step.path):
            box(axis, column, bottom, step.bonus, "white", BLUE, size=size)
        else:
            box(axis, column, bottom, "", "white", "#d5d9df", size=size)
    for slot, node in enumerate(step.path):
        ends = ((CONTEXT + node, top - 0.34), (CONTEXT + slot, bottom + 0.34))
        arrow = FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=12, color=GREEN, lw=1.6)
        axis.add_patch(arrow)
    note = "the bonus token is the next root:\nits slot is written in the next step"
    label(axis, CONTEXT + len(step.path), bottom - 0.45, note, BLUE, ha="left", va="top")
    label(axis, -0.75, top, "after the\nforward pass", ha="right")
    label(axis, -0.75, bottom, "after\ncompaction", ha="right")
    axis.set_xlim(-2.6, CONTEXT + len(tokens) - 0.3)
    axis.set_ylim(bottom - 1.5, top + 0.9)


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pair = ModelPair.load(str(PAIR / "target"), str(PAIR / "draft"), "cpu", torch.float32)
    prompt = pair.encode(PROMPT, 64)
    (step,) = trace(pair, prompt, TREE, "traversal", 1.0, 1, SEED)
    root = len(prompt) - 1
    cached = [pair.tokenizer.decode([token]).strip() for token in prompt[root - CONTEXT : root]]
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 8.8))
    title(axes[0, 0], 1, "Draft", "depth by depth, the rule draws every node's children from q")
    tree(axes[0, 0], step, verified=False)
    title(
        axes[0, 1],
        2,
        "Mask",
        "one pass of the target; a node sees the cache and its ancestors",
    )
    mask(axes[0, 1], step, root)
    emitted = len(step.path)
    title(axes[1, 0], 3, "Verify", f"the rule walks the tree with p and emits {emitted} tokens")
    tree(axes[1, 0], step, verified=True)
    title(
        axes[1, 1], 4, "Compact", "the accepted path's KV moves to where plain decoding writes it"
    )
    slots(axes[1, 1], step, root, cached)
    figure.tight_layout(h_pad=2.2, w_pad=2.5)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
