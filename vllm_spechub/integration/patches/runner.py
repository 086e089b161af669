# SPDX-License-Identifier: Apache-2.0
"""Patches for a worker that serves a spechub configuration, applied by `SpecHubWorker`."""

import functools

from vllm_spechub.integration.patch import Patch


def _init_speculator(original):
    @functools.wraps(original)
    def init_speculator(vllm_config, device, req_states):
        from vllm_spechub.config import is_spechub
        from vllm_spechub.integration.select import platform
        from vllm_spechub.registry import PROPOSERS
        from vllm_spechub.rules.base import build_rule

        if not is_spechub(vllm_config):
            return original(vllm_config, device, req_states)
        config = vllm_config.speculative_config
        rule = build_rule(config, platform().tree_kernels())
        proposer = PROPOSERS.load(config.proposer)
        if config.reads_draft:
            from vllm_spechub.proposers.draft_member import DraftMember as proposer
        return proposer(vllm_config, device, rule)

    return init_speculator


def _init_model_state(original):
    @functools.wraps(original)
    def init_model_state(vllm_config, model, encoder_cache, device):
        from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        from vllm_spechub.config import is_spechub
        from vllm_spechub.engine.model_state import TreeModelState
        from vllm_spechub.integration.select import platform

        if not is_spechub(vllm_config):
            return original(vllm_config, model, encoder_cache, device)
        needed = resolve_model_state_cls(vllm_config, model)
        if needed is not DefaultModelState:
            raise ValueError(
                f"spechub: {type(model).__name__} needs {needed.__name__}, which trees do not "
                "support; only plain decoders are supported"
            )
        return TreeModelState(vllm_config, model, encoder_cache, device, platform())

    return init_model_state


def _get_pp_indices(original):
    @functools.wraps(original)
    def get_pp_indices(num_hidden_layers, pp_rank, pp_size):
        from vllm_spechub.proposers.first_layers import BUILT

        layers = BUILT.get()
        if layers is None:
            return original(num_hidden_layers, pp_rank, pp_size)
        return 0, layers

    return get_pp_indices


def _warmup_kernels(original):
    @functools.wraps(original)
    def warmup_kernels(model_runner, worker_execute_model, worker_sample_tokens):
        from vllm_spechub.attention.triton_backend import TritonTreeImpl
        from vllm_spechub.config import is_spechub

        if not is_spechub(model_runner.vllm_config):
            return original(model_runner, worker_execute_model, worker_sample_tokens)
        scheduler = model_runner.scheduler_config
        requests = scheduler.max_num_seqs
        # of each request the draft reads the tokens of the prompt, and the one that is sampled
        rows = model_runner.decode_query_len + 2
        try:
            scheduler.max_num_seqs = min(requests, scheduler.max_num_batched_tokens // rows)
            TritonTreeImpl.every_block = True
            original(model_runner, worker_execute_model, worker_sample_tokens)
        finally:
            scheduler.max_num_seqs = requests
            TritonTreeImpl.every_block = False

    return warmup_kernels


PATCHES = (
    Patch(
        symbol="vllm.distributed.utils:get_pp_indices",
        parameters=("num_hidden_layers", "pp_rank", "pp_size"),
        why="vLLM builds all layers of a draft, and `draft_layers` wants the first ones only.",
        how="While such a draft is built, the only pipeline stage ends after these layers; "
        "otherwise calls the original.",
        upstream="none yet",
        until="vLLM builds models with fewer layers than their checkpoints have",
        replace=_get_pp_indices,
    ),
    Patch(
        symbol="vllm.v1.worker.gpu.model_runner:init_speculator",
        parameters=("vllm_config", "device", "req_states"),
        why="It builds only vLLM's own speculators.",
        how="Builds the configured proposer for spechub configurations; otherwise calls the "
        "original.",
        upstream="none yet",
        until="vLLM lets plugins register speculators",
        replace=_init_speculator,
    ),
    Patch(
        symbol="vllm.v1.worker.gpu.model_runner:init_model_state",
        parameters=("vllm_config", "model", "encoder_cache", "device"),
        why="The model state provides positions, masks, the sampler and compaction, which differ "
        "for trees.",
        how="Builds `TreeModelState` for spechub configurations; otherwise calls the original.",
        upstream="none yet",
        until="vLLM lets plugins choose the model state",
        replace=_init_model_state,
    ),
    Patch(
        symbol="vllm.v1.worker.gpu_worker:warmup_kernels",
        parameters=("model_runner", "worker_execute_model", "worker_sample_tokens"),
        why="Its prompts may fill `max_num_batched_tokens`. The scheduler leaves room for a row of "
        "the draft per request, but the warm-up does not ask the scheduler, and a wider pass stops "
        "the engine.",
        how="While it runs, lowers `max_num_seqs` to the requests whose rows fit, and lets "
        "attention launch the blocks of longer requests, too; otherwise calls the original.",
        upstream="none yet",
        until="vLLM's warm-up keeps to `max_num_scheduled_tokens`",
        replace=_warmup_kernels,
    ),
)
