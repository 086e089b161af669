# SPDX-License-Identifier: Apache-2.0
"""The rule in `examples/`, in a real engine."""

import pytest
from vllm import SamplingParams

from helpers.engines import engine, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import PROMPTS
from helpers.third_party import RULE, installed_examples


def generate(llm, **options):
    params = SamplingParams(max_tokens=24, ignore_eos=True, **options)
    return token_ids(llm.generate(PROMPTS, params, use_tqdm=False))


def test_another_packages_rule_in_the_engine(tmp_path):
    with engine() as llm:
        greedy = generate(llm, temperature=0)
    with installed_examples(tmp_path):
        with engine("kary:3:2", verification=RULE) as llm:
            assert generate(llm, temperature=0) == greedy
            sampled = generate(llm, temperature=0.8, seed=3)
            assert generate(llm, temperature=0.8, seed=3) == sampled != greedy
            assert spec_metrics(llm)["num_accepted_tokens"] > 0
        with pytest.raises(ValueError, match="sharpening must be 1"):  # noqa: SIM117
            with engine("binary:2", verification=RULE, spec={"sharpening": 2}):
                pass
