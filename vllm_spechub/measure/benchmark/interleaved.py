# SPDX-License-Identifier: Apache-2.0
"""Compare decoding methods on one machine, with interleaved repetitions.

As many engines as fit are up at the same time, always including plain vLLM, and take turns being
measured. So each engine starts only once, and every figure has one of plain vLLM beside it that
was measured seconds earlier: slow changes of the machine cancel in their ratio.
"""

import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vllm_spechub.drafts.kinds import MODEL
from vllm_spechub.drafts.sources import Sources
from vllm_spechub.measure.benchmark.decoding import decode, longest_request
from vllm_spechub.measure.benchmark.engine import EngineFailed, EngineProcess, close_all
from vllm_spechub.measure.benchmark.methods import PLAIN, Method, proposer_of
from vllm_spechub.trees.tree import MAX_NODES

CUDA_RESIDENT = 3
"""The default number of engines that run on a GPU at the same time: an 8B target and its draft take
a third of 80 GB."""
CUDA_SHARE = 0.92
"""The share of a GPU's memory that all of its engines may take together."""
KV_BLOCK = 128
"""A request's KV cache is rounded up to this many tokens: the largest block of any platform."""
MAX_PROMPT_TOKENS = 256
MIN_BATCHED_TOKENS = 2048


class Point(NamedTuple):
    """A setting at which every method is measured."""

    batch: int
    temperature: float


class Run(NamedTuple):
    """One measurement to make."""

    method: str
    point: Point
    repetition: int


@dataclass(frozen=True)
class Row:
    """The figures of one measurement. The fields are the columns of the CSV file."""

    method: str
    temperature: float
    batch: int
    repetition: int
    tokens_per_s: float
    # tokens/s divided by plain vLLM's in the same repetition
    against_plain: float
    ms_per_output_token: float
    ms_per_step: float
    # acceptance length, including the bonus token
    tokens_per_step: float
    # number of verified drafts
    drafts: int
    # number of drafts accepted up to each depth, from 1
    accepted_by_depth: tuple[int, ...]
    # memory of all workers, including the KV cache
    memory_gib: float

    @property
    def run(self) -> Run:
        return Run(self.method, Point(self.batch, self.temperature), self.repetition)


@dataclass(frozen=True)
class Failure:
    """A method whose engine did not start or stopped early. The other methods go on."""

    method: str
    log: str


@dataclass(frozen=True)
class Setup:
    """What all methods have in common."""

    # the models, the draft being a model or a head, and further options of every engine
    sources: Sources
    # [num_prompts][num_tokens]
    prompts: Sequence[Sequence[int]]
    # mean number of tokens to time for each request
    tokens: int
    # number of engines that run at the same time; None means all on the CPU and `CUDA_RESIDENT` on
    # a GPU
    resident: int | None = None


def encode(sources: Sources, prompts: Sequence[str]) -> list[list[int]]:
    """The last `MAX_PROMPT_TOKENS` tokens of every prompt. [num_prompts][num_tokens]"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sources.tokenizer, **sources.tokenizer_options)
    return [tokenizer(prompt)["input_ids"][-MAX_PROMPT_TOKENS:] for prompt in prompts]


def kv_bytes_per_token(config: Any, bytes_per_value: int) -> int:
    """The bytes of KV cache that one token takes, from a model's Hugging Face configuration."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * bytes_per_value


def engine_options(setup: Setup, max_batch: int, resident: int) -> dict[str, Any]:
    """The arguments that all engines get.

    Each engine has an equally large KV cache with room for the largest batch, so that no request
    is preempted, and takes no more than its share of a GPU's memory.
    """
    from vllm.transformers_utils.config import get_config

    sources = setup.sources
    untrusted: dict[str, Any] = {"trust_remote_code": False}
    target, draft = (
        get_config(model, **(untrusted | options)).get_text_config()
        for model, options in (
            (sources.target, sources.target_options),
            (sources.draft, sources.draft_options),
        )
    )
    wanted = longest_request(setup.prompts, setup.tokens)
    # a head reads what its target reads
    readers = [target, draft] if proposer_of(sources) == MODEL else [target]
    lengths = (getattr(config, "max_position_embeddings", wanted) for config in readers)
    length = min(wanted, *lengths)
    value = 4 if sources.engine.get("dtype") == "float32" else 2
    per_token = sum(kv_bytes_per_token(config, value) for config in (target, draft))
    blocks = max_batch * (-(-length // KV_BLOCK) + 1) + 1
    options = {
        "model": sources.target,
        "max_model_len": length,
        "max_num_seqs": max_batch,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, max_batch * (MAX_NODES + 1), length),
        "kv_cache_memory_bytes": blocks * KV_BLOCK * per_token,
        "gpu_memory_utilization": CUDA_SHARE / resident,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    return {**options, **sources.engine}


def groups(methods: Sequence[Method], resident: int) -> Iterator[list[Method]]:
    """Split the methods into groups of at most `resident` whose engines are up at the same time.

    Plain vLLM is in every group, unless only one engine fits.
    """
    others = [method for method in methods if method.name != PLAIN]
    always = [method for method in methods if method.name == PLAIN]
    if resident == 1:
        yield from ([method] for method in always + others)
    elif not others:
        yield from [always] if always else []
    else:
        for first in range(0, len(others), resident - 1):
            yield always + others[first : first + resident - 1]


class Interleaved:
    """The measurements of several methods, interleaved.

    Args:
        setup: the models, prompts and engine options.
        methods: what to compare; the first must be plain vLLM.
        points: batches and temperatures.
        repetitions: numbers of the repetitions of every method at every point.
        known: rows of an earlier session, which are not measured again. Plain vLLM is still
            measured wherever another method needs it for the ratio.
        report: called with a short text about what happens now.
    """

    def __init__(
        self,
        setup: Setup,
        methods: Sequence[Method],
        points: Sequence[Point],
        repetitions: Sequence[int],
        known: Collection[Row] = (),
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        if methods[0].name != PLAIN:
            raise ValueError("the first method must be plain vLLM")
        self.setup, self.points, self.repetitions = setup, points, repetitions
        self.report = report
        self.resident = setup.resident or default_resident(len(methods))
        self.plain = {
            (row.run.point, row.repetition): row.tokens_per_s
            for row in known
            if row.method == PLAIN
        }
        done = {row.run for row in known}
        unfinished = [method for method in methods if not done.issuperset(self._runs(method))]
        if unfinished and unfinished[0].name != PLAIN and self.resident > 1:
            unfinished.insert(0, methods[0])  # the others are compared with it
        self.plan = [
            (group, self._order(group, done)) for group in groups(unfinished, self.resident)
        ]
        self.total = sum(len(runs) for _, runs in self.plan)

    def _runs(self, method: Method) -> list[Run]:
        return [Run(method.name, p, r) for r in self.repetitions for p in self.points]

    def _order(self, group: Sequence[Method], done: Collection[Run]) -> list[Run]:
        """The open runs of a group: at each point all methods, one after another."""
        order = []
        for runs in zip(*(self._runs(method) for method in group), strict=True):
            missing = [run for run in runs if run not in done]
            if missing and runs[0].method == PLAIN and runs[0] not in missing:
                missing.insert(0, runs[0])
            order += missing
        return order

    def measure(self) -> Generator[Row | Failure, None, None]:
        """Start the engines and yield each measurement as it is made.

        Raises:
            EngineFailed: plain vLLM's engine did not start or stopped early.
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
                for number, (group, runs) in enumerate(self.plan):
                    finished = set(engines) - {method.name for method in group}
                    close_all([engines.pop(name) for name in finished])
                    new = [method for method in group if method.name not in engines]
                    self.report(f"starting {', '.join(method.name for method in new)}")
                    for i, method in enumerate(new):
                        speculative = {"speculative_config": method.speculative}
                        log = Path(folder) / f"{number}-{i}.log"
                        engines[method.name] = EngineProcess(options | speculative, log)
                    for method in new:
                        failure = attempt(method.name, engines[method.name].wait)
                        if failure is not None:
                            yield failure
                    for run in runs:
                        if run.method in engines:
                            yield attempt(run.method, self._measure, run, engines[run.method])
            finally:
                close_all(engines.values())

    def _measure(self, run: Run, engine: EngineProcess) -> Row:
        name, (batch, temperature), repetition = run
        self.report(f"{name}: batch {batch}, T = {temperature:g}, repetition {repetition + 1}")
        # each repetition goes on where the one before it stopped
        first = repetition * batch % len(self.setup.prompts)
        prompts = [*self.setup.prompts[first:], *self.setup.prompts[:first]]
        decoded = engine.call(decode, prompts, batch, temperature, self.setup.tokens)
        if name == PLAIN:
            self.plain[run.point, repetition] = decoded.tokens_per_s
        return Row(
            name,
            temperature,
            batch,
            repetition,
            decoded.tokens_per_s,
            decoded.tokens_per_s / self.plain[run.point, repetition],
            decoded.ms_per_output_token,
            decoded.ms_per_step,
            decoded.tokens_per_step,
            decoded.drafts,
            decoded.accepted_by_depth,
            decoded.memory / 2**30,
        )


def default_resident(num_methods: int) -> int:
    """How many engines run at the same time unless the user says so."""
    from vllm.platforms import current_platform

    return CUDA_RESIDENT if current_platform.is_cuda() else num_methods
