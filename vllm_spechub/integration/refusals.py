# SPDX-License-Identifier: Apache-2.0
"""Everything that draft trees refuse of an engine or a model, and what to use instead."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_spechub.integration.classes import SCHEDULERS, VLLM_WORKERS, WORKERS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")


class Unsupported(RuntimeError):
    """A setting that draft trees do not support. Not a ValueError: pydantic, inside whose
    validation it is raised, would bury the line in its own report."""


def raise_first(refusals: Iterator[tuple[bool, str]]) -> None:
    for refused, message in refusals:
        if refused:
            raise Unsupported(f"spechub: {message}")


def engine_refusals(vllm_config: "VllmConfig") -> Iterator[tuple[bool, str]]:
    """(is it asked for, what to say) for everything draft trees refuse of an engine."""
    import vllm.envs as envs

    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    attention = vllm_config.attention_config.backend

    yield (
        envs.VLLM_USE_V2_MODEL_RUNNER is False,
        "VLLM_USE_V2_MODEL_RUNNER=0 is set, but trees need the V2 model runner; unset it",
    )
    yield (
        parallel.distributed_executor_backend == "ray"
        and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND,
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 is set, but trees bring an executor of the newer kind; "
        "unset it",
    )
    yield (
        not (current_platform.is_cpu() or current_platform.is_cuda()),
        f"the platform {current_platform.device_name!r} is not supported; use CUDA or the CPU",
    )
    yield (
        parallel.worker_cls not in VLLM_WORKERS | set(WORKERS.values()),
        f"worker_cls={parallel.worker_cls!r}: trees bring their own worker; leave it unset",
    )
    scheduler = vllm_config.scheduler_config.scheduler_cls
    yield (
        scheduler not in (None, *SCHEDULERS.values()),
        f"scheduler_cls={scheduler!r}: trees bring their own scheduler; leave it unset",
    )
    yield (
        parallel.pipeline_parallel_size > 1,
        "pipeline_parallel_size > 1 is not supported; use tensor_parallel_size",
    )
    yield (
        parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe,
        "data_parallel_size > 1 is not supported for mixtures of experts, whose ranks run in step; "
        "start separate engines",
    )
    yield (
        parallel.data_parallel_size > 1
        and vllm_config.speculative_config.tree_by_batch_size is not None,
        "speculative_config['tree_by_batch_size'] with data_parallel_size > 1 is not supported, as "
        "vLLM varies no widths there; use speculative_config['tree']",
    )
    yield (
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "decode_context_parallel_size and prefill_context_parallel_size must be 1",
    )
    yield parallel.use_ubatching, "enable_dbo (dual-batch overlap) is not supported; turn it off"
    yield (
        parallel.enable_batch_sharded_sampling,
        "enable_batch_sharded_sampling is not supported; turn it off",
    )
    yield parallel.enable_eplb, "enable_eplb is not supported; turn it off"
    yield (
        vllm_config.kv_transfer_config is not None,
        "kv_transfer_config (KV connectors) is not supported: a connector may read a tree's slots "
        "before its accepted path is in place; remove it",
    )
    yield vllm_config.ec_transfer_config is not None, "ec_transfer_config is not supported"
    yield (
        vllm_config.aux_output_config.enable_return_routed_experts,
        "enable_return_routed_experts is not supported: experts are recorded by slot; turn it off",
    )
    yield (
        getattr(vllm_config, "watermark_config", None) is not None,
        "watermark_config is not supported; remove it",
    )
    for where, dtype in (
        ("kv_cache_dtype", cache.cache_dtype),
        ("speculative_config['kv_cache_dtype']", vllm_config.speculative_config.kv_cache_dtype),
    ):
        yield (
            dtype not in (None, *KV_CACHE_DTYPES),
            f"{where}={dtype!r} is not supported, allowed: {', '.join(KV_CACHE_DTYPES)}",
        )
    yield cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill is not supported; turn it off"
    yield (
        attention is not None and attention.name not in ("CUSTOM", "CPU_ATTN"),
        f"attention_backend={getattr(attention, 'name', '')}: trees bring their own attention "
        "backend; leave it unset",
    )


def model_refusals(model: "ModelConfig | None") -> Iterator[tuple[bool, str]]:
    """(is it so, what to say) for everything draft trees refuse of a target or draft model."""
    if model is None:
        return
    hf = model.hf_text_config
    name = model.architecture

    yield model.runner_type == "pooling", f"{name} is served as a pooling model; use 'generate'"
    yield (
        model.is_hybrid or model.is_attention_free,
        f"{name} has recurrent (Mamba-like) layers, whose state cannot branch; "
        "use a pure attention model",
    )
    yield model.is_encoder_decoder, f"{name} is an encoder-decoder; not supported"
    yield (
        model.is_multimodal_model,
        f"{name} is multimodal; only text models are supported",
    )
    yield model.uses_mrope, f"{name} uses M-RoPE positions; not supported"
    yield model.use_mla, f"{name} uses MLA attention; not supported"
    yield (
        getattr(model, "is_diffusion", False),
        f"{name} is a diffusion model; not supported",
    )
    yield (
        model.attention_chunk_size is not None,
        f"{name} has chunked attention layers; not supported "
        "(their chunks are counted in slots, a tree's positions in depth)",
    )
    yield (
        getattr(hf, "alibi", False) or getattr(hf, "model_type", "") in ("bloom", "mpt"),
        f"{name} uses ALiBi; not supported",
    )
    yield model.enable_prompt_embeds, "enable_prompt_embeds is not supported; turn it off"
    yield model.enable_trace_replay, "enable_trace_replay is not supported; turn it off"
    yield model.return_sampling_mask, "return_sampling_mask is not supported; turn it off"
