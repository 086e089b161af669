# SPDX-License-Identifier: Apache-2.0
"""Pictures of draft trees: what was drafted, how likely it was, and what was accepted.

The steps run `draft_tree` and `verify_tree` on a pair of Hugging Face models, or a model and its
head, so no engine is needed. Each node's path is computed anew from its tokens, which is fast
enough for one prompt.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from vllm_spechub.offline.draft_and_verify import draft_tree, verify_tree
from vllm_spechub.offline.simulation.rows import draft_logits
from vllm_spechub.offline.simulation.texts import ModelPair, PairDescription
from vllm_spechub.trees.drawing import node_rows
from vllm_spechub.trees.level_tree import LevelTree
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.trees.tree import Tree as AnyTree

ACCEPTED, REFUSED, BONUS = "green", "bright_black", "bold cyan"


@dataclass(frozen=True)
class Node:
    """A drafted node, with its token's probabilities after its parent's path."""

    token: str
    draft_prob: float
    target_prob: float
    accepted: bool


@dataclass(frozen=True)
class Step:
    """One step: the tree that was drafted after a root token, and what was accepted of it."""

    tree: TokenTree
    root: str
    nodes: tuple[Node, ...]
    path: tuple[int, ...]
    """The root and the accepted nodes."""
    bonus: str
    """The last token that was emitted, which was not drafted."""
    bonus_prob: float
    """The target's probability of the bonus token, after the path."""

    @property
    def ending(self) -> str:
        """Why verification stopped."""
        if self.tree.num_children[self.path[-1]] == 0:
            return "accepted down to a leaf"
        return f"no child of node {self.path[-1]} was accepted"


def trace(
    pair: ModelPair,
    # [num_tokens] int64
    prompt: torch.Tensor,
    tree: TokenTree | LevelTree,
    rule: str,
    temperature: float,
    num_steps: int,
    seed: int,
) -> list[Step]:
    """Decode some steps from a prompt, and record what each step drafted and accepted.

    Raises:
        ValueError: the models cannot read as many tokens, or so few, or `draft_tree` refuses the
            rule or tree.
    """
    check_length(len(prompt), tree, num_steps, pair.description)
    generator = torch.Generator().manual_seed(seed)
    steps, text = [], prompt
    for _ in range(num_steps):
        step, emitted = _step(pair, text, tree, rule, temperature, generator)
        steps.append(step)
        text = torch.cat([text, emitted])
    return steps


def check_length(
    num_prompt_tokens: int, tree: AnyTree, num_steps: int, pair: PairDescription
) -> None:
    """Raises: ValueError, if the prompt and the steps are longer than the models read, or if there
    is no hidden state before the first root for a head."""
    longest = num_prompt_tokens + num_steps * (tree.depth + 1)
    if longest > pair.max_positions:
        raise ValueError(
            f"the prompt's {num_prompt_tokens} tokens and {num_steps} steps need {longest} "
            f"positions, the models read {pair.max_positions}"
        )
    if pair.head is not None and num_prompt_tokens < 2:
        raise ValueError(
            "the prompt has 1 token, but a head reads the hidden state before its root; give a "
            "longer prompt"
        )


def shown(pair: ModelPair, token: int) -> str:
    """A token's text, with line breaks and the like spelled out."""
    return repr(pair.tokenizer.decode([token]))[1:-1]


@torch.inference_mode()
def _step(pair, text, tree, rule, temperature, generator) -> tuple[Step, torch.Tensor]:
    def probs(
        # [vocab_size]
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """[1, vocab_size]"""
        return torch.softmax(logits.float() / temperature, dim=-1).unsqueeze(0).cpu()

    def draft_probs(prefixes: torch.Tensor) -> torch.Tensor:
        return probs(draft_logits(pair, text, prefixes[0].to(text.device)))

    draft = draft_tree(tree, draft_probs, 1, rule=rule, generator=generator)
    tree = draft.tree_of(0)
    tokens = [int(text[-1]), *draft.tokens[0].tolist()]
    below = [text.new_tensor([tokens[n] for n in path[1:]]) for path in tree.paths]
    whole = [torch.cat([text, path]).unsqueeze(0) for path in below]
    target = torch.cat([probs(pair.target(input_ids=each).logits[0, -1]) for each in whole])
    emitted, num_tokens = verify_tree(draft, target.unsqueeze(0), rule=rule, generator=generator)
    emitted = emitted[0, : int(num_tokens)]

    path = [0]
    for token in emitted[:-1].tolist():
        first = int(tree.first_child[path[-1]])
        path.append(tokens.index(token, first))  # of equal siblings only the first is accepted
    spoken = [shown(pair, token) for token in tokens]
    draft_rows = draft.logits[0].exp()
    nodes = tuple(
        Node(
            spoken[node],
            float(draft_rows[draft.tree.internal_index[parent], tokens[node]]),
            float(target[parent, tokens[node]]),
            node in path,
        )
        for node, parent in enumerate(tree.parents, start=1)
    )
    bonus = int(emitted[-1])
    step = Step(
        tree,
        spoken[0],
        nodes,
        tuple(path),
        shown(pair, bonus),
        float(target[path[-1], bonus]),
    )
    return step, emitted.to(text.device)


def render(steps: list[Step], console: Console) -> None:
    """Print every step as a tree of text. A recording console can then save it as HTML."""
    for number, step in enumerate(steps, start=1):
        drawn = Tree(Text(step.root, style="bold"), guide_style=REFUSED)
        branches = {0: drawn}
        for node, (parent, seen) in enumerate(
            zip(step.tree.parents, step.nodes, strict=True), start=1
        ):
            mark = "✓" if seen.accepted else "·"
            label = Text(f"{mark} {seen.token}", style=ACCEPTED if seen.accepted else REFUSED)
            label.append(f"   q {seen.draft_prob:.3f}  p {seen.target_prob:.3f}", style="dim")
            branches[node] = branches[parent].add(label)
        branches[step.path[-1]].add(Text(f"+ {step.bonus}   p {step.bonus_prob:.3f}", style=BONUS))
        console.print(Text(f"step {number} emits {len(step.path)}: {step.ending}"))
        console.print(drawn)


def save_picture(steps: list[Step], path: Path) -> None:
    """Draw every step's tree into one PNG file, the roots on the left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [node_rows(step.tree) for step in steps]
    figure, axes = plt.subplots(
        len(steps),
        1,
        figsize=(3.0 * (steps[0].tree.depth + 1.4), sum(0.3 * max(each) + 1.0 for each in rows)),
        squeeze=False,
    )
    for number, (axis, step, heights) in enumerate(zip(axes[:, 0], steps, rows, strict=True), 1):
        places = [(depth, -row) for depth, row in zip(step.tree.depths, heights, strict=True)]
        _put(axis, places[0], step.root, "black", "bold")
        for node, (parent, seen) in enumerate(
            zip(step.tree.parents, step.nodes, strict=True), start=1
        ):
            color = "tab:green" if seen.accepted else "0.6"
            ends = zip(places[parent], places[node], strict=True)
            axis.plot(*ends, color=color, linewidth=1, zorder=0)
            label = f"{seen.token}  q {seen.draft_prob:.2f} p {seen.target_prob:.2f}"
            _put(axis, places[node], label, color, "bold" if seen.accepted else "normal")
        axis.set_title(
            f"step {number} emits {len(step.path)}: {step.ending}; then "
            f"{step.bonus!r} (p {step.bonus_prob:.2f})",
            fontsize=9,
            loc="left",
        )
        axis.set_xlim(-0.1, step.tree.depth + 1.2)
        axis.set_ylim(-max(heights) - 0.8, 0.8)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _put(axis, place: tuple[float, float], text: str, color: str, weight: str) -> None:
    axis.text(
        *place,
        text,
        color=color,
        fontsize=8,
        weight=weight,
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
