# SPDX-License-Identifier: Apache-2.0
"""Send thousands of random requests to one engine with a KV cache that is too small for them.

    python scripts/soak.py --requests 4000

Requests of all kinds share the batch, some are aborted, and the KV cache has so few blocks that
vLLM preempts constantly. At the end, no request may be lost or answered twice, every block must be
free again, the process's memory must not have grown, and greedy answers must equal those of a new
engine without trees.
"""

import ctypes
import gc
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from vllm import LLM

PAIR = Path(__file__).parent / "demo_pair"
ENGINE = {
    "model": str(PAIR / "target"),
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 12,
    "enforce_eager": True,
    "disable_log_stats": False,
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
}
SMALL_CACHE = {"num_gpu_blocks_override": 16, "max_num_batched_tokens": 192}
IN_FLIGHT = 24  # requests at the same time
LONGEST = 24  # tokens of an answer, at most
GREEDY = {
    "plain": {},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3},
}


def random_params(rng: random.Random) -> dict:
    """Sampling parameters for a request that is not greedy."""
    params = {"temperature": rng.choice([0.3, 0.8, 1.0, 1.5])}
    for name, values in (
        ("seed", [None, rng.randrange(2**31)]),
        ("top_k", [0, 0, 1, 20]),
        ("top_p", [1.0, 1.0, 0.9, 0.5]),
        ("presence_penalty", [0.0, 0.0, 0.0, 0.5]),
        ("min_tokens", [0, 0, 0, 3]),
        ("logprobs", [None, None, None, 2]),
        ("n", [1, 1, 1, 3]),
        ("stop", [None, None, None, ["\n"]]),
    ):
        params[name] = rng.choice(values)
    return params


@dataclass
class Answer:
    """A finished greedy request."""

    prompt: int
    kind: str
    max_tokens: int
    token_ids: list[int]


@dataclass
class Report:
    """What happened to the requests."""

    requests: int = 0
    finished: Counter = field(default_factory=Counter)
    aborted: set = field(default_factory=set)
    greedy: list[Answer] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    blocks_before: int = 0
    blocks_after: int = 0
    resident_mib: list[float] = field(default_factory=list)

    def faults(self, reference: dict[tuple[int, str], list[int]]) -> list[str]:
        """One line for each fault. `reference` has the longest answer to each prompt."""
        lost = self.requests - len(self.finished) - len(self.aborted)
        doubled = [name for name, times in self.finished.items() if times > 1]
        both = self.aborted & set(self.finished)
        wrong = [
            answer
            for answer in self.greedy
            if answer.token_ids != reference[answer.prompt, answer.kind][: answer.max_tokens]
        ]
        found = (
            (lost, f"{lost} requests were lost"),
            (doubled, f"{len(doubled)} requests were answered twice"),
            (both, f"{len(both)} requests were answered after they were aborted"),
            (wrong, f"{len(wrong)} greedy answers differ from a new engine's: {wrong[:1]}"),
            (
                self.blocks_after != self.blocks_before,
                f"{self.blocks_before - self.blocks_after} blocks were leaked",
            ),
        )
        return [message for fault, message in found if fault]


def resident_mib() -> float:
    """The memory that this process uses, after the allocator has returned what is free."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return psutil.Process().memory_info().rss / 2**20


def free_blocks(llm: "LLM") -> int:
    """The number of free KV cache blocks."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def num_preemptions(llm: "LLM") -> int:
    """The number of preemptions since the engine started."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def soak(
    llm: "LLM",
    prompts: list[str],
    num_requests: int,
    seed: int = 0,
    kinds: tuple[str, ...] = tuple(GREEDY),
    on_finished=lambda count: None,
) -> Report:
    """Serve `num_requests` random requests and abort about one in eight."""
    from vllm import SamplingParams

    rng, core, report = random.Random(seed), llm.llm_engine, Report(requests=num_requests)
    started = time.monotonic()
    report.blocks_before, preemptions = free_blocks(llm), num_preemptions(llm)
    alive: set[str] = set()
    asked: dict[str, tuple[int, str | None, int]] = {}
    added = 0
    while added < num_requests or alive:
        while added < num_requests and len(alive) < IN_FLIGHT:
            name, prompt = str(added), rng.randrange(len(prompts))
            max_tokens = rng.randint(1, LONGEST)
            kind = rng.choice([*kinds, None, None])
            params = {"temperature": 0, "ignore_eos": True, **GREEDY[kind]} if kind else None
            params = params or random_params(rng)
            params["min_tokens"] = min(params.get("min_tokens", 0), max_tokens)
            asked[name] = prompt, kind, max_tokens
            core.add_request(name, prompts[prompt], SamplingParams(max_tokens=max_tokens, **params))
            alive.add(name)
            added += 1
        if rng.random() < 0.15 and alive:
            name = rng.choice(sorted(alive))
            core.abort_request([name])
            alive.remove(name)
            report.aborted.add(name)
        report.steps += 1
        for output in core.step():
            if not output.finished:
                continue
            name = output.request_id
            report.finished[name] += 1
            report.tokens += sum(len(sample.token_ids) for sample in output.outputs)
            alive.discard(name)
            prompt, kind, max_tokens = asked[name]
            if kind:
                ids = list(output.outputs[0].token_ids)
                report.greedy.append(Answer(prompt, kind, max_tokens, ids))
            on_finished(len(report.finished) + len(report.aborted))
            if len(report.finished) % max(num_requests // 20, 1) == 0:
                report.resident_mib.append(resident_mib())
    while core.has_unfinished_requests():
        core.step()
    core.step()
    report.seconds = time.monotonic() - started
    report.blocks_after = free_blocks(llm)
    report.preemptions = num_preemptions(llm) - preemptions
    return report


def greedy_reference(llm: "LLM", prompts: list[str]) -> dict[tuple[int, str], list[int]]:
    """The longest greedy answer to each prompt. Shorter answers must be prefixes of it."""
    from vllm import SamplingParams

    keys = list(product(range(len(prompts)), GREEDY))
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=LONGEST, **GREEDY[kind])
        for _, kind in keys
    ]
    outputs = llm.generate([prompts[i] for i, _ in keys], params, use_tqdm=False)
    return {
        key: list(output.outputs[0].token_ids) for key, output in zip(keys, outputs, strict=True)
    }


def demo_prompts(rng: random.Random, count: int) -> list[str]:
    """Pieces of Python code, one character long or longer. Some begin alike."""
    text = Path(__file__).read_text()
    starts = [rng.randrange(len(text) - 300) for _ in range(count // 2)]
    return [text[start : start + rng.randint(1, 240)] for start in starts for _ in range(2)]


def main(
    requests: Annotated[int, typer.Option(help="The number of requests to serve.")] = 4000,
    tree: Annotated[str, typer.Option(help="The draft tree.")] = "binary:3",
    seed: Annotated[int, typer.Option(help="The seed of the requests' parameters.")] = 0,
) -> None:
    """Soak one engine and compare it with a new one. Exits with status 1 if anything is wrong."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    prompts = demo_prompts(random.Random(seed), 32)
    plain = LLM(**ENGINE)
    reference = greedy_reference(plain, prompts)
    plain.llm_engine.engine_core.shutdown()
    del plain
    gc.collect()
    cleanup_dist_env_and_memory()

    spec = {"method": "spechub", "model": str(PAIR / "draft"), "tree": tree}
    llm = LLM(**ENGINE | SMALL_CACHE, speculative_config=spec)
    with Progress() as progress:
        task = progress.add_task(f"{requests} requests", total=requests)
        report = soak(
            llm,
            prompts,
            requests,
            seed,
            on_finished=lambda count: progress.update(task, completed=count),
        )

    first, last = report.resident_mib[len(report.resident_mib) // 4], report.resident_mib[-1]
    table = Table(title="soak", show_header=False)
    for name, value in (
        ("requests", requests),
        ("finished, each once", len(report.finished)),
        ("aborted", len(report.aborted)),
        ("greedy answers compared", len(report.greedy)),
        ("preemptions", report.preemptions),
        ("tokens", report.tokens),
        ("steps", report.steps),
        ("free blocks before and after", f"{report.blocks_before}, {report.blocks_after}"),
        ("resident MiB after a quarter and at the end", f"{first:.0f}, {last:.0f}"),
        ("seconds", f"{report.seconds:.0f}"),
    ):
        table.add_row(name, str(value))
    Console().print(table)
    faults = report.faults(reference)
    if last > first * 1.03:
        faults.append(f"the process's memory grew from {first:.0f} to {last:.0f} MiB")
    for fault in faults:
        Console().print(fault, style="red")
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
