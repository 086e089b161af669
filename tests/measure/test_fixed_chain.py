# SPDX-License-Identifier: Apache-2.0
"""The correction that comparisons with vLLM's own chain on the CPU rest on."""

import sys
from importlib import import_module

import pytest
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.plugins import load_general_plugins

from helpers.distributions import LENGTHS, SAMPLES, assert_prefixes_follow
from helpers.engines import engine
from helpers.metrics import spec_metrics
from helpers.pair import DRAFT, PROMPTS, TARGET

FIXED_CHAIN = "vllm_spechub.measure.benchmark.fixed_chain"
CHAIN = {
    "method": "draft_model",
    "model": DRAFT,
    "num_speculative_tokens": 3,
    "draft_sample_method": "probabilistic",
}


@pytest.fixture(autouse=True)
def _not_yet_imported(monkeypatch):
    """It registers its kernel when a worker imports it, which must be after vLLM's own, and after
    the plugin: vLLM alone cannot register kernels where Numba has been imported."""
    load_general_plugins()
    monkeypatch.delitem(sys.modules, FIXED_CHAIN, raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[3, 0, 1, 5, 0, 0, 2], [0, 0], [4], [0, 7, 0]])
def test_expand_kernel(counts, dtype):
    expand_kernel = import_module(FIXED_CHAIN).expand_kernel
    values = torch.arange(len(counts)).to(dtype)  # the first one, 0, is replaced
    output = torch.full((sum(counts) + 2,), -7, dtype=dtype)
    cumulative = torch.tensor(counts, dtype=torch.int32).cumsum(0).to(torch.int32)

    expand_kernel(output, values, cumulative, 0, 1, MAX_NUM_TOKENS=32)

    expected = []
    for value, count in zip(values.tolist(), counts, strict=True):
        expected += [1 if value == 0 else value] * count
    assert output.tolist() == [*expected, -7, -7]
    assert output.dtype == dtype


def test_expand_kernel_keeps_fractions():
    expand_kernel = import_module(FIXED_CHAIN).expand_kernel
    values = torch.tensor([0.7, 0.0, 1.3])
    output = torch.zeros(4)
    expand_kernel(output, values, torch.tensor([2, 3, 4], dtype=torch.int32), 0, 1)
    torch.testing.assert_close(output, torch.tensor([0.7, 0.7, 1.0, 1.3]), rtol=0, atol=0)


def test_the_chain_follows_the_target():
    prompt = AutoTokenizer.from_pretrained(TARGET)(PROMPTS[4])["input_ids"]
    params = SamplingParams(n=SAMPLES, max_tokens=LENGTHS[-1], temperature=0.7, ignore_eos=True)
    with engine(
        speculative_config=CHAIN,
        worker_extension_cls=f"{FIXED_CHAIN}.FixedChain",
        max_num_seqs=128,
        max_num_batched_tokens=4096,
    ) as llm:
        output = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 0.5 * metrics["num_drafts"]
    assert_prefixes_follow(output, prompt, params)
