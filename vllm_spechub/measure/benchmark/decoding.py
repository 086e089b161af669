# SPDX-License-Identifier: Apache-2.0
"""Decode at a constant batch size and count what happens. Runs in an engine's process."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

WARM_STEPS = 4
"""Steps at the full batch before the clock starts."""
WARM_TOKENS = 16
"""Tokens that we expect a request to have emitted by then."""
ROOM = 4
"""A request may generate this many times the mean number of tokens; then the measurement ends."""


def counters(llm: Any) -> tuple[int, int, list[int]]:
    """The engine's counts since its start: steps, verified drafts, and accepted tokens by depth."""
    steps, drafts, accepted = 0, 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:iteration_tokens_total":
            steps = metric.count
        elif metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = metric.values
    return steps, drafts, accepted


def acceptance_length(drafts: int, accepted_by_depth: Iterable[int]) -> float:
    """The mean number of tokens per verification, including the bonus token; 1 without drafts."""
    return 1 + sum(accepted_by_depth) / drafts if drafts else 1.0


@dataclass(frozen=True)
class Decoded:
    """What an engine did while a constant number of requests were decoding."""

    batch: int
    tokens: int
    seconds: float
    steps: int
    # number of verified drafts, and how many were accepted up to each depth, from 1
    drafts: int
    accepted_by_depth: tuple[int, ...]
    # memory of all workers, in bytes
    memory: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def ms_per_step(self) -> float:
        return 1000 * self.seconds / self.steps

    @property
    def ms_per_output_token(self) -> float:
        """Milliseconds between two tokens of one request."""
        return 1000 * self.seconds * self.batch / self.tokens

    @property
    def tokens_per_step(self) -> float:
        return acceptance_length(self.drafts, self.accepted_by_depth)


def room(tokens: int) -> int:
    """The most tokens that a request may generate if `tokens` are timed per request on average."""
    return ROOM * (WARM_TOKENS + tokens)


def longest_request(prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """The most tokens that a request of `decode` may have, including a tree's nodes."""
    from vllm_spechub.trees.tree import MAX_NODES

    return max(map(len, prompts)) + room(tokens) + MAX_NODES + 1


def decode(
    llm: Any,
    # [num_prompts][num_tokens]
    prompts: Sequence[Sequence[int]],
    batch: int,
    temperature: float,
    tokens: int,
) -> Decoded:
    """Decode `batch` requests until they have emitted `tokens` each on average, then abort them.

    The clock starts when all requests have finished their prefill and runs while all of them are
    decoding, so the figures include neither prefill nor a shrinking batch. Decoding ends early if
    a request reaches its `room`. Requests have no seeds, which would slow some methods down.

    Args:
        llm: the engine.
        prompts: tokenised prompts; they are repeated if the batch is larger.
        batch: number of requests.
        temperature: of every request.
        tokens: mean number of tokens to time for each request.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    memory = sum(llm.collective_rpc("used_memory"))
    emitted = {}
    params = SamplingParams(
        temperature=temperature,
        max_tokens=room(tokens),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    for number, prompt in enumerate(islice(cycle(prompts), batch)):
        engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
        emitted[str(number)] = 0

    def step() -> bool:
        """Run one engine step. Returns whether all requests are still decoding."""
        going = True
        for output in engine.step():
            emitted[output.request_id] += len(output.outputs[0].token_ids)
            going = going and not output.finished
        return going

    while not all(emitted.values()):
        step()
    for _ in range(WARM_STEPS):
        step()
    before, first, start = counters(llm), sum(emitted.values()), time.perf_counter()
    while step() and sum(emitted.values()) - first < batch * tokens:
        pass
    seconds, after = time.perf_counter() - start, counters(llm)
    counted = sum(emitted.values()) - first
    engine.abort_request(list(emitted))
    accepted = [a - b for a, b in zip(after[2], before[2] or [0] * len(after[2]), strict=True)]
    while accepted and accepted[-1] == 0:
        accepted.pop()  # vLLM reports more positions than depths, or none was accepted that deep
    return Decoded(
        batch, counted, seconds, after[0] - before[0], after[1] - before[1], tuple(accepted), memory
    )
