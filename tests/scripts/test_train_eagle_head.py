# SPDX-License-Identifier: Apache-2.0
"""The demo target's EAGLE-3 head: how it is trained, and that vLLM reads it as training did."""

import itertools
import json

import pytest
import torch
import train_demo_pair
import train_eagle_head
from safetensors.torch import load_file
from train_eagle_head import Head
from transformers import AutoModelForCausalLM

from helpers.engines import engine, greedy_params
from helpers.metrics import spec_metrics
from helpers.pair import PAIR, TARGET

HEAD = PAIR / "eagle3"


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).requires_grad_(False)


def new_head(target) -> Head:
    torch.manual_seed(1)
    return Head(target, torch.arange(5, 2048, 2))


def test_rows_see_what_a_draft_has(target):
    """Row p at a depth depends on the target's states up to p, and on tokens up to p + 1 + depth,
    of which those after p + 1 are the ones that were drafted from p."""
    head, depths, rows = new_head(target).requires_grad_(False), 3, 6
    tokens = torch.randint(0, 2048, (1, rows + depths))
    states, _ = head.read_target(target, tokens)
    before = head(tokens, states, depths)

    def changed(tokens, states) -> list[list[int]]:
        """At each depth, the rows that differ."""
        after = head(tokens, states, depths)
        return [
            torch.nonzero((a - b).abs().amax(dim=(0, 2)) > 1e-5).flatten().tolist()
            for a, b in zip(after, before, strict=True)
        ]

    place = 4
    edited = tokens.clone()
    edited[0, place] = (edited[0, place] + 1) % 2048
    # read as p + 1 + depth' by the row itself, at depth' up to depth, and by later rows as text
    assert changed(edited, states) == [[*range(place - 1 - depth, rows)] for depth in range(depths)]
    edited = states.clone()
    edited[0, place] += 1
    assert changed(tokens, edited) == [[*range(place, rows)]] * depths


def test_training_is_determined_by_the_seed(target, tmp_path):
    def train(folder) -> dict[str, torch.Tensor]:
        head = new_head(target)
        generator = torch.Generator().manual_seed(3)
        batches = train_demo_pair.windows(torch.arange(900) % 700, 2, 20, generator)
        batches = itertools.repeat(next(batches))
        losses: list[float] = []
        of_batch = train_eagle_head.distillation_loss(head, target, 2)

        def loss(batch):
            losses.append(of_batch(batch))
            return losses[-1]

        with train_demo_pair.progress_bars() as progress:
            train_demo_pair.fit("head", head, loss, batches, 6, 4e-3, progress)
        assert losses[-1] < losses[0]
        train_eagle_head.save(head, 2, folder)
        return load_file(folder / "model.safetensors")

    first, again = train(tmp_path / "first"), train(tmp_path / "again")
    assert first.keys() == load_file(HEAD / "model.safetensors").keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["d2t"] + torch.arange(len(first["d2t"])), torch.arange(5, 2048, 2))
    # the target itself is not trained
    assert torch.equal(first["embed_tokens.weight"].float(), target.get_input_embeddings().weight)


def test_vllms_own_chain_accepts_what_the_card_says():
    card = json.loads((HEAD / "card.json").read_text())["greedy_chain"]
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["turns"][0] for line in lines]
    eagle = {"method": "eagle3", "model": str(HEAD), "num_speculative_tokens": 4}
    options = {"max_num_seqs": 12, "enable_prefix_caching": False}
    with engine(speculative_config=eagle, **options) as llm:
        llm.generate(prompts, greedy_params(card["tokens"], ignore_eos=True), use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_drafts"] == card["steps"]
    assert metrics["num_accepted_tokens_per_pos"] == card["accepted_by_depth"]
