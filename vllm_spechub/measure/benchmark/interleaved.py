# SPDX-License-Identifier: Apache-2.0
"""Measure several ways to decode on one machine, with interleaved repetitions.

As many engines as fit are up at once, plain vLLM among them throughout, and are measured one at a
time, taking turns. So every engine starts once, and every figure has a plain one beside it that is
seconds old: what a machine does over minutes cancels in their ratio.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm_spechub.measure.benchmark.decoding import decode, longest_request
from vllm_spechub.measure.benchmark.engine import EngineFailed, EngineProcess, close_all
from vllm_spechub.measure.benchmark.ways import PLAIN, Way
from vllm_spechub.trees.tree import MAX_NODES

CUDA_RESIDENT = 3
"""Engines at once on a GPU unless told: an 8B target and its draft take a third of 80 GB."""
CUDA_SHARE = 0.92
KV_BLOCK = 128
"""Tokens to which a request's KV cache is rounded: the largest block of any platform."""
MAX_PROMPT_TOKENS = 256
MIN_BATCHED_TOKENS = 2048


class Point(NamedTuple):
    """What is asked of every way."""

    batch: int
    temperature: float


class Turn(NamedTuple):
    """One measurement."""

    way: str
    point: Point
    repetition: int


@dataclass(frozen=True)
class Row:
    """One measurement's figures, in the names of a CSV file's columns."""

    way: str
    temperature: float
    batch: int
    repetition: int
    tokens_per_s: float
    # tokens/s over plain vLLM's in the same repetition
    against_plain: float
    ms_per_output_token: float
    ms_per_step: float
    # acceptance length, the bonus token included
    tokens_per_step: float
    drafts: int
    # accepted drafts up to each depth, from 1
    accepted_by_depth: tuple[int, ...]
    # of all workers, KV cache included
    memory_gib: float

    @property
    def turn(self) -> Turn:
        return Turn(self.way, Point(self.batch, self.temperature), self.repetition)


@dataclass(frozen=True)
class Failure:
    """A way whose engine did not start or stopped; the others go on."""

    way: str
    log: str


@dataclass(frozen=True)
class Setup:
    """What all ways have in common."""

    target: str
    draft: str
    # [num_prompts][num_tokens]
    prompts: Sequence[Sequence[int]]
    # mean number of tokens to time for each request
    tokens: int
    # further options of every engine
    engine: dict[str, Any] = field(default_factory=dict)
    # engines at once; None is all on the CPU and `CUDA_RESIDENT` on a GPU
    resident: int | None = None


def encode(target: str, prompts: Sequence[str]) -> list[list[int]]:
    """The last `MAX_PROMPT_TOKENS` tokens of every prompt. [num_prompts][num_tokens]"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return [tokenizer(prompt)["input_ids"][-MAX_PROMPT_TOKENS:] for prompt in prompts]


def kv_bytes_per_token(config: Any, bytes_per_value: int) -> int:
    """Of a model, by its Hugging Face configuration."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * bytes_per_value


def engine_options(setup: Setup, max_batch: int, resident: int) -> dict[str, Any]:
    """What every engine gets: room for the largest batch, and no more of the memory than its share
    of it, so that KV caches are alike and no request is preempted."""
    from transformers import AutoConfig

    models = setup.target, setup.draft
    configs = [AutoConfig.from_pretrained(model).get_text_config() for model in models]
    wanted = longest_request(setup.prompts, setup.tokens)
    length = min(wanted, *(getattr(c, "max_position_embeddings", wanted) for c in configs))
    value = 4 if setup.engine.get("dtype") == "float32" else 2
    per_token = sum(kv_bytes_per_token(config, value) for config in configs)
    blocks = max_batch * (-(-length // KV_BLOCK) + 1) + 1
    return {
        "model": setup.target,
        "max_model_len": length,
        "max_num_seqs": max_batch,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, max_batch * (MAX_NODES + 1), length),
        "kv_cache_memory_bytes": blocks * KV_BLOCK * per_token,
        "gpu_memory_utilization": CUDA_SHARE / resident,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    } | setup.engine


def groups(ways: Sequence[Way], resident: int) -> Iterator[list[Way]]:
    """Ways that are up together: plain vLLM stays, unless there is room for one engine only."""
    others = [way for way in ways if way.name != PLAIN]
    stays = [way for way in ways if way.name == PLAIN]
    if resident == 1:
        yield from ([way] for way in stays + others)
    elif not others:
        yield from [stays] if stays else []
    else:
        for first in range(0, len(others), resident - 1):
            yield stays + others[first : first + resident - 1]


class Interleaved:
    """The measurements of a set of ways, one after another.

    Args:
        setup: models, prompts and engine options.
        ways: what to compare; the first is plain vLLM.
        points: batches and temperatures.
        repetitions: numbers of the turns of every way at every point.
        known: rows of an earlier run, which are not measured again, plain vLLM's apart where
            another way needs them beside it.
        say: told what is going on, in a few words.
    """

    def __init__(
        self,
        setup: Setup,
        ways: Sequence[Way],
        points: Sequence[Point],
        repetitions: Sequence[int],
        known: Collection[Row] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if ways[0].name != PLAIN:
            raise ValueError("the first way must be plain vLLM")
        from vllm.platforms import current_platform

        self.setup, self.points, self.repetitions, self.say = setup, points, repetitions, say
        self.resident = setup.resident
        if self.resident is None:
            self.resident = CUDA_RESIDENT if current_platform.is_cuda() else len(ways)
        self.plain = {
            (row.turn.point, row.repetition): row.tokens_per_s for row in known if row.way == PLAIN
        }
        done = {row.turn for row in known}
        open_ways = [way for way in ways if not done.issuperset(self._turns(way))]
        if open_ways and open_ways[0].name != PLAIN and self.resident > 1:
            open_ways.insert(0, ways[0])  # the others' yardstick
        self.plan = [
            (group, self._order(group, done)) for group in groups(open_ways, self.resident)
        ]
        self.total = sum(len(turns) for _, turns in self.plan)

    def _turns(self, way: Way) -> list[Turn]:
        return [Turn(way.name, p, r) for r in self.repetitions for p in self.points]

    def _order(self, group: Sequence[Way], done: Collection[Turn]) -> list[Turn]:
        """The turns of ways that are up together: at each point all of them, one after another."""
        order = []
        for turns in zip(*(self._turns(way) for way in group), strict=True):
            missing = [turn for turn in turns if turn not in done]
            if missing and turns[0].way == PLAIN and turns[0] not in missing:
                missing.insert(0, turns[0])
            order += missing
        return order

    def run(self) -> Iterator[Row | Failure]:
        """Rows as they are measured.

        Raises:
            EngineFailed: plain vLLM's engine did not start or stopped.
        """
        options = engine_options(self.setup, max(p.batch for p in self.points), self.resident)
        engines: dict[str, EngineProcess] = {}

        def attempt(name: str, function: Callable, *arguments: Any) -> Any:
            try:
                return function(*arguments)
            except EngineFailed as failure:
                if name == PLAIN:
                    raise
                close_all([engines.pop(name)])
                return Failure(name, str(failure))

        with tempfile.TemporaryDirectory() as folder:
            try:
                for number, (group, turns) in enumerate(self.plan):
                    gone = set(engines) - {way.name for way in group}
                    close_all([engines.pop(name) for name in gone])
                    new = [way for way in group if way.name not in engines]
                    self.say(f"starting {', '.join(way.name for way in new)}")
                    for i, way in enumerate(new):
                        speculative = {"speculative_config": way.speculative}
                        log = Path(folder) / f"{number}-{i}.log"
                        engines[way.name] = EngineProcess(options | speculative, log)
                    for way in new:
                        failure = attempt(way.name, engines[way.name].wait)
                        if failure is not None:
                            yield failure
                    for turn in turns:
                        if turn.way in engines:
                            yield attempt(turn.way, self._measure, turn, engines[turn.way])
            finally:
                close_all(engines.values())

    def _measure(self, turn: Turn, engine: EngineProcess) -> Row:
        name, (batch, temperature), repetition = turn
        self.say(f"{name}: batch {batch}, T = {temperature:g}, repetition {repetition + 1}")
        found = engine.call(decode, self.setup.prompts, batch, temperature, self.setup.tokens)
        if name == PLAIN:
            self.plain[turn.point, repetition] = found.tokens_per_s
        return Row(
            name,
            temperature,
            batch,
            repetition,
            found.tokens_per_s,
            found.tokens_per_s / self.plain[turn.point, repetition],
            found.ms_per_output_token,
            found.ms_per_step,
            found.tokens_per_step,
            found.drafts,
            found.accepted_by_depth,
            found.memory / 2**30,
        )
