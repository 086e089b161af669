# SPDX-License-Identifier: Apache-2.0
"""Decode at a constant batch and count what happens meanwhile; runs in an engine's process."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

WARM_STEPS = 4
"""Steps at the full batch before the clock starts."""
WARM_TOKENS = 16
"""Tokens that a request may well have emitted by then."""
ROOM = 4
"""A request may generate this many times the mean before a measurement ends."""


def counters(llm) -> tuple[int, int, list[int]]:
    """(engine steps, verified drafts, accepted drafts by depth) so far."""
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
    """Tokens that one verification emits, the bonus token included; 1 without drafts."""
    return 1 + sum(accepted_by_depth) / drafts if drafts else 1.0


@dataclass(frozen=True)
class Decoded:
    """What an engine did while a constant number of requests was decoding."""

    batch: int
    tokens: int
    seconds: float
    steps: int
    # verified drafts, and how many of them were accepted up to each depth, from 1
    drafts: int
    accepted_by_depth: tuple[int, ...]
    # bytes of all workers
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
    """Most tokens that a request generates if `tokens` are to be timed for each on average."""
    return ROOM * (WARM_TOKENS + tokens)


def longest_request(prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Most tokens of a request that `decode` makes, a tree's nodes included."""
    from vllm_spechub.trees.tree import MAX_NODES

    return max(map(len, prompts)) + room(tokens) + MAX_NODES + 1


def decode(
    llm,
    # [num_prompts][num_tokens]
    prompts: Sequence[Sequence[int]],
    batch: int,
    temperature: float,
    tokens: int,
) -> Decoded:
    """Decode `batch` requests until they have emitted `tokens` each on average, then drop them.

    The clock starts once all are past their prompts and runs while all are decoding, so neither
    prefill nor a batch that runs empty is in the figures. Ends early if a request has used its
    `room`. Requests have no seeds, which would slow some methods down.

    Args:
        llm: the engine.
        prompts: tokenised; they are repeated where the batch is larger.
        batch: requests.
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
        """-> are all requests still decoding?"""
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
        accepted.pop()  # vLLM counts a tree's nodes for its depths, or nothing got so far
    return Decoded(
        batch, counted, seconds, after[0] - before[0], after[1] - before[1], tuple(accepted), memory
    )
