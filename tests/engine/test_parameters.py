# SPDX-License-Identifier: Apache-2.0
"""Every sampling parameter with trees, alone and mixed in one batch: rows, tokens, logprobs.

Tokens and logprobs are compared with plain vLLM's; every tree node's processed row with what the
parameters make of that node's own path (`oracle.py`).
"""

from functools import cache
from itertools import chain

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams

from helpers.engines import engine, logprob_rows, model_runner, plain_engine
from helpers.oracle import (
    REASONING,
    Repel,
    assert_plausible,
    assert_same_row,
    processed_row,
    resolved,
    tokens_of,
)
from helpers.pair import PROMPTS
from helpers.recording import recorded_nodes, request_of

OPTIONS = {"max_logprobs": -1, "reasoning_config": REASONING}
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
NEWLINE, SELF, ASSIGN = 199, 289, 278


def greedy(**options):
    return SamplingParams(temperature=0, **{"max_tokens": 24} | options)


def sampled(seed, **options):
    return SamplingParams(seed=seed, **{"max_tokens": 24, "ignore_eos": True} | options)


GREEDY = {
    "nothing": greedy(),
    "penalties": greedy(**PENALTIES),
    "negative penalties": greedy(presence_penalty=-0.5, repetition_penalty=0.8),
    "logit_bias": greedy(logit_bias={ASSIGN: -100.0, SELF: 5.0, NEWLINE: -2.5}),
    "allowed_token_ids": greedy(allowed_token_ids=list(range(1, 900, 2))),
    "bad_words": greedy(bad_words=["_header", "line):", " string", "return None"]),
    "min_tokens": greedy(min_tokens=17, stop_token_ids=[NEWLINE, ASSIGN, 11], **PENALTIES),
    "stop": greedy(stop=["self", "\n\n"], min_tokens=6),
    "stop, included": greedy(stop=["self", "\n"], include_stop_str_in_output=True),
    "stop_token_ids": greedy(stop_token_ids=[NEWLINE], skip_special_tokens=False),
    "max_tokens": greedy(max_tokens=6, ignore_eos=True),
    "repetition": greedy(
        max_tokens=60,
        ignore_eos=True,
        repetition_detection=RepetitionDetectionParams(
            max_pattern_size=6, min_pattern_size=1, min_count=2
        ),
    ),
    "thinking": greedy(thinking_token_budget=5),
    "no thinking": greedy(thinking_token_budget=0, detokenize=False),
    "logprobs": greedy(logprobs=4, prompt_logprobs=2),
    "all logprobs": greedy(logprobs=-1, max_tokens=6, **PENALTIES),
    "flat logprobs": greedy(logprobs=0, prompt_logprobs=0, flat_logprobs=True),
    "logprob_token_ids": greedy(logprob_token_ids=[3, NEWLINE, SELF]),
    "all together": greedy(
        logit_bias={ASSIGN: -3.0},
        allowed_token_ids=list(range(5, 1029)),
        bad_words=["self", "key in"],
        min_tokens=20,
        stop_token_ids=[NEWLINE],
        thinking_token_budget=9,
        logprobs=3,
        **PENALTIES,
    ),
}
"""What plain vLLM answers too."""

ALONE = {
    "custom": greedy(extra_args={"repel": 6.0}),
    "custom, sampled": sampled(1, extra_args={"repel": 2.0}, top_p=0.9, **PENALTIES),
    "temperature": sampled(2, temperature=0.7),
    "top_k": sampled(3, temperature=0.9, top_k=7),
    "top_p": sampled(4, temperature=1.1, top_p=0.6),
    "min_p": sampled(5, temperature=0.8, min_p=0.15),
    "one token": sampled(6, top_k=1),
    "everything": sampled(
        7,
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.02,
        logit_bias={SELF: 2.0},
        bad_words=["return None"],
        min_tokens=10,
        thinking_token_budget=6,
        logprobs=3,
        **PENALTIES,
    ),
}
"""What it does not: sampled tokens differ, and its runner for the CPU has other processors."""

CASES = GREEDY | ALONE
IMPORTS = PROMPTS[3]  # it opens the reasoning marker


def text_for(params: SamplingParams, otherwise: str) -> str:
    """A prompt that the parameters have something to do after."""
    if params.stop:
        return PROMPTS[2]
    if params.thinking_token_budget is not None:
        return IMPORTS
    if params.flat_logprobs:
        return PROMPTS[5]  # the longest
    return PROMPTS[0] if params.bad_words else otherwise


TEXTS = [text_for(*pair) for pair in zip(CASES.values(), PROMPTS * 5, strict=False)]


def answers(outputs):
    found = []
    for output in outputs:
        first = output.outputs[0]
        found.append((list(first.token_ids), first.text, first.finish_reason, first.stop_reason))
    return found


@cache
def plain():
    """Plain vLLM's answers to GREEDY, and all logprobs of one prompt."""
    with engine(**OPTIONS) as llm:
        # Its runner for the CPU gives everyone in the batch one request's logprob_token_ids.
        outputs = {}
        for wants_ids in (False, True):
            some = [
                i
                for i, params in enumerate(GREEDY.values())
                if (params.logprob_token_ids is not None) == wants_ids
            ]
            params = [list(GREEDY.values())[i] for i in some]
            found = llm.generate([TEXTS[i] for i in some], params, use_tqdm=False)
            outputs |= dict(zip(some, found, strict=True))
        outputs = [outputs[i] for i in range(len(GREEDY))]
        scores = llm.generate(IMPORTS, greedy(prompt_logprobs=-1, max_tokens=1), use_tqdm=False)
    return answers(outputs), [logprob_rows(o) for o in outputs], logprob_rows(scores[0])


@pytest.fixture(scope="module")
def llm():
    plain()  # one engine at a time
    with engine("binary:3", logits_processors=[Repel], **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def mixed(llm):
    """All cases in one batch. -> (outputs, nodes)"""
    with recorded_nodes() as nodes:
        outputs = llm.generate(TEXTS, list(CASES.values()), use_tqdm=False)
    return outputs, nodes


def test_greedy_answers_equal_plain_vllm(mixed):
    found = dict(zip(CASES, answers(mixed[0]), strict=True))
    for name, expected in zip(GREEDY, plain()[0], strict=True):
        assert found[name] == expected, name
    # the parameters did something
    assert len({tuple(answer[0][:6]) for answer in found.values()}) > 10
    assert found["stop"][3] in ("self", "\n\n")
    assert found["stop, included"][1].endswith(("self", "\n"))
    assert found["repetition"][3] == "repetition_detected"


def test_logprobs_equal_plain_vllm(mixed):
    checked = 0
    for name, output, expected in zip(GREEDY, mixed[0], plain()[1], strict=False):
        rows = logprob_rows(output)
        assert len(rows) == len(expected), name
        for row, wanted in zip(rows, expected, strict=True):
            assert row.keys() == wanted.keys(), name
            np.testing.assert_allclose(
                list(row.values()), [wanted[token] for token in row], atol=1e-4, err_msg=name
            )
            checked += len(row)
    assert checked > 12_000


def test_every_nodes_row_is_its_paths(mixed):
    """The processed row of every node is what plain decoding of its path would draw from."""
    outputs, nodes = mixed
    cases = {o.request_id: (o, resolved(p)) for o, p in zip(outputs, CASES.values(), strict=True)}
    seen = dict.fromkeys(cases, 0)
    for node in nodes:
        request_id = request_of(node.req_id)
        output, params = cases[request_id]
        prompt = list(output.prompt_token_ids)
        history = prompt + list(output.outputs[0].token_ids)
        history = [*history[: node.root_position + 1], *node.path_tokens]
        expected = processed_row(node.logits, prompt, history[len(prompt) :], params)
        assert_same_row(node.processed / (node.temperature or 1.0), expected)
        seen[request_id] += 1
    assert min(seen.values()) >= 15


def test_what_was_emitted_could_be(mixed):
    """Custom processors and sampled requests: every token is the best, or possible, on its path."""
    for output, params in zip(mixed[0], CASES.values(), strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert_plausible(list(output.prompt_token_ids), tokens, params)


def test_a_seed_fixes_the_answer_in_any_batch(llm, mixed):
    """Alone, and with truncated drafts, a request draws what it drew among all the others."""
    for name in ("everything", "min_p", "top_p"):
        i = list(CASES).index(name)
        alone = llm.generate(TEXTS[i], CASES[name], use_tqdm=False)
        assert answers(alone) == answers([mixed[0][i]]), name


def test_several_answers_to_one_prompt(llm):
    params = SamplingParams(n=3, seed=5, temperature=1.0, top_p=0.9, max_tokens=12, logprobs=2)
    first, again = (
        [list(a.token_ids) for a in llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs]
        for _ in range(2)
    )
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 3


def test_scored_prompt_tokens(llm):
    """prompt_logprob_token_ids, which only this runner has, against all of plain's logprobs."""
    wanted = plain()[2][1:]  # past the first token, which nothing predicts
    scored = [[NEWLINE, SELF, 7]] * (len(tokens_of(IMPORTS)) - 1)
    for start in (0, 4):
        params = greedy(
            max_tokens=5,
            prompt_logprob_token_ids=scored[start:],
            prompt_logprob_start=start,
        )
        output = llm.generate(IMPORTS, params, use_tqdm=False)[0]
        found = np.asarray(output.prompt_token_id_logprobs)
        expected = [[row[token] for token in scored[0]] for row in wanted[start:]]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (greedy(allowed_token_ids=list(range(1025))), "allowed_token_ids with 1025 tokens"),
        (greedy(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias with 1025 tokens"),
        (greedy(min_tokens=1, stop_token_ids=list(range(1, 129))), "min_tokens with 129 stop tok"),
        (greedy(bad_words=[f"{i}" + " is not allowed" * 8 for i in range(60)]), "bad_words with "),
        (greedy(extra_args={"repel": -1.0}), "repel must not be negative"),
        (greedy(trace_decode_token_ids=[5]), "not supported with speculative decoding"),
    ],
)
def test_what_cannot_be_served_is_refused(llm, params, message):
    """The runner's buffers have fixed sizes; without a check its worker stops the engine."""
    with pytest.raises((VLLMValidationError, ValueError), match=message):
        llm.generate(PROMPTS[:2], [greedy(), params], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert answers(llm.generate(TEXTS[:1], greedy(), use_tqdm=False)) == plain()[0][:1]


def test_only_requests_that_ask_for_it_are_processed(llm, monkeypatch):
    """Rows that reach vLLM's processors, and draft rows that are truncated, counted."""
    from vllm_spechub.engine import sampler, truncation

    processed, truncated, steps = [], [], []
    runner_sampler = model_runner(llm).sampler
    apply, process = runner_sampler.apply_sampling_params, sampler.TreeRejectionSampler.process
    h2d = truncation.async_tensor_h2d

    def count_rows(logits, *args, **options):
        processed.append(len(logits))
        return apply(logits, *args, **options)

    def count_steps(self, logits, batch):
        monkeypatch.setattr(runner_sampler, "apply_sampling_params", count_rows)
        try:
            parts = list(process(self, logits, batch))
        finally:
            monkeypatch.setattr(runner_sampler, "apply_sampling_params", apply)
        steps.append(len(logits))
        if not processed:
            assert len(parts) == 1
            assert parts[0].logits is logits
        return parts

    def count_truncated(rows, **options):
        truncated.append(len(rows))
        return h2d(rows, **options)

    monkeypatch.setattr(sampler.TreeRejectionSampler, "process", count_steps)
    monkeypatch.setattr(truncation, "async_tensor_h2d", count_truncated)

    def rows_of(*params):
        for counts in (processed, truncated, steps):
            counts.clear()
        texts = [PROMPTS[0]] * len(params)
        llm.generate(texts, [p.clone() for p in params], use_tqdm=False)
        assert len(steps) >= 6
        return set(processed), set(truncated)

    some = {"max_tokens": 24, "ignore_eos": True}
    ordinary = [greedy(**some), sampled(1, temperature=0.8, **some), greedy(logprobs=2, **some)]
    assert rows_of(*ordinary) == (set(), set())
    # 15 nodes as they are, next to any number of others
    one_row_each = {0, 15}
    processed_rows, truncated_rows = rows_of(*ordinary, sampled(1, top_k=5, **some))
    assert processed_rows <= one_row_each
    assert truncated_rows == {1, 2, 4}  # its internal nodes at depths 0, 1 and 2
    assert rows_of(*ordinary, greedy(logit_bias={5: 1.0}, **some))[0] <= one_row_each
    # 8 paths of 4 nodes each, for that request only
    for extra in ({"presence_penalty": 0.1}, {"extra_args": {"repel": 1.0}}):
        assert rows_of(*ordinary, greedy(**extra, **some)) == ({32}, set())
    both = (greedy(**PENALTIES, **some), sampled(1, top_p=0.5, **some))
    processed_rows, truncated_rows = rows_of(*ordinary, *both)
    assert processed_rows <= {15, 32, 47}
    assert truncated_rows == {1, 2, 4}


def test_rows_that_are_processed_part_by_part(llm, monkeypatch):
    """Nothing depends on it: tokens, the reason to stop, log-probabilities."""
    from vllm_spechub.engine import sampler

    parts, process = [], sampler.TreeRejectionSampler.process

    def count_parts(self, logits, batch):
        found = list(process(self, logits, batch))
        parts.append(sum(part.source is not None for part in found))
        return found

    monkeypatch.setattr(sampler.TreeRejectionSampler, "process", count_parts)
    outcomes = []
    for rows in (10_000, 40):
        monkeypatch.setattr(sampler, "most_processed_rows", lambda _vocab_size, rows=rows: rows)
        parts.clear()
        outputs = llm.generate(TEXTS, list(CASES.values()), use_tqdm=False)
        outcomes.append((answers(outputs), [logprob_rows(output) for output in outputs]))
        assert (max(parts) > 2) == (rows == 40)
    (whole, scores), (in_parts, other_scores) = outcomes
    assert in_parts == whole
    for one, other in zip(chain(*scores), chain(*other_scores), strict=True):
        assert other == pytest.approx(one, abs=1e-4)


def test_match_answers_as_plain_decoding():
    """Sampled requests with a seed and custom processors, too: all cases in one batch."""
    options = OPTIONS | {"logits_processors": [Repel]}
    with plain_engine(**options) as llm:
        expected = llm.generate(TEXTS, list(CASES.values()), use_tqdm=False)
    with engine("binary:3", verification="match", **options) as llm:
        found = llm.generate(TEXTS, list(CASES.values()), use_tqdm=False)
    for name, ours, theirs in zip(CASES, answers(found), answers(expected), strict=True):
        assert ours == theirs, name
