# SPDX-License-Identifier: Apache-2.0
"""A draft that is cut after some of its layers: its rows, its cache, and what `tune` chose."""

from functools import partial

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from helpers.distributions import LENGTHS, assert_prefixes_follow, next_token
from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids
from helpers.metrics import spec_metrics
from helpers.oracle import reference_exit, tokens_of
from helpers.pair import DRAFT, EXIT_TARGET, NESTED, PROMPTS, TARGET
from helpers.recording import recorded_nodes, request_of
from vllm_spechub.integration.memory import weight_bytes
from vllm_spechub.proposers.first_layers import marked
from vllm_spechub.trees import measured_schedule

LAYERS = 6


def test_rows_cache_and_distribution():
    """Rows of transformers' first layers; weights and caches of these layers only; plain vLLM's
    greedy tokens, and the target's distribution."""
    prompt = tokens_of(PROMPTS[4])
    params = SamplingParams(n=800, max_tokens=LENGTHS[-1], ignore_eos=True, temperature=0.8)
    options = {"max_num_seqs": 128, "max_num_batched_tokens": 4096}
    spec = {"draft_layers": LAYERS}
    with engine("binary:3", draft=NESTED, spec=spec, verification="traversal", **options) as llm:
        with recorded_nodes() as nodes:
            outputs = llm.generate(PROMPTS, greedy_params(), use_tqdm=False)
        metrics = spec_metrics(llm)
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        runner = model_runner(llm)
        cached = {
            name
            for group in runner.kv_cache_config.kv_cache_groups
            for name in group.layer_names
            if name.startswith("draft_model")
        }
        stored = weight_bytes(runner.speculator.model, torch.float32)
    assert token_ids(outputs) == plain_greedy()
    assert metrics["num_accepted_tokens"] > metrics["num_drafts"]
    assert_prefixes_follow(output, prompt, params, partial(next_token, model=TARGET))
    assert cached == {f"draft_model.model.layers.{i}.self_attn.attn" for i in range(LAYERS)}
    reference = reference_exit(NESTED, LAYERS)
    assert stored == 4 * reference.num_parameters()

    texts = {o.request_id: [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}
    inner = [node for node in nodes if node.draft_logits is not None]
    assert {len(node.path_tokens) for node in inner} == {0, 1, 2}
    for node in inner[::29]:
        text = texts[request_of(node.req_id)][: node.root_position + 1]
        row = reference(input_ids=torch.tensor([[*text, *node.path_tokens]])).logits[0, -1]
        torch.testing.assert_close(node.draft_logits, row, atol=2e-4, rtol=1e-4)


def configured(target=TARGET, **spec):
    load_general_plugins()
    spec = {"method": "spechub", "model": NESTED} | spec
    args = EngineArgs(model=target, dtype="float32", speculative_config=spec)
    return args.create_engine_config()


def test_auto_is_what_was_measured_for_the_target(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with pytest.raises(ValueError, match=r"'draft_layers'\]: no depth .* --draft-layers 3,6,12"):
        configured(draft_layers="auto")
    measured_schedule.keep_layers(TARGET, NESTED, 6)
    measured_schedule.keep_layers(EXIT_TARGET, NESTED, 3)
    for target, layers in ((TARGET, 6), (EXIT_TARGET, 3)):
        config = configured(target, draft_layers="auto")
        assert config.speculative_config.proposer_options == {"draft_layers": layers}
    # a schedule belongs to the depth that it was measured with
    schedule = [[1, 4, "chain:2"], [5, None, None]]
    keep = partial(measured_schedule.keep, TARGET, NESTED, "draft_model", "traversal", schedule)
    keep({"draft_layers": 3})
    with pytest.raises(ValueError, match=r"--draft-layers 6 --prompts"):
        configured(draft_layers="auto", tree_by_batch_size="auto")
    keep({"draft_layers": 6})
    config = configured(draft_layers="auto", tree_by_batch_size="auto").speculative_config
    assert str(config.schedule.trees[0]) == "chain:2"


def test_compiled_code_of_another_depth_is_not_taken():
    """vLLM finds it by its configuration's hash."""
    config = configured().speculative_config.draft_model_config
    hashes = {config.compute_hash(), *(marked(config, k).compute_hash() for k in (3, 6))}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("layers", "more", "message"),
    [
        (0, {}, "is 0, allowed: a whole number from 1 to 12, or 'auto', as"),
        (13, {}, "is 13, allowed: a whole number from 1 to 12, or 'auto', as"),
        ("6", {}, "is '6', allowed: a whole number from 1 to 12"),
        (6, {"proposer": "ngram", "model": None}, "'draft_layers'] is not an option of method"),
    ],
)
def test_refusals(layers, more, message):
    with pytest.raises(ValueError) as error:
        configured(draft_layers=layers, **({"model": DRAFT} | more))
    assert [line for line in str(error.value).splitlines() if message in line]
