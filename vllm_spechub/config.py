# SPDX-License-Identifier: Apache-2.0
"""`SpecHubConfig`: what `--speculative-config` accepts, and everything that is refused.

Nothing here loads weights: every refusal is raised while vLLM is still building its configuration.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, field_validator
from vllm.config import SpeculativeConfig
from vllm.config.utils import config
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_spechub.patches import apply_all, ledger
from vllm_spechub.patches.frontend import METHOD
from vllm_spechub.proposers import PROPOSERS
from vllm_spechub.rules import RULES
from vllm_spechub.schedule import TreeSchedule
from vllm_spechub.shapes import parse_tree
from vllm_spechub.topology import TokenTree
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE
from vllm_spechub.tuning.store import measured_schedule

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

DEFAULT_TREE = "binary:3"

WORKERS = {
    "cpu": "vllm_spechub.engine.cpu_worker.SpecHubCPUWorker",
    "cuda": "vllm_spechub.engine.worker.SpecHubWorker",
}
SCHEDULERS = {
    False: "vllm_spechub.engine.scheduler.TreeScheduler",
    True: "vllm_spechub.engine.scheduler.AsyncTreeScheduler",
}
VLLM_WORKERS = {
    "auto",
    "vllm.v1.worker.cpu_worker.CPUWorker",
    "vllm.v1.worker.gpu_worker.Worker",
}

TRITON_BACKEND = "vllm_spechub.attention.triton_tree.TritonTreeBackend"

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2")

ALLOWED_KEYS = (
    "method",
    "model",
    "tree",
    "tree_by_batch_size",
    "verification",
    "sharpening",
    "proposer",
    "kv_cache_dtype",
    "draft_tensor_parallel_size",
    "quantization",
    "revision",
    "code_revision",
    "draft_load_config",
)
"""Keys of the JSON form. vLLM's other speculative options belong to its own methods."""


@config
class SpecHubConfig(SpeculativeConfig):
    """vLLM's speculative configuration with a draft tree.

    `method` stays "draft_model" and `num_speculative_tokens` is the number of drafted nodes, so
    that the scheduler, the KV cache manager and every method check treat a tree as they treat a
    draft model's chain of that length.
    """

    tree: TokenTree | str | list[int] = DEFAULT_TREE
    """The draft tree: a family ("binary:3", "kary:4:2", "chain:5", "caterpillar:5:3"), the list of
    its drafted nodes' parents, breadth-first, 0 being the root, or "auto[:NODES[:DEPTH]]". With
    `tree_by_batch_size` the tree with most nodes."""
    tree_by_batch_size: TreeSchedule | None = None
    """Instead of `tree`: which tree is drafted, by the number of running requests; from
    [[first, last, tree], ...], or "auto" for what `vllm-spechub tune` measured here."""
    verification: str = DEFAULT_RULE
    """The verification rule, by its registered name."""
    sharpening: float = 1.0
    """The exponent of the draft's law in the slots that SpecHub samples."""
    proposer: str = "draft_model"
    """What drafts the tree, by its registered name."""

    @field_validator("tree", mode="after")
    @classmethod
    def _parse_tree(cls, value: Any) -> TokenTree:
        return TokenTree.parse(value)

    @property
    def schedule(self) -> TreeSchedule:
        """Which tree is drafted for each number of running requests."""
        return self.tree_by_batch_size or TreeSchedule.constant(self.tree)

    def verify_equal_vocab_size_if_draft_model(self) -> None:
        """Left to the proposer, which tells padding from another vocabulary."""

    def __repr__(self) -> str:
        return (
            f"SpecHubConfig(model={self.model!r}, tree={self.tree}, nodes={self.tree.num_nodes}, "
            f"depth={self.tree.depth}, verification={self.verification!r}, "
            f"sharpening={self.sharpening}, proposer={self.proposer!r})"
        )


def is_spechub(vllm_config: "VllmConfig") -> bool:
    return isinstance(vllm_config.speculative_config, SpecHubConfig)


def create_config(
    options: dict[str, Any],
    target_model_config: "ModelConfig",
    target_parallel_config: "ParallelConfig",
) -> SpecHubConfig:
    """Build the configuration from the user's options.

    Raises:
        ValueError: one line that names the key and what is allowed.
    """
    options = dict(options)
    for key in options:
        if key not in ALLOWED_KEYS:
            reason = ""
            if key == "num_speculative_tokens":
                reason = " (--spec-tokens): with spechub the tree says how many tokens are drafted"
            if key == "use_heterogeneous_vocab":
                reason = ": draft and target need one vocabulary"
            raise ValueError(
                f"speculative_config[{key!r}] is not an option of method {METHOD!r}{reason}. "
                f"Allowed: {', '.join(ALLOWED_KEYS)}"
            )
    options.pop("method", None)
    for key, registry in (("verification", RULES), ("proposer", PROPOSERS)):
        if key in options and options[key] not in registry:
            raise ValueError(
                f"speculative_config[{key!r}] is {options[key]!r}, allowed: {', '.join(registry)}"
            )
    sharpening = options.get("sharpening", 1.0)
    if type(sharpening) not in (int, float) or not 0 < sharpening < float("inf"):
        raise ValueError(
            f"speculative_config['sharpening'] is {sharpening!r}, allowed: a finite number above 0"
        )
    proposer = PROPOSERS.load(options.get("proposer", SpecHubConfig.proposer))
    proposer.check_options(options, target_model_config)
    schedule = _schedule(options, target_model_config)
    varies = schedule.nodes_by_batch_size()
    try:
        spechub = SpecHubConfig(
            **options,
            method="draft_model",
            tree=schedule.trees[0],
            tree_by_batch_size=schedule if varies else None,
            num_speculative_tokens=schedule.trees[0].num_nodes,
            num_speculative_tokens_per_batch_size=varies,
            target_model_config=target_model_config,
            target_parallel_config=target_parallel_config,
        )
    except (ValidationError, OSError, ValueError) as error:
        raise ValueError(f"speculative_config: {_first_line(error)}") from error
    RULES.load(spechub.verification).check_config(spechub)
    proposer.check_config(spechub)
    return spechub


def _schedule(options: dict[str, Any], target_model_config: "ModelConfig") -> TreeSchedule:
    """Take the trees out of the options."""
    rule = options.get("verification", SpecHubConfig.verification)
    by_batch_size = options.pop("tree_by_batch_size", None)
    if by_batch_size is not None and "tree" in options:
        raise ValueError(
            "speculative_config['tree'] and speculative_config['tree_by_batch_size'] exclude each "
            "other: give one of them"
        )
    key = "tree" if by_batch_size is None else "tree_by_batch_size"
    try:
        if by_batch_size is None:
            return TreeSchedule.constant(parse_tree(options.pop("tree", DEFAULT_TREE), rule))
        if by_batch_size == "auto":
            by_batch_size = measured_schedule(target_model_config.model, options["model"], rule)
        return TreeSchedule.parse(by_batch_size, rule)
    except ValueError as error:
        raise ValueError(f"speculative_config[{key!r}]: {error}") from None


def _first_line(error: Exception | str) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        error = f"{where}: {message}" if where else message
    return str(error).strip().splitlines()[0]


class Unsupported(RuntimeError):
    """A setting that draft trees do not support. Not a ValueError: pydantic, inside whose
    validation it is raised, would bury the line in its own report."""


def prepare_engine(vllm_config: "VllmConfig") -> None:
    """Refuse what draft trees cannot do yet, then name our worker and attention backend.

    Runs whenever vLLM validates an engine's configuration, before any weights are loaded.

    Raises:
        Unsupported: one line that names the setting and what to use instead.
    """
    _raise_first(_engine_refusals(vllm_config))
    _raise_first(_model_refusals(vllm_config.model_config))
    _raise_first(_model_refusals(vllm_config.speculative_config.draft_model_config))
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = SCHEDULERS[bool(scheduler.async_scheduling)]
    parallel = vllm_config.parallel_config
    if current_platform.is_cpu():
        parallel.worker_cls = WORKERS["cpu"]
        apply_all(
            ledger.CPU_WORKER
        )  # for a worker in this process, where Numba may be loaded already
    else:
        parallel.worker_cls = WORKERS["cuda"]
        register_backend(AttentionBackendEnum.CUSTOM, TRITON_BACKEND)
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM
    if parallel.distributed_executor_backend == "ray":
        # needs Ray, which is there if it is asked for
        from vllm_spechub.engine.ray_executor import SpecHubRayExecutor

        parallel.distributed_executor_backend = SpecHubRayExecutor


def _raise_first(refusals: Iterator[tuple[bool, str]]) -> None:
    for refused, message in refusals:
        if refused:
            raise Unsupported(f"spechub: {message}")


def _engine_refusals(vllm_config: "VllmConfig") -> Iterator[tuple[bool, str]]:
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


def _model_refusals(model: "ModelConfig | None") -> Iterator[tuple[bool, str]]:
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
