# SPDX-License-Identifier: Apache-2.0
"""What runs on CUDA, in an engine on the CPU: the Triton backend and the use of CUDA graphs.

The backend's attention is the reference of its kernel, and a "graph" is a record of what was called
(`helpers.graphs`): whatever does not reach it through persistent buffers is missing here as it
would be in a replay. What stays untested is the device's own part: that the captured kernels may
be captured.
"""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import (
    CudaGraphManager,
    ModelCudaGraphManager,
    profile_cudagraph_memory,
)

from helpers import multimodal
from helpers.engines import engine, greedy_params, model_runner, plain_greedy, token_ids, worker
from helpers.graphs import RecordedGraph, as_one
from helpers.launches import Launches
from helpers.metrics import spec_metrics
from helpers.pair import DRAFT, EAGLE3, EXIT_TARGET, NESTED, PROMPTS, TARGET
from helpers.schedules import SCHEDULE, params
from helpers.specialisations import Specialisations
from vllm_spechub.attention import triton_backend
from vllm_spechub.cpu.tree_kernels.compaction import HostKVCompactor
from vllm_spechub.engine import layout, sampler
from vllm_spechub.integration.platforms import PLATFORMS
from vllm_spechub.integration.warm_up import warm_up_trees
from vllm_spechub.proposers import base, draft_model, model_proposer, step_graphs
from vllm_spechub.proposers.cuda_graphs import DraftGraphs
from vllm_spechub.proposers.draft_model import DraftModelProposer
from vllm_spechub.proposers.step_graphs import StepGraphs
from vllm_spechub.rules.base import TreeKernels
from vllm_spechub.rules.draft_state import DraftState
from vllm_spechub.triton_kernels.child_sampling import kernel as child_sampling
from vllm_spechub.triton_kernels.compaction import kernel as compaction
from vllm_spechub.triton_kernels.compaction.reference import raw_bits_once
from vllm_spechub.triton_kernels.level_allocation import kernel as level_allocation
from vllm_spechub.triton_kernels.step_inputs import kernel as step_inputs
from vllm_spechub.triton_kernels.tree_attention import kernel as tree_attention
from vllm_spechub.triton_kernels.verification import kernel as verification

LEVELS = "levels:3,4,4"
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
KINDS = {ModelCudaGraphManager: "target", DraftGraphs: "pass", StepGraphs: "step"}


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
        cache_kernels=lambda: PLATFORMS["cuda"].cache_kernels()._replace(compactor=HostKVCompactor),
    )
    monkeypatch.setitem(PLATFORMS, "cpu", mixed)
    monkeypatch.setattr(triton_backend.TritonTreeImpl, "do_kv_cache_update", write)
    monkeypatch.setattr(triton_backend.TritonTreeMetadataBuilder, "build", build_ours)


@pytest.fixture
def replays(monkeypatch, attention_of_gpus):
    """How often which graph was replayed: by kind, padded number of requests, rows of each."""
    counts: Counter = Counter()
    cpu = PLATFORMS["cpu"]
    kernels = TreeKernels(*map(as_one, cpu.tree_kernels()))
    monkeypatch.setitem(PLATFORMS, "cpu", replace(cpu, tree_kernels=lambda: kernels))
    for owner, name in (
        (BlockTables, "compute_slot_mappings"),
        (triton_backend.TritonTreeImpl, "do_kv_cache_update"),
        (triton_backend.TritonTreeImpl, "forward"),
    ):
        monkeypatch.setattr(owner, name, as_one(getattr(owner, name)))

    def capture(self, create_forward_fn, progress_bar_desc=""):
        for desc in self._capture_descs.get(CUDAGraphMode.FULL, []):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            with RecordedGraph() as self.graphs[desc]:
                forward(CUDAGraphMode.NONE)
        self._graphs_captured = True

    def replay(self, desc):
        kind = KINDS[type(self)]
        rows = desc.tree if kind == "step" else desc.uniform_token_count
        counts[kind, desc.num_reqs, rows] += 1
        self.graphs[desc].replay()

    pool = "vllm.platforms.interface.Platform.get_global_graph_pool"
    monkeypatch.setattr(pool, classmethod(lambda cls: None))
    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    monkeypatch.setattr(CudaGraphManager, "run_fullgraph", replay)
    return counts


@torch.inference_mode()
def capture_graphs(llm) -> None:
    """Do what the runner does on a GPU after it has its KV cache."""
    runner = model_runner(llm)
    sizes = [size for size in SIZES if size <= runner.max_num_tokens]
    runner.compilation_config.cudagraph_capture_sizes = sizes
    runner.compilation_config.max_cudagraph_capture_size = sizes[-1]
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
    ("tree", "draft"),
    [("binary:3", DRAFT), (SCHEDULE, DRAFT), (SCHEDULE, EAGLE3), (LEVELS, EAGLE3)],
)
def test_graphs_replay_what_a_step_needs(tree, draft, replays):
    """Tokens and acceptance are those of the same engine without graphs."""
    answers, metrics = [], []
    for graphs in (False, True):
        with engine(tree, draft=draft, verification="traversal") as llm:
            if graphs:
                capture_graphs(llm)
            outputs = llm.generate(PROMPTS, params(), use_tqdm=False)
            for options in ({}, {"top_p": 0.9}):  # the latter pass by pass
                # the first request last, so that others end before it and it is padded
                sampled = params(temperature=1.0, seed=3, **options)[::-1]
                outputs += llm.generate(PROMPTS, sampled, use_tqdm=False)
            metrics.append(spec_metrics(llm))
        answers.append(token_ids(outputs))
    assert answers[0] == answers[1]
    assert metrics[0] == metrics[1]
    kinds = Counter(kind for kind, _, _ in replays.elements())
    assert kinds["target"] > 20
    assert kinds["step"] > 20
    assert kinds["pass"] > 20
    sizes = {(kind, rows) for kind, _, rows in replays}
    trees = {("target", 15), ("step", 0), ("pass", 4), ("pass", 2)}
    if tree == LEVELS:
        trees = {("target", 12), ("step", 0), ("pass", 4), ("pass", 3)}
    if tree == SCHEDULE:
        trees |= {("target", 3), ("target", 1), ("step", 1), ("pass", 3), ("pass", 1)}
    assert sizes == trees
    assert {num_reqs for _, num_reqs, _ in replays} >= {1, 2, 4}


@pytest.mark.usefixtures("attention_of_gpus")
def test_graphs_of_a_target_with_images_and_mrope(tmp_path, replays):
    """They read embeddings, and positions in three dimensions."""
    answers = []
    with multimodal.importable():
        target = multimodal.target("qwen2_vl", tmp_path)
        for graphs in (False, True):
            with engine("binary:3", **target.options) as llm:
                if graphs:
                    capture_graphs(llm)
                outputs = llm.generate(target.prompts(), greedy_params(24), use_tqdm=False)
            answers.append(token_ids(outputs))
    assert answers[0] == answers[1]
    kinds = Counter(kind for kind, _, _ in replays.elements())
    assert kinds["target"] > 4
    assert kinds["step"] > 4


@pytest.mark.usefixtures("attention_of_gpus")
def test_a_draft_equal_to_the_target_through_graphs(replays):
    with engine("kary:2:2", draft=TARGET) as llm:
        capture_graphs(llm)
        llm.generate(PROMPTS, greedy_params(30, ignore_eos=True), use_tqdm=False)
        metrics = spec_metrics(llm)
    assert replays
    assert metrics["num_accepted_tokens"] > 0.98 * metrics["num_draft_tokens"]


@pytest.mark.usefixtures("attention_of_gpus")
@pytest.mark.parametrize(
    ("draft", "spec", "kinds"),
    [
        # one row for the root, since the target has read all others
        pytest.param(
            None,
            {"proposer": "early_exit", "exit_layer": 2},
            {("pass", 1), ("pass", 2), ("pass", 4)},
            id="the target's",
        ),
        pytest.param(
            NESTED, {"draft_layers": 6}, {("step", 0), ("pass", 2), ("pass", 4)}, id="a draft's"
        ),
    ],
)
def test_first_layers_through_graphs(replays, draft, spec, kinds):
    answers = []
    for graphs in (False, True):
        with engine("binary:3", model=EXIT_TARGET, draft=draft, spec=spec) as llm:
            if graphs:
                capture_graphs(llm)
            answers.append(token_ids(llm.generate(PROMPTS, params(), use_tqdm=False)))
    assert answers[0] == answers[1]
    sizes = {(kind, rows) for kind, _, rows in replays}
    assert sizes == {("target", 15), *kinds}


@pytest.mark.usefixtures("attention_of_gpus", "replays")
def test_graphs_for_the_batches_that_the_schedule_drafts_for():
    with engine(SCHEDULE) as llm:
        capture_graphs(llm)
        captured = model_runner(llm).speculator.graphs.graphs
        sizes = Counter((desc.uniform_token_count, desc.num_reqs) for desc in captured)
    # levels of two and four nodes, and four rows to read, for two requests at most; the chain's for
    # four at most
    trees = {(rows, reqs) for rows in (2, 4) for reqs in (1, 2)}
    chains = {(rows, reqs) for rows in (1, 3) for reqs in (1, 2, 4)}
    assert set(sizes) == trees | chains
    assert set(sizes.values()) == {1}


@pytest.mark.usefixtures("attention_of_gpus", "replays")
def test_graphs_and_uniform_passes_keep_to_the_budget(monkeypatch):
    widths = []
    run_model = DraftModelProposer.run_model

    def spy(self, tokens, *args):
        widths.append(len(tokens))
        return run_model(self, tokens, *args)

    monkeypatch.setattr(DraftModelProposer, "run_model", spy)
    with engine("chain:8", max_num_batched_tokens=40) as llm:
        capture_graphs(llm)
        assert token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False)) == plain_greedy()
    assert 36 in widths  # four requests
    assert max(widths) <= 40


@pytest.mark.usefixtures("attention_of_gpus", "replays")
def test_no_row_sees_what_was_not_written(monkeypatch, replays):
    """A replay has rows for tokens that may have been accepted, and were not."""
    replay, finite = DraftGraphs.replay, []

    def spy(self, *args):
        hidden = replay(self, *args)
        finite.append(bool(hidden.isfinite().all()))
        return hidden

    monkeypatch.setattr(DraftGraphs, "replay", spy)
    with engine("chain:3") as llm:
        capture_graphs(llm)
        for layer in model_runner(llm).compilation_config.static_forward_context.values():
            layer.kv_cache.fill_(torch.nan)
        # It truncates, so that its passes are graphs.
        passes = SamplingParams(temperature=1.0, top_k=1, max_tokens=40)
        assert token_ids(llm.generate(PROMPTS, passes, use_tqdm=False)) == plain_greedy()
        sampled = SamplingParams(temperature=1.0, seed=1, max_tokens=40)
        llm.generate(PROMPTS, sampled, use_tqdm=False)
        (state,) = model_runner(llm).speculator.draft_logits.states
        kept = state.drafts.logits.flatten(1)
    assert len(finite) > 40
    assert all(finite)
    assert kept.any(dim=1).sum() == len(PROMPTS)
    assert not kept.isnan().any()
    assert sum(count for (kind, *_), count in replays.items() if kind == "step") > 10


@pytest.mark.usefixtures("attention_of_gpus", "replays")
def test_what_vllm_profiles_graphs_with_is_dropped(monkeypatch):
    """Its cache and its graphs, neither of which the engine will use."""
    pool = "vllm.platforms.cpu.CpuPlatform.graph_pool_handle"
    monkeypatch.setattr(pool, lambda self: None, raising=False)
    with engine("binary:3") as llm:
        runner = model_runner(llm)
        config, caches, graphs = runner.kv_cache_config, [], []
        runner.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        runner.compilation_config.cudagraph_capture_sizes = SIZES
        runner.compilation_config.max_cudagraph_capture_size = SIZES[-1]
        capture = runner.capture_model

        def spy(**options):
            caches.extend(StorageWeakRef(cache.untyped_storage()) for cache in runner.kv_caches)
            graphs.append(weakref.ref(runner.speculator.graphs))
            return capture(**options)

        monkeypatch.setattr(runner, "capture_model", spy)
        profile_cudagraph_memory(runner)
        gc.collect()
        assert len(caches) > 2
        assert all(cache.expired() for cache in caches)
        assert [graph() for graph in graphs] == [None]

        worker(llm).initialize_from_config(config)
        assert token_ids(llm.generate(PROMPTS, greedy_params(), use_tqdm=False)) == plain_greedy()


@pytest.fixture
def launches(monkeypatch):
    """What this package would launch on a GPU, step by step."""
    found = Launches()
    cpu = PLATFORMS["cpu"].tree_kernels()
    kernels = TreeKernels(
        found.of_launcher(child_sampling.sample_children, cpu.sample_children),
        found.of_launcher(verification.verify_tree, cpu.verify_tree),
        DraftState.write_tokens,
        found.of_launcher(level_allocation.allocate_children, cpu.allocate_children),
    )
    monkeypatch.setitem(PLATFORMS, "cpu", replace(PLATFORMS["cpu"], tree_kernels=lambda: kernels))
    for module in (base, draft_model, model_proposer, step_graphs, layout, sampler):
        copy = found.one("copy from host", module.async_tensor_h2d)
        monkeypatch.setattr(module, "async_tensor_h2d", copy)
    for owner, name, kind in (
        (sampler, "get_num_sampled_and_rejected", "Triton"),
        (BlockTables, "compute_slot_mappings", "Triton"),
        (HostKVCompactor, "__call__", "Triton"),
        (DraftModelProposer, "compute_draft_logits", "LM head"),
        (DraftGraphs, "run_fullgraph", "graph"),
        (StepGraphs, "run_fullgraph", "graph"),
        (step_graphs, "prepare_drafts", "Triton"),
        (layout, "lay_out", "Triton"),
    ):
        monkeypatch.setattr(owner, name, found.one(kind, getattr(owner, name)))
    copy = found.one("copy to host", sampler.TreeSamplerOutput.start_copy_to_host)
    monkeypatch.setattr(sampler.TreeSamplerOutput, "start_copy_to_host", copy)
    for owner, name in (
        (layout.TreeLayout, "update"),
        (triton_backend.TritonTreeMetadataBuilder, "build"),
        (sampler.TreeRejectionSampler, "__call__"),
        (sampler.TreeSamplerOutput, "start_copy_to_host"),
        (DraftModelProposer, "propose"),
    ):
        stage = found.stage(name, getattr(owner, name), begins=name == "update")
        monkeypatch.setattr(owner, name, stage)
    return found


@pytest.mark.usefixtures("attention_of_gpus", "replays")
@pytest.mark.parametrize(("tree", "most"), [("binary:3", 27), (SCHEDULE, 32)])
def test_launches_of_a_step(launches, tree, most):
    """Of requests that all decode and need no processing, beside vLLM's own. Eleven are those of
    verification, and a replayed graph counts as one."""
    requests = [SamplingParams(temperature=1.0, seed=1, max_tokens=30, ignore_eos=True)] * 2
    with engine(tree, verification="traversal") as llm:
        capture_graphs(llm)
        launches.steps.clear()
        llm.generate(PROMPTS[:2], requests, use_tqdm=False)
    decodes = [step for step in launches.steps if step["propose", "graph"] == 1]
    assert len(decodes) > 4
    assert max(step.total() for step in decodes) == most


@pytest.fixture
def specialisations(monkeypatch, replays):
    """What kernels would be compiled for."""
    found = Specialisations()
    noted, cpu = found.noted, PLATFORMS["cpu"]
    host = cpu.tree_kernels()
    kernels = TreeKernels(
        noted(child_sampling.sample_children, host.sample_children),
        noted(verification.verify_tree, host.verify_tree),
        DraftState.write_tokens,
        noted(level_allocation.allocate_children, host.allocate_children),
    )

    class Compactor(HostKVCompactor):
        def __init__(self, views):
            (launch,) = compaction.plan_launches(raw_bits_once(views))
            self.launch = noted(compaction._launch, lambda *args: None)
            self.known = launch.args
            super().__init__(views)

        def __call__(self, *args):
            self.launch(*self.known, *args)
            super().__call__(*args)

    gpus = replace(
        cpu,
        tree_kernels=lambda: kernels,
        cache_kernels=lambda: PLATFORMS["cuda"].cache_kernels()._replace(compactor=Compactor),
    )
    monkeypatch.setitem(PLATFORMS, "cpu", gpus)
    for owner, name, launcher in (
        (triton_backend, "tree_attention", tree_attention.tree_attention_triton),
        (layout, "lay_out", step_inputs.lay_out),
        (step_graphs, "prepare_drafts", step_inputs.prepare_drafts),
    ):
        monkeypatch.setattr(owner, name, noted(launcher, getattr(owner, name)))
    return found.found


def test_nothing_is_compiled_in_service(specialisations):
    """Whatever vLLM's monitor of compilation would stop the engine for (`--jit-monitor-mode=error`)
    was launched at start-up."""
    schedule = [[1, 2, LEVELS], *SCHEDULE[1:]]
    with engine(schedule, verification="traversal", dtype="bfloat16") as llm:
        runner, ours = model_runner(llm), worker(llm)
        for warm_up in (warm_up_trees, gpu_worker.warmup_kernels):  # as on a GPU
            warm_up(runner, ours.execute_model, ours.sample_tokens)
        capture_graphs(llm)
        at_start = set(specialisations)
        specialisations.clear()
        for options in (
            {"temperature": 1.0, "top_p": 0.9},
            {"temperature": 1.0, "seed": 1},
            {"repetition_penalty": 1.2, "logprobs": 2},
        ):
            llm.generate(PROMPTS, params(**options), use_tqdm=False)
    assert {name for name, _ in specialisations} == {name for name, _ in at_start}
    assert len(at_start) > 20
    assert not specialisations - at_start
    # what differs from batch to batch, of which this engine has no large ones
    counts = ("num_reqs", "num_tokens", "most_reqs", "rows_per_req")
    assert {what for _, key in at_start for name, what in key if name in counts} == {
        str(("i32", None))
    }
