# SPDX-License-Identifier: Apache-2.0
"""Families whose layers are unusual: linear layers that are not partitioned, shared caches."""

import pytest

from helpers import models
from helpers.engines import engine, greedy_params, model_runner, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import PROMPTS, TARGET
from vllm_spechub.integration.memory import weight_bytes

PARAMS = greedy_params(24, ignore_eos=True)


@pytest.mark.parametrize("kind", ["opt-350m", "qwen3-moe"])
def test_drafts_with_layers_that_are_not_partitioned(kind, tmp_path):
    draft = models.family(tmp_path / kind, kind)
    # vLLM loads a mixture of experts beside another only
    target = draft if kind == "qwen3-moe" else TARGET
    with engine(model=target) as llm:
        expected = token_ids(llm.generate(PROMPTS[:2], PARAMS, use_tqdm=False))
    with engine("binary:3", model=target, draft=draft) as llm:
        assert token_ids(llm.generate(PROMPTS[:2], PARAMS, use_tqdm=False)) == expected
        speculator = model_runner(llm).speculator
        assert weight_bytes(speculator.model, speculator.draft_model_config.dtype) > 100_000


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_layers_that_share_a_cache(kind, tmp_path):
    """Each storage is compacted once; the texts are plain vLLM's."""
    model = models.family(tmp_path / kind, kind)
    with engine(model=model) as llm:
        expected = token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    with engine("binary:3", model=model, draft=model) as llm:
        assert token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
        metrics = spec_metrics(llm)
        compactors = model_runner(llm).model_state.compactor.compactors
        groups = [[view.data_ptr() for view in compact.kv_views] for _, compact in compactors]
    # in each group of alike layers one with a cache of its own, keys and values, and one without
    assert [(len(group), len(set(group))) for group in groups] == [(2, 2)] * 2
    assert metrics["num_accepted_tokens"] > 0.5 * metrics["num_drafts"]
