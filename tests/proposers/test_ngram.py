# SPDX-License-Identifier: Apache-2.0
"""Drafts from the request's own text: what is found, and that engines with it stay exact."""

import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams

from helpers.distributions import LENGTHS, assert_prefixes_follow
from helpers.engines import (
    engine,
    greedy_params,
    model_runner,
    plain_engine,
    plain_greedy,
    token_ids,
)
from helpers.metrics import spec_metrics, spechub_metrics
from helpers.oracle import tokens_of
from helpers.pair import PROMPTS, TARGET
from helpers.third_party import RULE, installed_examples
from vllm_spechub.integration.platforms import PLATFORMS
from vllm_spechub.proposers.ngram import (
    NUM_PLACES,
    Continuations,
    NgramOptions,
    NgramProposer,
    find_continuations,
    tree_of,
)
from vllm_spechub.rules.draft_state import DraftBuffers, DraftState
from vllm_spechub.rules.kernel_rule import PORTABLE_KERNELS
from vllm_spechub.trees.tree import TokenTree

WIDE = [0, 0, 0, 0, 1, 1, 2, 5]
TREES = ["chain:4", "binary:3", "kary:4:2", "caterpillar:5:3", WIDE]
OWN_TEXT = {"draft": None, "spec": {"proposer": "ngram"}}
REPEATING = PROMPTS[5] + "a, b"


def state_of(tree, device="cpu") -> DraftState:
    trees = {TokenTree.parse(tree): 8}
    (state,) = DraftBuffers(trees, 8, 16, torch.float32, torch.device(device), True).states
    return state


def plain_continuations(text: list[int], depth: int, options: NgramOptions):
    """Agreeing tokens and continuation of every place, the best first."""
    root, places = len(text) - 1, []
    for place in range(root):
        agreeing = 0
        while (
            agreeing < min(options.prompt_lookup_max, place + 1)
            and text[place - agreeing] == text[root - agreeing]
        ):
            agreeing += 1
        if agreeing >= options.prompt_lookup_min:
            places.append((agreeing, place))
    found = []
    for agreeing, place in sorted(places, reverse=True)[:NUM_PLACES]:
        copy = list(text)
        for step in range(depth):
            copy.append(copy[place + 1 + step])
        found.append((agreeing, tuple(copy[len(text) :])))
    return found


def plain_tree(
    text: list[int], tree: TokenTree, options: NgramOptions
) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them were found, node by node, as the documentation says it."""
    found = plain_continuations(text, tree.depth, options)
    paths: dict[int, tuple[int, ...] | None] = {0: ()}  # None below what was not found
    tokens = {}
    for node in range(tree.num_nodes + 1):
        path, count = paths[node], int(tree.num_children[node])
        following = defaultdict(list)
        for rank, (agreeing, continuation) in enumerate(found):
            if count and path is not None and continuation[: len(path)] == path:
                following[continuation[len(path)]].append((agreeing, -rank))

        def merit(token, following=following):
            longest = max(agreeing for agreeing, _ in following[token])
            of_these = [rank for agreeing, rank in following[token] if agreeing == longest]
            return longest, len(of_these), max(of_these)

        children = sorted(following, key=merit, reverse=True)[:count]
        depth = int(tree.depths[node])
        spare = iter(sorted({*range(20)} - {of[depth] for _, of in found if count}))
        for child in range(int(tree.first_child[node]), int(tree.first_child[node]) + count):
            paths[child] = (*path, children[0]) if children else None
            tokens[child] = children.pop(0) if children else next(spare)
    nodes = range(1, tree.num_nodes + 1)
    return [tokens[node] for node in nodes], [paths[node] is not None for node in nodes]


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=40)
        | st.lists(st.integers(0, 12), min_size=1, max_size=40),
        min_size=1,
        max_size=4,
    ),
    tree=st.sampled_from(TREES),
    bounds=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
    behind=st.integers(0, 5),
)
def test_what_is_found(texts, tree, bounds, behind):
    """Against plain Python, in one batch, with something else behind the texts."""
    options = NgramOptions(prompt_lookup_min=bounds[0], prompt_lookup_max=bounds[1])
    width = max(map(len, texts)) + behind
    rows = [(text + text[::-1] + [1] * width)[:width] for text in texts]
    padded = torch.tensor(rows, dtype=torch.int32)
    roots = torch.tensor([len(text) - 1 for text in texts])
    state = state_of(tree)
    found = find_continuations(padded, roots, state.tree.depth, options)
    for r, text in enumerate(texts):
        wanted = plain_continuations(text, state.tree.depth, options)
        held = int((found.lengths[r] > 0).sum())
        assert found.lengths[r, :held].tolist() == [agreeing for agreeing, _ in wanted]
        assert found.tokens[r, :held].tolist() == [list(tokens) for _, tokens in wanted]
    drafted, is_found = (rows.tolist() for rows in tree_of(found, state))
    for r, text in enumerate(texts):
        assert (drafted[r], is_found[r]) == plain_tree(text, state.tree, options)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), tree=st.sampled_from(TREES))
def test_siblings_differ(data, tree):
    """Two hubs with one token would be accepted too often."""
    state = state_of(tree)
    tokens = st.lists(st.integers(0, 9), min_size=state.tree.depth, max_size=state.tree.depth)
    places = data.draw(st.lists(tokens, min_size=NUM_PLACES, max_size=NUM_PLACES))
    lengths = sorted(data.draw(st.lists(st.integers(0, 3), min_size=16, max_size=16)))[::-1]
    found = Continuations(torch.tensor([places]), torch.tensor([lengths], dtype=torch.int32))
    drafted = tree_of(found, state)[0][0].tolist()
    for node, count in enumerate(state.tree.num_children):
        first = int(state.tree.first_child[node])
        assert len(set(drafted[first - 1 : first - 1 + count])) == count


def test_nothing_waits_for_the_device():
    """On a device that holds no values, nothing can be read from it."""
    state = state_of(WIDE, "meta")
    texts = torch.empty(3, 40, dtype=torch.int32, device="meta")
    roots = torch.empty(3, dtype=torch.int64, device="meta")
    found = find_continuations(texts, roots, state.tree.depth, NgramOptions())
    assert [rows.shape for rows in tree_of(found, state)] == [(3, 8)] * 2


def successors(folder: Path) -> str:
    """A target that always writes the token after the last one, the first again after 40."""
    size = 40
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # its layers add nothing
        embedding, output = torch.zeros(2048, 64), torch.zeros(2048, 64)
        embedding[:size, :size] = torch.eye(size)
        output[:size, :size] = 5 * torch.eye(size).roll(1, dims=0)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(output)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / file, folder)
    return str(folder)


@pytest.mark.parametrize("verification", ["traversal", "match"])
def test_a_target_that_copies_is_accepted_in_full(tmp_path, verification):
    prompt = [*range(3, 40), *range(8)]
    params = [
        SamplingParams(temperature=temperature, seed=3, max_tokens=41, ignore_eos=True)
        for temperature in (0, 0.7)
    ]
    with engine(
        "caterpillar:4:2", model=successors(tmp_path), verification=verification, **OWN_TEXT
    ) as llm:
        prompts = [{"prompt_token_ids": prompt}] * 2
        answers = token_ids(llm.generate(prompts, params, use_tqdm=False))
        metrics = spec_metrics(llm)
        buffers = model_runner(llm).speculator.draft_logits
        memory = buffers.states[0].drafts.logits.untyped_storage().nbytes()
    assert answers == [[token % 40 for token in range(8, 49)]] * 2
    # the first token comes from the prompt's step, and each tree gives one more than its depth
    assert metrics["num_drafts"] == 2 * 8
    assert metrics["num_accepted_tokens"] == 2 * 8 * 4
    # one request's rows, for all of them
    assert memory == 4 * 2048 * 4


# They end one after the other, and one of them does not repeat itself.
SEEDED = [
    SamplingParams(temperature=0.6, seed=1, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=2, max_tokens=36, ignore_eos=True, top_k=12),
    SamplingParams(temperature=0.6, seed=3, max_tokens=24, ignore_eos=True, repetition_penalty=1.1),
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(
        temperature=0.7,
        seed=4,
        max_tokens=24,
        structured_outputs=StructuredOutputsParams(regex=r"(a, b, )*[a-z]{4,9}"),
    ),
    SamplingParams(temperature=0.5, seed=5, max_tokens=40, ignore_eos=True, top_p=0.8),
]
TEXTS = [*PROMPTS[:5], REPEATING]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_seeds_beside_others_and_with_match(asynchronous):
    """With `match`, plain decoding's text in every case; also preempted, and under a schedule."""
    with plain_engine() as llm:
        plain = token_ids(llm.generate(TEXTS, SEEDED, use_tqdm=False))
    schedule = [[1, 2, "caterpillar:5:3"], [3, 5, "binary:3"], [6, None, None]]
    settings = {"async_scheduling": asynchronous, "block_size": 32, "num_gpu_blocks_override": 10}
    with engine(schedule, verification="match", **OWN_TEXT, **settings) as llm:
        assert token_ids(llm.generate(TEXTS, SEEDED, use_tqdm=False)) == plain
        metrics = spec_metrics(llm)
        preemptions = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    assert preemptions[0] > 0


def test_greedy_tokens_are_plain_vllms():
    with engine("caterpillar:5:3", verification="traversal", max_model_len=192, **OWN_TEXT) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
        metrics, ours = spec_metrics(llm), spechub_metrics(llm)
        sampled = [params for params in SEEDED if params.structured_outputs is None]
        texts = [TEXTS[i] for i, p in enumerate(SEEDED) if p.structured_outputs is None]
        together = token_ids(llm.generate(texts, sampled, use_tqdm=False))
        alone = [token_ids(llm.generate(texts[i], sampled[i], use_tqdm=False))[0] for i in (0, 4)]
        # to the end of the context
        long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        (output,) = llm.generate(REPEATING, long, use_tqdm=False)
    assert answers == plain_greedy()
    assert metrics["num_accepted_tokens"] > 0.7 * metrics["num_drafts"]
    # not scheduled, as scheduling is synchronous
    assert ours["fallback_steps"]["nothing_found"] > 0
    assert alone == [together[0], together[4]]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 192


@pytest.mark.parametrize("verification", ["traversal", "rrs"])
def test_prefixes_follow_the_target(verification):
    prompt = tokens_of(REPEATING)
    params = [
        SamplingParams(n=600, max_tokens=LENGTHS[-1], ignore_eos=True, **options)
        for options in ({"temperature": 1.0}, {"temperature": 1.4, "top_k": 6})
    ]
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    with engine(WIDE, verification=verification, **OWN_TEXT, **options) as llm:
        prompts = [{"prompt_token_ids": prompt}] * len(params)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.3 * metrics["num_drafts"]
    for output, asked in zip(outputs, params, strict=True):
        assert_prefixes_follow(output, prompt, asked)


def test_the_checked_entry_points_verify_alike(monkeypatch):
    """On CUDA the engine calls `triton_kernels`, which take the shared row of zeros, too."""
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=12, ignore_eos=True)
    tokens = []
    for kernels in (PLATFORMS["cpu"].tree_kernels(), PORTABLE_KERNELS):
        record = replace(PLATFORMS["cpu"], tree_kernels=lambda kernels=kernels: kernels)
        monkeypatch.setitem(PLATFORMS, "cpu", record)
        with engine(WIDE, verification="traversal", **OWN_TEXT) as llm:
            outputs = llm.generate([REPEATING, PROMPTS[2]], params, use_tqdm=False)
            assert spec_metrics(llm)["num_accepted_tokens"] > 0
        tokens.append(token_ids(outputs))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"prompt_lookup_max": 0}, r"\['prompt_lookup_max'\] is 0, allowed: a whole number"),
        ({"prompt_lookup_min": 2.0}, r"\['prompt_lookup_min'\] is 2.0, allowed: a whole number"),
        (
            {"prompt_lookup_min": 7},
            "prompt_lookup_min is 7, allowed: at most prompt_lookup_max",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            r"\['kv_cache_dtype'\] is 'fp8', but proposer 'ngram' loads",
        ),
        ({"sharpening": 1.5}, r"\['sharpening'\] is 1.5, but proposer 'ngram' draws nothing"),
        ({"tree": "auto:14"}, r"\['tree'\] is 'auto:14', but nobody has measured"),
        ({"proposer": "draft_model", "prompt_lookup_max": 3}, r"'prompt_lookup_max'\] is not an"),
    ],
)
def test_options_are_checked(spec, message):
    with (
        pytest.raises(ValueError, match=message),
        engine("binary:2", draft=None, spec={"proposer": "ngram"} | spec),
    ):
        pass


def test_schedules_are_checked():
    for schedule in ([[1, 2, "auto:6"], [3, None, None]], "auto"):
        spec = {"proposer": "ngram", "tree_by_batch_size": schedule}
        message = r"\['tree_by_batch_size'\] is 'auto.*', but nobody has measured"
        with pytest.raises(ValueError, match=message):
            NgramProposer.check_options(spec, None)


def test_rules_that_may_draw_are_refused(tmp_path):
    spec = {"method": "spechub", "proposer": "ngram", "tree": "binary:2", "verification": RULE}
    args = EngineArgs(model=TARGET, dtype="float32", speculative_config=spec)
    message = rf"\['verification'\] is '{RULE}', but proposer 'ngram' draws nothing; allowed: "
    with installed_examples(tmp_path), pytest.raises(ValueError, match=message):
        args.create_engine_config()
