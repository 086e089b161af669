# SPDX-License-Identifier: Apache-2.0
"""A tiny pair of models in real engines, with CUDA graphs where there are any."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_spechub.measure.benchmark.decoding import acceptance_length, counters
from vllm_spechub.measure.benchmark.engine import EngineFailed, EngineProcess, close_all
from vllm_spechub.measure.doctor.finding import FAULT, OK, WARNING, Finding

VOCAB_SIZE, LENGTH = 512, 256
PROMPTS = [[(7 * place + 13 * number) % VOCAB_SIZE for place in range(12)] for number in range(6)]
TOKENS = 48
TREE, DEPTH = "binary:3", 3
LEAST_ACCEPTED = 0.75
"""Of a tree's depth: the draft is the target itself, so only rounding keeps it from all."""
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}


def make_model(folder: Path) -> None:
    """Write a small Llama with random weights, whose texts do not repeat one token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.1))
    model.save_pretrained(folder)


def generate(llm: Any, temperature: float) -> tuple[list[list[int]], float, str]:
    """The tokens of every prompt, the acceptance length so far, and the mode of CUDA graphs."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=TOKENS, temperature=temperature, seed=1, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    _, drafts, accepted = counters(llm)
    mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    return (
        [output.outputs[0].token_ids for output in outputs],
        acceptance_length(drafts, accepted),
        mode.name,
    )


def check_engines(folder: Path) -> Iterator[Finding]:
    from vllm.platforms import current_platform

    make_model(folder / "model")
    on_cpu = current_platform.is_cpu()
    runs = [("float32", False), ("float32", True)]
    if not on_cpu:
        runs.append(("bfloat16", True))  # where FlashAttention runs
    plain: list[list[int]] = []
    for dtype, speculates in runs:
        what = f"engine, {dtype}, {f'{TREE}, the draft is the target' if speculates else 'plain'}"
        try:
            tokens, length, mode = _run(folder, dtype, speculates)
        except EngineFailed as failure:
            remedy = "vllm-spechub reports: send this log" if speculates else "mend vLLM first"
            yield Finding(what, FAULT, _reason(str(failure)), remedy)
            return
        if not speculates:
            plain = tokens
            yield Finding(what, OK, f"{len(tokens) * TOKENS} tokens, CUDA graphs: {mode}")
            continue
        yield from _judge(what, dtype, plain, tokens, length)
        if not on_cpu:
            yield _graphs(what, mode)


def _judge(
    what: str, dtype: str, plain: list[list[int]], tokens: list[list[int]], length: float
) -> Iterator[Finding]:
    same = sum(a == b for a, b in zip(tokens, plain, strict=True))
    report = "report this with the whole output: do not use the plugin here"
    if dtype == "float32":
        text = f"{same} of {len(plain)} greedy texts equal plain vLLM's"
        outcome, remedy = (OK, "") if same == len(plain) else (FAULT, report)
        yield Finding(what, outcome, text, remedy)
    most = DEPTH + 1
    text = f"{length:.2f} of at most {most} tokens per step"
    if length < 1 + LEAST_ACCEPTED * DEPTH:
        yield Finding(what, FAULT, text, report)
    else:
        yield Finding(what, OK, text)


def _graphs(what: str, mode: str) -> Finding:
    text = f"CUDA graphs: {mode}"
    if "FULL" in mode:
        return Finding(what, OK, text)
    return Finding(what, WARNING, text, "leave compilation_config's cudagraph_mode at its default")


def _run(folder: Path, dtype: str, speculates: bool) -> tuple[list[list[int]], float, str]:
    model = str(folder / "model")
    options = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": LENGTH,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 * 2**20,
        "gpu_memory_utilization": 0.3,
        "disable_log_stats": False,
    }
    if speculates:
        options["speculative_config"] = {"method": "spechub", "model": model, "tree": TREE}
    engine = EngineProcess(options, folder / f"{dtype}-{speculates}.log")
    try:
        engine.wait()
        tokens, _, _ = engine.call(generate, 0.0)
        _, length, mode = engine.call(generate, 1.0)
    finally:
        close_all([engine])
    return tokens, length, mode


def _reason(log: str) -> str:
    """The line of a log that says most."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return json.dumps((errors or lines or ["it stopped without a word"])[-1].strip())[1:-1]
