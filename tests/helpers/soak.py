# SPDX-License-Identifier: Apache-2.0
"""Random requests of all kinds to one engine that has too little of everything, and what must hold.

The answers to some kinds of requests are known: those of an engine without trees, which is not
short of anything. The others are drawn, and must be what was asked for.
"""

import ctypes
import gc
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from math import isfinite
from typing import Any

import psutil
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from helpers.engines import model_runner
from helpers.metrics import spec_metrics

LONGEST = 40  # tokens of an answer, at most
MOST = (1, 2, 4, 9, 24)  # requests at the same time, of which one is chosen now and then
GRAMMAR = "[a-z_ .=()]{6,24}"
TRUNCATED = {"temperature": 0.8, "seed": 12, "top_p": 0.9, "top_k": 20, "presence_penalty": 0.5}
GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "edits": {"logit_bias": {278: -5.0, 199: 3.0}, "bad_words": [" =", "self"]},
    "stop": {"stop": ["\n", "self"], "min_tokens": 4},
    "grammar": {"structured_outputs": GRAMMAR, "ignore_eos": False},
}
SEEDED: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 1.0, "seed": 11},
    "seeded, truncated": TRUNCATED,
    "seeded grammar": TRUNCATED | {"structured_outputs": GRAMMAR, "ignore_eos": False},
}
"""Known only with the rule `match`."""
Kinds = dict[str, dict[str, Any]]


def sampling_params(options: dict[str, Any], max_tokens: int, **more: Any) -> SamplingParams:
    """Parameters of a kind; without a temperature, greedy."""
    options = {"temperature": 0.0, "ignore_eos": True, **options, **more}
    options["min_tokens"] = min(options.get("min_tokens", 0), max_tokens)
    if regex := options.pop("structured_outputs", None):
        options["structured_outputs"] = StructuredOutputsParams(regex=regex)
    return SamplingParams(max_tokens=max_tokens, **options)


def drawn_options(rng: random.Random) -> dict[str, Any]:
    """Options for a request whose answer is not known."""
    choices: dict[str, list] = {
        "temperature": [0.3, 0.8, 1.0, 1.5],
        "seed": [None, rng.randrange(2**31)],
        "top_k": [0, 0, 1, 20],
        "top_p": [1.0, 1.0, 0.9, 0.5],
        "min_p": [0.0, 0.0, 0.0, 0.1],
        "presence_penalty": [0.0, 0.0, 0.0, 0.5],
        "min_tokens": [0, 0, 0, 3],
        "n": [1, 1, 1, 3],
        "stop": [None, None, None, ["\n"]],
        "structured_outputs": [None, None, None, None, GRAMMAR],
        "ignore_eos": [False],
    }
    return {name: rng.choice(values) for name, values in choices.items()}


@dataclass(frozen=True)
class Known:
    """What an engine without trees answers."""

    token_ids: list[int]
    # for each of them, log-probabilities of itself and of the most probable tokens
    logprobs: list[dict[int, float]]


def entries_of(logprobs) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in row.items()} for row in logprobs or []]


def known_answers(llm, prompts: list, kinds: Kinds) -> dict[tuple[int, str], Known]:
    """The longest answers to each prompt. Shorter ones must be prefixes of them."""
    keys = list(product(range(len(prompts)), kinds))
    params = [sampling_params(kinds[kind], LONGEST, logprobs=2) for _, kind in keys]
    outputs = llm.generate([prompts[i] for i, _ in keys], params, use_tqdm=False)
    first = [output.outputs[0] for output in outputs]
    return {
        key: Known(list(answer.token_ids), entries_of(answer.logprobs))
        for key, answer in zip(keys, first, strict=True)
    }


@dataclass
class Asked:
    """A request, and what has come of it."""

    prompt: int
    kind: str | None
    params: SamplingParams
    # by sample
    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[dict[int, float]]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)

    def read(self, output) -> None:
        """Take what one step says of the request."""
        for sample in output.outputs:
            i, delta = sample.index, self.params.output_kind == RequestOutputKind.DELTA
            rows = entries_of(sample.logprobs)
            self.tokens[i] = [*(self.tokens.get(i, []) if delta else []), *sample.token_ids]
            self.logprobs[i] = [*(self.logprobs.get(i, []) if delta else []), *rows]
            self.text[i] = (self.text.get(i, "") if delta else "") + sample.text
            self.reasons[i] = sample.finish_reason or self.reasons.get(i)

    def fault(self, known: dict[tuple[int, str], Known]) -> str | None:
        """What is wrong with the answer, in one line."""
        if self.kind is not None:
            return self._differs(known[self.prompt, self.kind])
        if sorted(self.tokens) != list(range(self.params.n)):
            return f"samples {sorted(self.tokens)} of {self.params.n}"
        for i, tokens in self.tokens.items():
            stopped = self.reasons[i] == "stop"
            if not self.params.min_tokens <= len(tokens) <= self.params.max_tokens:
                return f"{len(tokens)} tokens for {self.params}"
            if not stopped and len(tokens) != self.params.max_tokens:
                return f"{self.reasons[i]!r} after {len(tokens)} tokens for {self.params}"
            grammar = self.params.structured_outputs
            whole = grammar and stopped and not self.params.stop
            if whole and not re.fullmatch(GRAMMAR, self.text[i]):
                return f"{self.text[i]!r} is not of the grammar"
            if any(not isfinite(row[t]) for t, row in zip(tokens, self.logprobs[i], strict=False)):
                return f"a token without probability for {self.params}"
        return None

    def _differs(self, known: Known) -> str | None:
        wanted, found = known.token_ids[: self.params.max_tokens], self.tokens[0]
        where = f"prompt {self.prompt}, {self.kind}"
        if found != wanted:
            same = [a == b for a, b in zip(found, wanted, strict=False)]
            at = same.index(False) if False in same else len(same)
            return f"{where}: {found[at:][:4]} and not {wanted[at:][:4]} after {at} tokens"
        if self.params.logprobs is not None and len(self.logprobs[0]) != len(found):
            return f"{where}: {len(self.logprobs[0])} log-probabilities of {len(found)} tokens"
        for at, (row, other) in enumerate(zip(self.logprobs[0], known.logprobs, strict=False)):
            for token in row.keys() & other.keys():
                if max(row[token], other[token]) > -30 and abs(row[token] - other[token]) > 2e-3:
                    return f"{where}: log-probability {row[token]} for {other[token]} at {at}"
        return None


@dataclass
class Report:
    """What happened to the requests."""

    requests: int = 0
    finished: Counter = field(default_factory=Counter)
    aborted: set = field(default_factory=set)
    compared: Counter = field(default_factory=Counter)
    rows_compared: int = 0
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    blocks_before: int = 0
    blocks_after: int = 0
    left: list[str] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)

    def faults(self) -> list[str]:
        """One line for each fault."""
        lost = self.requests - len(self.finished) - len(self.aborted)
        doubled = [name for name, times in self.finished.items() if times > 1]
        both = self.aborted & set(self.finished)
        leaked = self.blocks_before - self.blocks_after
        found = (
            (lost, f"{lost} requests were lost"),
            (doubled, f"{len(doubled)} requests were answered twice"),
            (both, f"{len(both)} requests were answered after they were aborted"),
            (self.wrong, f"{len(self.wrong)} answers are wrong, such as {self.wrong[:1]}"),
            (leaked, f"{leaked} blocks were leaked"),
            (self.left, f"left at the end: {', '.join(self.left)}"),
        )
        return [message for fault, message in found if fault]

    def memory(self) -> tuple[float, float]:
        """MiB after a quarter of the time, and at the end."""
        return self.resident_mib[len(self.resident_mib) // 4], self.resident_mib[-1]


def resident_mib() -> float:
    """The memory that this process uses, after the allocator has returned what is free."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm) -> int:
    """The number of free KV cache blocks."""
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def counter(llm, name: str) -> int:
    """One of vLLM's counters since the engine started."""
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def left_by_requests(llm) -> list[str]:
    """What an idle engine still holds of requests.

    Nothing of an aborted one with several samples: vLLM 0.32 forgets these, but not their parent.
    """
    scheduler, runner = scheduler_of(llm), model_runner(llm)
    outputs, images = llm.llm_engine.output_processor, scheduler.encoder_cache_manager
    counts = {
        "requests of the scheduler": len(scheduler.requests),
        "requests of the worker": len(runner.req_states.req_id_to_index),
        "requests of the output processor": len(outputs.request_states),
        "embeddings in use": images.cache_size - images.num_freeable_slots,
        "requests with images": len(runner.encoder_cache.mm_features)
        if runner.encoder_cache is not None
        else 0,
    }
    return [f"{count} {name}" for name, count in counts.items() if count]


def soak(
    llm,
    prompts: list,
    known: dict[tuple[int, str], Known],
    kinds: Kinds,
    more: Callable[[int], bool],
    seed: int = 0,
) -> Report:
    """Serve random requests, as many at a time as chance has it, and abort about one in four.

    Args:
        prompts: as `LLM.generate` takes them.
        known: answers to requests of `kinds`.
        more: whether another request shall be sent, given how many were.
        seed: of everything that is random.
    """
    rng, core, report = random.Random(seed), llm.llm_engine, Report()
    started = time.monotonic()
    report.blocks_before = free_blocks(llm)
    before = [counter(llm, name) for name in ("num_preemptions", "prefix_cache_hits")]
    alive: dict[str, Asked] = {}
    most = measured = 0
    while (going_on := more(report.requests)) or alive:
        if report.steps % 30 == 0:
            most = rng.choice(MOST)
        while going_on and len(alive) < most and rng.random() < 0.7:
            kind = rng.choice([*kinds, *[None] * (1 + len(kinds) // 2)])
            params = sampling_params(
                drawn_options(rng) if kind is None else kinds[kind],
                rng.randint(1, LONGEST),
                logprobs=rng.choice([None, 0, 2]),
                output_kind=rng.choice(list(RequestOutputKind)),
            )
            name, prompt = str(report.requests), rng.randrange(len(prompts))
            core.add_request(name, prompts[prompt], params)
            alive[name] = Asked(prompt, kind, params)
            report.requests += 1
        if rng.random() < 0.1 and alive:
            name = rng.choice(sorted(alive))
            core.abort_request([name])
            del alive[name]
            report.aborted.add(name)
        report.steps += 1
        for output in core.step():
            name = output.request_id
            report.finished[name] += output.finished
            if (asked := alive.get(name)) is None:
                continue  # counted as a fault if it was not aborted in this very step
            asked.read(output)
            if output.finished:
                _close(report, alive.pop(name), known)
        report.finished += Counter()  # without zeros
        if time.monotonic() > measured + 2:
            report.resident_mib.append(resident_mib())
            measured = time.monotonic()
    while core.has_unfinished_requests():
        core.step()
    core.step()
    report.resident_mib.append(resident_mib())
    report.seconds = time.monotonic() - started
    report.blocks_after, report.left = free_blocks(llm), left_by_requests(llm)
    names = ("num_preemptions", "prefix_cache_hits")
    after = [counter(llm, name) for name in names]
    report.preemptions, report.cached_tokens = (b - a for a, b in zip(before, after, strict=True))
    return report


def _close(report: Report, asked: Asked, known: dict[tuple[int, str], Known]) -> None:
    report.tokens += sum(len(tokens) for tokens in asked.tokens.values())
    if asked.kind is not None:
        report.compared[asked.kind] += 1
        report.rows_compared += len(asked.logprobs[0])
    if (fault := asked.fault(known)) is not None:
        report.wrong.append(fault)


def quietly(llm, prompts: list, at_once: int = 3) -> tuple[list[list[int]], float]:
    """Greedy answers of an engine that does nothing else, and how many tokens each draft gave."""
    before, answers = spec_metrics(llm), []
    for start in range(0, len(prompts), at_once):
        few = prompts[start : start + at_once]
        outputs = llm.generate(few, sampling_params({}, LONGEST), use_tqdm=False)
        answers += [list(output.outputs[0].token_ids) for output in outputs]
    after = spec_metrics(llm)
    drafts, accepted = (after[k] - before[k] for k in ("num_drafts", "num_accepted_tokens"))
    return answers, accepted / drafts
