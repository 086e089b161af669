# SPDX-License-Identifier: Apache-2.0
"""What differs in a version of vLLM from the one before, place by place, and what that means here.

`docs/support.md` shows it. A test compares the places with those that `vllm_signatures.json` shows
to differ, so that each has been read against the sources.
"""

_GPU = "vllm.v1.worker.gpu"
_SCHED = "vllm.v1.core.sched"
_TRITON = "vllm.v1.attention.backends.triton_attn"
_MANAGER = "vllm.v1.structured_output.StructuredOutputManager"
_SPECULATOR = f"{_GPU}.spec_decode.speculator.DraftModelSpeculator"
_STANDALONE = f"{_GPU}.spec_decode.standalone_ar.speculator.StandaloneARSpeculator"

_MAX_MODEL_LEN = (
    "read from the configuration, because vLLM may shorten it: `TreeProposer.max_model_len` is "
    "one, too"
)
_STOPPED = (
    "a stopped session is queued later, and what its stop has cut off no longer counts as "
    "computed, so our own correction changes nothing any more"
)
_OUTPUT = (
    "blocks are cached and sessions queued at another point; it calls the methods that we override "
    "as before, and in the same order"
)

DECISIONS: dict[str, dict[str, str]] = {
    "0.33.0": {
        # what a version's own module answers
        "vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND": (
            "gone with the older executor: only `v0_32` refuses it"
        ),
        f"{_MANAGER}.grammar_bitmask": (
            "every request has as many masks as a tree may have nodes, and tokens that would end "
            "the reasoning implicitly stay masked if the grammar cannot start with them: "
            "`mask_format`"
        ),
        f"{_MANAGER}._masked_reasoning_ends": "the tokens just named: `mask_format`",
        f"{_GPU}.block_table._gather_block_tables_kernel": (
            "blocks before a sliding window become block 0: stand-in in `v0_33`. No node of a tree "
            "reads before its root's window, and the draft starts where the step does"
        ),
        f"{_GPU}.input_batch._post_update_kernel": (
            "also takes over drafts of another rank of a pipeline: stand-in in `v0_33`"
        ),
        f"{_GPU}.sample.gumbel._gumbel_sample_kernel": (
            "the noise of vLLM's own drafts depends on the column of their cache: stand-in in "
            "`v0_33`. Trees draw without that cache, and plain decoding's noise is unchanged"
        ),
        # what is written so that it holds for both
        f"{_SPECULATOR}.max_model_len": _MAX_MODEL_LEN,
        f"{_SPECULATOR}.__init__": _MAX_MODEL_LEN,
        "vllm.compilation.wrapper.TorchCompileWithNoGuardsWrapper.__init__": (
            "a model may forbid code that is compiled ahead of time; a copy of the model, which is "
            "compiled once more for an early exit, forbids what the model does"
        ),
        "vllm.v1.worker.gpu_worker.Worker.__init__": (
            "refuses the V2 runner without Triton, as the configuration did before: "
            "`SpecHubCPUWorker` does not tell it"
        ),
        "vllm.config.VllmConfig._validate_v2_model_runner": (
            "no longer refuses the V2 runner without Triton; replaced for spechub anyway"
        ),
        "vllm.config.VllmConfig.use_v2_model_runner": (
            "answers differently without any platform; replaced for spechub anyway"
        ),
        "vllm.v1.worker.cpu_worker.CPUWorker.__init__": (
            "checks the free memory later, and binds memory by the worker's own device"
        ),
        # read, and of no consequence
        "vllm.engine.arg_utils.EngineArgs.add_cli_args": "new flags, none of speculation",
        "vllm.platforms.cpu.CpuPlatform.check_and_update_config": (
            "leaves the default block size to a later step, which asks the layers' backends, of "
            "which ours inherits the answer"
        ),
        "vllm.tokenizers.cached_tokenizer_from_config": (
            "passes the code's revision, as our check does for the draft"
        ),
        "vllm.tokenizers.get_tokenizer": "takes the code's revision",
        "vllm.tokenizers.registry.tokenizer_args_from_config": (
            "takes the code's revision; we read the tokenizer's mode from it only"
        ),
        "vllm.utils.torch_utils.async_tensor_h2d": "decides on pinned memory once",
        f"{_TRITON}.TritonAttentionImpl.__init__": "ROCm only",
        f"{_TRITON}.TritonAttentionImpl.forward": "ROCm only",
        f"{_TRITON}.TritonAttentionMetadataBuilder.__init__": (
            "allocates scratch for short verification queries, too; such a batch runs our kernel, "
            "and a draft that exceeds the scratch runs without it"
        ),
        f"{_SCHED}.scheduler.Scheduler.__init__": (
            "with `can_skip_drafts`, steps whose drafts nobody can use are marked, and the worker "
            "asks the proposer for 0 nodes, as it does where a schedule has no tree; lookahead "
            "hashes are for EAGLE-like methods only"
        ),
        f"{_SCHED}.scheduler.Scheduler._handle_stopped_request": _STOPPED,
        f"{_SCHED}.async_scheduler.AsyncScheduler._handle_stopped_request": _STOPPED,
        f"{_SCHED}.scheduler.Scheduler.update_from_output": _OUTPUT,
        f"{_SCHED}.async_scheduler.AsyncScheduler.update_from_output": _OUTPUT,
        "vllm.v1.worker.cpu_worker.CPUWorker.determine_available_memory": "another error message",
        f"{_GPU}.buffer_utils._apply_write_kernel": (
            "splits long writes over more programs; the stand-in writes all that the arguments name"
        ),
        f"{_GPU}.model_runner.init_speculator": "more speculators of vLLM's own",
        f"{_GPU}.model_states.default.DefaultModelState.prepare_attn": (
            "multimodal prefixes and context parallelism, which are refused"
        ),
        f"{_GPU}.spec_decode.rejection_sampler.RejectionSampler.__init__": (
            "reads the options of FLy, a lossy method of vLLM's own; our sampler verifies by itself"
        ),
        f"{_STANDALONE}.load_draft_model": "copies the data-parallel rank into the draft's config",
        "vllm.v1.worker.gpu_worker.Worker.determine_available_memory": (
            "profiles CUDA graphs of multimodal encoders, too; the profiling run samples with all "
            "parameters, still with one row per request, and so misses the same rows of trees"
        ),
        "vllm.v1.worker.gpu_worker.Worker.init_device": (
            "finds its device and creates cuBLAS handles in another way"
        ),
        "vllm.v1.worker.gpu_worker.Worker.wake_up": "restores KV connectors, which are refused",
        "vllm.config.SpeculativeConfig.hf_config_override": (
            "more families, and an optional argument for drafts of the Transformers backend"
        ),
        "vllm.engine.arg_utils.maybe_override_with_speculators": (
            "a head's target must be named by a repository, not by a folder of this machine; GGUF "
            "files are left alone"
        ),
        "vllm.forward_context.set_forward_context": (
            "always knows the batch's size; heads name it themselves"
        ),
        "vllm.v1.worker.cpu_worker.CPUWorker.compile_or_warm_up_model": (
            "warms the V2 runner's kernels up on the CPU, too, as on CUDA"
        ),
        "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": (
            "suppresses records of expert load around what it did before"
        ),
        f"{_GPU}.spec_decode.eagle.utils.load_eagle_model": (
            "may quantize a copy of the target's output matrix for the head, by an option that we "
            "do not take"
        ),
        "vllm.v1.worker.gpu_worker.warmup_kernels": (
            "warms up once more, with greedy requests, within what our replacement wraps, and "
            "masks as many rows as the largest tree has nodes: our steps of smaller trees go "
            "without masks"
        ),
        f"{_GPU}.sample.sampler.Sampler.sample": (
            "passes on whether rows have top-p only, for a faster kernel; where we replace it, "
            "top-k and top-p have been applied before"
        ),
        f"{_GPU}.spec_decode.rejection_sampler.RejectionSampler._verify": (
            "passes on the options of FLy; our sampler verifies by itself"
        ),
    }
}
"""By version: what changed in a place since the version before, and what follows from that."""
