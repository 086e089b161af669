# SPDX-License-Identifier: Apache-2.0
"""Chi-square tests of what engines emit against the target's exact distribution."""

from collections import Counter

import torch
from scipy.stats import chisquare
from vllm import SamplingParams

from helpers.oracle import processed_row, reference_model, resolved
from helpers.pair import TARGET

SAMPLES = 3000
LENGTHS = (2, 3, 4)  # the first token comes from the prompt's step, the others from trees


def next_token(
    prompt: list[int], prefixes: list, params: SamplingParams, model: str = TARGET
) -> torch.Tensor:
    """A target's exact distribution after each prefix. [num_prefixes, vocab_size]"""
    rows = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
    logits = reference_model(model)(input_ids=rows).logits[:, -1].double()
    processed = [
        processed_row(row, prompt, list(prefix), params)
        for row, prefix in zip(logits, prefixes, strict=True)
    ]
    return torch.stack(processed).double().softmax(-1)


def likely_prefixes(
    prompt: list[int], params: SamplingParams, length: int, floor: float, distribution=next_token
) -> dict[tuple[int, ...], float]:
    """Every prefix of `length` tokens that is more probable than `floor`, with its probability."""
    prefixes = {(): 1.0}
    for _ in range(length):
        probs = distribution(prompt, list(prefixes), params)
        longer = {}
        for (prefix, mass), row in zip(prefixes.items(), probs, strict=True):
            joint = row * mass
            for token in torch.nonzero(joint > floor).flatten().tolist():
                longer[(*prefix, token)] = joint[token].item()
        prefixes = longer
    return prefixes


def assert_prefixes_follow(
    output, prompt: list[int], params: SamplingParams, distribution=next_token
) -> None:
    """Compare emitted prefixes of every length with the target's distribution, by chi-square."""
    params, samples = resolved(params), len(output.outputs)
    for length in LENGTHS:
        expected = likely_prefixes(prompt, params, length, 10 / samples, distribution)
        counts = Counter(tuple(sample.token_ids[:length]) for sample in output.outputs)
        observed = [counts[prefix] for prefix in expected]
        wanted = [mass * samples for mass in expected.values()]
        observed.append(samples - sum(observed))  # every other prefix, in one bin
        wanted.append(max(samples - sum(wanted), 1e-9))
        if wanted[-1] < 5:
            if wanted[-1] < 1e-6 * samples:
                assert observed[-1] == 0  # nothing else is possible
            observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
        p_value = chisquare(observed, wanted).pvalue if len(wanted) > 1 else 1.0
        assert p_value > 1e-4, f"p = {p_value:.2e} over {len(wanted)} prefixes of {length} tokens"
