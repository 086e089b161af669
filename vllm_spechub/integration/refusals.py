# SPDX-License-Identifier: Apache-2.0
"""The settings and models that draft trees do not support, and what to use instead."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_spechub.config import spechub_config
from vllm_spechub.drafts.kinds import EARLY_EXIT
from vllm_spechub.engine.platform import Platform
from vllm_spechub.integration import versions

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

SCHEDULERS = {
    False: "vllm_spechub.integration.scheduler.TreeScheduler",
    True: "vllm_spechub.integration.scheduler.AsyncTreeScheduler",
}
"""The paths of our schedulers, by whether scheduling is asynchronous."""
ANOTHER_MODEL = "trees need a decoder with plain attention; use one, or leave speculation off"
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")


class Unsupported(RuntimeError):
    """A setting that draft trees do not support.

    It is not a ValueError, because it is raised within pydantic's validation, which would bury the
    line of a ValueError in its own report.
    """


def raise_first(refusals: Iterator[tuple[bool, str]]) -> None:
    """Raise the first refusal that applies.

    Raises:
        Unsupported: with the refusal's message.
    """
    for refused, message in refusals:
        if refused:
            raise Unsupported(f"spechub: {message}")


def head_sizes(model: "ModelConfig") -> set[int]:
    """The sizes of the attention heads of all layers."""
    layers = model.model_arch_config
    return {layers[i].head_size for i in range(layers.total_num_hidden_layers)}


def engine_refusals(vllm_config: "VllmConfig", platform: Platform) -> Iterator[tuple[bool, str]]:
    """Yield, for every setting of an engine that draft trees do not support, whether it is set, and
    the message that names it and what to do instead."""
    import vllm.envs as envs

    spechub = spechub_config(vllm_config)
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    attention = vllm_config.attention_config.backend
    backends = [None, platform.backend_entry]
    if len(head_sizes(vllm_config.model_config)) > 1:
        # vLLM itself names it for such models, where it would choose another by default
        backends.append(AttentionBackendEnum.TRITON_ATTN)

    yield (
        envs.VLLM_USE_V2_MODEL_RUNNER is False,
        "VLLM_USE_V2_MODEL_RUNNER=0 is set, but trees need the V2 model runner; unset it",
    )
    yield from versions.current().refusals(vllm_config)
    yield (
        parallel.worker_cls not in ("auto", platform.vllm_worker, platform.worker),
        f"worker_cls={parallel.worker_cls!r}: spechub supplies its own worker; leave worker_cls "
        "unset",
    )
    scheduler = vllm_config.scheduler_config.scheduler_cls
    yield (
        scheduler not in (None, *SCHEDULERS.values()),
        f"scheduler_cls={scheduler!r}: spechub supplies its own scheduler; leave "
        "scheduler_cls unset",
    )
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    widest = max(max(map(len, tree.internal_levels())) for tree in spechub.schedule.trees)
    yield (
        widest > budget,
        f"max_num_batched_tokens={budget} is less than the {widest} nodes that the draft reads at "
        "once of one tree; raise it, or choose a narrower tree",
    )
    nodes = spechub.tree.num_nodes
    yield (
        vllm_config.kernel_config.enable_jit_warmup and budget < nodes + 3,
        f"max_num_batched_tokens={budget} is less than the {nodes + 3} tokens of a request in "
        f"vLLM's warm-up for a tree of {nodes} nodes; raise it, or choose a smaller tree",
    )
    yield (
        parallel.pipeline_parallel_size > 1,
        "pipeline_parallel_size > 1 is not supported; use tensor_parallel_size",
    )
    yield (
        parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe,
        "data_parallel_size > 1 is not supported for mixture-of-experts models, whose ranks must "
        "run in step; start separate engines",
    )
    yield (
        parallel.data_parallel_size > 1 and len(spechub.schedule.ranges) > 1,
        "speculative_config['tree_by_batch_size'] with data_parallel_size > 1 is not supported, "
        "because vLLM does not vary the number of drafted tokens there; use "
        "speculative_config['tree']",
    )
    yield (
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "decode_context_parallel_size and prefill_context_parallel_size must be 1",
    )
    yield parallel.use_ubatching, "enable_dbo (dual-batch overlap) is not supported; turn it off"
    yield (
        bool(parallel.enable_batch_sharded_sampling),
        "enable_batch_sharded_sampling is not supported; turn it off",
    )
    yield parallel.enable_eplb, "enable_eplb is not supported; turn it off"
    yield (
        vllm_config.kv_transfer_config is not None,
        "kv_transfer_config (KV connectors) is not supported: a connector may read a tree's KV "
        "cache before the accepted path is moved into place; remove it",
    )
    yield (
        vllm_config.ec_transfer_config is not None,
        "ec_transfer_config is not supported; remove it",
    )
    yield (
        vllm_config.aux_output_config.enable_return_routed_experts,
        "enable_return_routed_experts is not supported: vLLM records experts by slot, and trees "
        "move tokens between slots; turn it off",
    )
    yield (
        getattr(vllm_config, "watermark_config", None) is not None,
        "watermark_config is not supported; remove it",
    )
    for where, dtype in (
        ("kv_cache_dtype", cache.cache_dtype),
        ("speculative_config['kv_cache_dtype']", spechub.kv_cache_dtype),
    ):
        yield (
            dtype not in (None, *KV_CACHE_DTYPES),
            f"{where}={dtype!r} is not supported, allowed: {', '.join(KV_CACHE_DTYPES)}",
        )
    yield (
        vllm_config.lora_config is not None and spechub.proposer == EARLY_EXIT,
        "enable_lora with proposer 'early_exit' is not supported: adapters are mapped to the "
        "target's rows, which are not the draft's; name a draft as speculative_config['model']",
    )
    yield cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill is not supported; turn it off"
    yield (
        attention not in backends,
        f"attention_backend={getattr(attention, 'name', '')}: spechub supplies its own attention "
        "backend; leave attention_backend unset",
    )


def model_refusals(model: "ModelConfig", platform: Platform) -> Iterator[tuple[bool, str]]:
    """Yield, for every kind of target, draft or member that trees do not support, whether this
    model is of the kind, and the message that names the model and what to do instead."""
    hf = model.hf_text_config
    name = model.architecture

    yield model.runner_type == "pooling", f"{name} is served as a pooling model; use 'generate'"
    yield (
        model.is_hybrid or model.is_attention_free,
        f"{name} has recurrent (Mamba-like) layers, whose state cannot branch; {ANOTHER_MODEL}",
    )
    yield model.is_encoder_decoder, f"{name} is an encoder-decoder model; {ANOTHER_MODEL}"
    yield (
        model.uses_mrope and not model.is_multimodal_model,
        f"{name} uses M-RoPE positions without being multimodal; {ANOTHER_MODEL}",
    )
    yield (
        model.use_mla,
        f"{name} uses MLA attention, whose kernels have no tree masks; set VLLM_MLA_DISABLE=1, and "
        "vLLM gives it plain attention with a larger KV cache",
    )
    largest = max(head_sizes(model))
    yield (
        largest > platform.max_head_size,
        f"{name} has attention heads of size {largest}, allowed: up to {platform.max_head_size} on "
        f"this platform; {ANOTHER_MODEL}",
    )
    yield getattr(model, "is_diffusion", False), f"{name} is a diffusion model; {ANOTHER_MODEL}"
    yield (
        model.attention_chunk_size is not None,
        f"{name} has chunked attention layers, whose chunks count slots where trees count depths; "
        f"{ANOTHER_MODEL}",
    )
    yield (
        getattr(hf, "alibi", False) or getattr(hf, "model_type", "") in ("bloom", "mpt"),
        f"{name} uses ALiBi; {ANOTHER_MODEL}",
    )
    yield model.enable_prompt_embeds, "enable_prompt_embeds is not supported; turn it off"
    yield model.enable_trace_replay, "enable_trace_replay is not supported; turn it off"
    yield model.return_sampling_mask, "return_sampling_mask is not supported; turn it off"


def multimodal_refusals(target: "ModelConfig") -> Iterator[tuple[bool, str]]:
    """Yield, for everything of multimodal targets that trees cannot do, whether it is so, and the
    message that says what to do instead."""
    if not target.supports_multimodal_inputs:  # or the engine's limits leave it text only
        return
    # here, as these import all that models need
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.interfaces import supports_realtime

    name = target.architecture
    text_only = "use another model, or set language_model_only=True"
    yield (
        target.is_mm_prefix_lm,
        f"{name} lets the tokens of an image see each other in both directions, which tree masks "
        f"do not express; {text_only}",
    )
    yield (
        target.get_multimodal_config().is_multimodal_pruning_enabled(),
        "pruning the tokens of videos is not supported; leave video_pruning_rate unset",
    )
    yield (
        supports_realtime(get_model_cls(target)),
        f"{name} hears audio while it decodes, and trees hold text only; {text_only}",
    )


def pair_refusals(
    target: "ModelConfig", beside: "ModelConfig", option: str
) -> Iterator[tuple[bool, str]]:
    """Yield, for everything in which a target and a draft or member that trees do support do not
    fit together, whether it is so, and the message that says what to do instead.

    Args:
        option: what named the draft or member.
    """
    what = "draft" if option == "speculative_config['model']" else "member"
    yield (
        beside.is_multimodal_model,
        f"{option} is multimodal ({beside.architecture}), but a {what} "
        "reads text only; use a text model of the target's vocabulary",
    )
    yield (
        beside.is_moe and not target.is_moe,
        f"{option} has experts, for which vLLM prepares its processes only if "
        f"the target has experts, too; use a {what} without",
    )
