# SPDX-License-Identifier: Apache-2.0
"""What runs on CUDA, in an engine on the CPU: the Triton backend and the use of CUDA graphs.

The backend's attention is the reference of its kernel, and a "graph" is the captured call itself,
made again: it holds the metadata of its capture, so whatever does not reach it through persistent
buffers is missing here as it would be in a replay. What stays untested is the device's own part:
that the captured kernels may be captured.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids
from helpers.metrics import spec_metrics
from helpers.pair import DRAFT, EAGLE3, PROMPTS, TARGET
from helpers.schedules import SCHEDULE, params
from vllm_spechub.attention import triton_backend
from vllm_spechub.integration.platforms import PLATFORMS

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.fixture
def attention_of_gpus(monkeypatch):
    """The CPU with the attention backend of GPUs."""

    def write(self, layer, key, value, kv_cache, slot_mapping):
        """vLLM's kernel for this needs a GPU to ask for its capability."""
        used = slot_mapping >= 0
        for new, cache in zip((key, value), triton_backend.cache_views(kv_cache), strict=True):
            blocks, rows = slot_mapping[used] // cache.shape[1], slot_mapping[used] % cache.shape[1]
            cache[blocks, rows] = new[: len(slot_mapping)][used]

    build = triton_backend.TritonTreeMetadataBuilder.build

    def build_ours(self, *args, tree=None, **options):
        """Without a tree vLLM's kernel would run; ours does, as in a graph."""
        metadata = build(self, *args, tree=tree, **options)
        metadata.visible_until, metadata.tree_mask = self.visible_until, self.tree_mask
        return metadata

    cpu = PLATFORMS["cpu"]
    mixed = replace(
        cpu,
        attention_backend=PLATFORMS["cuda"].attention_backend,
        cache_kernels=lambda: cpu.cache_kernels()._replace(cache_views=triton_backend.cache_views),
    )
    monkeypatch.setitem(PLATFORMS, "cpu", mixed)
    monkeypatch.setattr(triton_backend.TritonTreeImpl, "do_kv_cache_update", write)
    monkeypatch.setattr(triton_backend.TritonTreeMetadataBuilder, "build", build_ours)


@pytest.fixture
def replays(monkeypatch):
    """How often which graph was replayed: by kind, padded number of requests, rows of each."""
    counts: Counter = Counter()

    def capture(self, create_forward_fn, progress_bar_desc=""):
        for desc in self._capture_descs.get(CUDAGraphMode.FULL, []):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            self.graphs[desc] = create_forward_fn(desc, warmup=False)
            self.graphs[desc](CUDAGraphMode.NONE)
        self._graphs_captured = True

    @torch.inference_mode()
    def replay(self, desc):
        kind = "target" if isinstance(self, ModelCudaGraphManager) else "draft"
        counts[kind, desc.num_reqs, desc.uniform_token_count] += 1
        self.graphs[desc](CUDAGraphMode.NONE)

    pool = "vllm.platforms.interface.Platform.get_global_graph_pool"
    monkeypatch.setattr(pool, classmethod(lambda cls: None))
    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    monkeypatch.setattr(CudaGraphManager, "run_fullgraph", replay)
    return counts


@torch.inference_mode()
def capture_graphs(llm) -> None:
    """Do what the runner does on a GPU after it has its KV cache."""
    runner = model_runner(llm)
    runner.compilation_config.cudagraph_capture_sizes = SIZES
    runner.compilation_config.max_cudagraph_capture_size = SIZES[-1]
    manager = ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode.NONE, runner.decode_query_len
    )
    manager.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    manager._init_candidates()
    runner.cudagraph_manager = manager
    runner.speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        None,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
        use_aux_hidden_state_outputs=runner.use_aux_hidden_state_outputs,
    )
    runner.speculator.capture()


@pytest.mark.usefixtures("attention_of_gpus")
@pytest.mark.parametrize("budget", [512, 30])
def test_the_backend_in_an_engine(budget):
    with engine("binary:3", max_num_batched_tokens=budget) as llm:
        answers = token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False))
    assert answers == plain_greedy()


@pytest.mark.usefixtures("attention_of_gpus")
@pytest.mark.parametrize(
    ("tree", "draft"), [("binary:3", DRAFT), (SCHEDULE, DRAFT), (SCHEDULE, EAGLE3)]
)
def test_graphs_replay_what_a_step_needs(tree, draft, replays):
    """Tokens and acceptance are those of the same engine without graphs."""
    answers, metrics = [], []
    for graphs in (False, True):
        with engine(tree, draft=draft, verification="traversal") as llm:
            if graphs:
                capture_graphs(llm)
            outputs = llm.generate(PROMPTS, params(), use_tqdm=False)
            outputs += llm.generate(PROMPTS, params(temperature=1.0, seed=3), use_tqdm=False)
            metrics.append(spec_metrics(llm))
        answers.append(token_ids(outputs))
    assert answers[0] == answers[1]
    assert metrics[0] == metrics[1]
    kinds = Counter(kind for kind, _, _ in replays.elements())
    assert kinds["target"] > 20
    assert kinds["draft"] > 40
    sizes = {(kind, rows) for kind, _, rows in replays}
    trees = {("target", 15), ("draft", 4), ("draft", 2)}
    if tree == SCHEDULE:
        trees |= {("target", 3), ("target", 1), ("draft", 3), ("draft", 1)}
    assert sizes == trees
    assert {num_reqs for _, num_reqs, _ in replays} >= {1, 2, 4}


@pytest.mark.usefixtures("attention_of_gpus")
def test_a_draft_equal_to_the_target_through_graphs(replays):
    with engine("kary:2:2", draft=TARGET) as llm:
        capture_graphs(llm)
        llm.generate(PROMPTS, greedy_params(30, ignore_eos=True), use_tqdm=False)
        metrics = spec_metrics(llm)
    assert replays
    assert metrics["num_accepted_tokens"] > 0.98 * metrics["num_draft_tokens"]
