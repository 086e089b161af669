# SPDX-License-Identifier: Apache-2.0
"""Models whose exits are trained together: what an exit gives, and that a seed decides the rest."""

import itertools
import json

import pytest
import torch
import train_demo_pair
from train_exit_target import rotating_weights
from train_nested_draft import exit_logits, exits_loss, load, overlaps, sorted_weights
from transformers import AutoTokenizer

from helpers.oracle import reference_exit
from helpers.pair import DRAFT, EXIT_TARGET, NESTED, PAIR, TARGET


def test_an_exit_is_what_an_engine_runs():
    tokens = torch.arange(40).view(2, 20) * 7
    draft = load(NESTED).requires_grad_(False)
    for layers, logits in zip((3, 12), exit_logits(draft, tokens, (3, 12)), strict=True):
        wanted = reference_exit(NESTED, layers)(input_ids=tokens).logits
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_weights_of_exits():
    assert sorted_weights([3, 6, 12])() == {3: 0.25, 6: 0.25, 12: 0.5}
    weights = rotating_weights([2, 4], 8)
    assert [next(iter(weights())) for _ in range(4)] == [2, 4, 2, 4]


def test_training_is_determined_by_the_seed():
    teacher = load(TARGET).requires_grad_(False)

    def train() -> dict[str, torch.Tensor]:
        draft = load(DRAFT)
        generator = torch.Generator().manual_seed(3)
        batches = train_demo_pair.windows(torch.arange(900) % 700, 2, 20, generator)
        batches = itertools.repeat(next(batches))
        losses: list[float] = []
        of_batch = exits_loss(draft, teacher, sorted_weights([3, 12]))

        def loss(batch):
            losses.append(of_batch(batch))
            return losses[-1]

        with train_demo_pair.progress_bars() as progress:
            train_demo_pair.fit("draft", draft, loss, batches, 5, 2e-3, progress)
        assert losses[-1] < losses[0]
        return draft.state_dict()

    first, again = train(), train()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("folder", "exits"), [(NESTED, [3, 12]), (EXIT_TARGET, [2, 4])])
def test_exits_are_as_good_as_the_card_says(folder, exits):
    """On a few texts of the demo prompts instead of held-out files."""
    model = load(folder).requires_grad_(False).eval()
    target = load(TARGET).requires_grad_(False).eval() if folder == NESTED else model
    card = json.loads((PAIR / folder / "card.json").read_text())["overlap_by_exit"]
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (PAIR / "study_prompts.jsonl").read_text().splitlines()
    stream = train_demo_pair.encode(tokenizer, [json.loads(line)["turns"][0] for line in lines])
    found = overlaps(model, target, train_demo_pair.evenly_spaced(stream, 64, 16), exits)
    for layers, overlap in found.items():
        assert overlap == pytest.approx(card[str(layers)], abs=0.08)
