# SPDX-License-Identifier: Apache-2.0
"""What trees cannot do is refused in one line, before any weights are loaded."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from vllm.config import ECTransferConfig, KVTransferConfig, ModelConfig, MultiModalConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import interfaces
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from helpers.pair import DRAFT, EAGLE3, TARGET
from vllm_spechub.integration.platforms import PLATFORMS
from vllm_spechub.integration.refusals import Unsupported
from vllm_spechub.integration.select import attention_backend, prepare_engine
from vllm_spechub.integration.versions import running
from vllm_spechub.proposers.early_exit import EarlyExitProposer
from vllm_spechub.proposers.heads import Eagle3Proposer


def configured(model=TARGET, draft=DRAFT, tree_by_batch_size=None, **options):
    spec = {"method": "spechub", "model": draft}
    if tree_by_batch_size is not None:
        spec["tree_by_batch_size"] = tree_by_batch_size
    options = {"dtype": "float32", "max_model_len": 256, **options}
    return EngineArgs(model=model, speculative_config=spec, **options).create_engine_config()


@pytest.fixture(scope="module")
def accepted():
    load_general_plugins()
    return configured()


def assert_one_line(error, message: str) -> None:
    assert message in str(error.value)
    assert str(error.value).startswith("spechub: ")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "use tensor_parallel_size"),
        ("parallel_config", "decode_context_parallel_size", 2, "must be 1"),
        ("parallel_config", "prefill_context_parallel_size", 2, "must be 1"),
        ("parallel_config", "enable_dbo", True, "enable_dbo (dual-batch overlap)"),
        ("parallel_config", "enable_batch_sharded_sampling", True, "enable_batch_sharded"),
        ("parallel_config", "enable_eplb", True, "enable_eplb is not supported"),
        ("parallel_config", "worker_cls", "my.Worker", "leave worker_cls unset"),
        ("scheduler_config", "scheduler_cls", "my.Scheduler", "leave scheduler_cls unset"),
        ("scheduler_config", "max_num_batched_tokens", 3, "less than the 4 nodes that the draft"),
        ("scheduler_config", "max_num_batched_tokens", 16, "less than the 17 tokens of a request"),
        ("aux_output_config", "enable_return_routed_experts", True, "enable_return_routed_experts"),
        (None, "kv_transfer_config", KVTransferConfig(), "(KV connectors) is not supported"),
        (None, "ec_transfer_config", ECTransferConfig(), "ec_transfer_config is not supported"),
        (None, "watermark_config", object(), "watermark_config is not supported"),
        ("cache_config", "cache_dtype", "int8_per_token_head", "allowed: auto, float16"),
        ("speculative_config", "kv_cache_dtype", "nvfp4", "speculative_config['kv_cache_dtype']"),
        ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        ("attention_config", "backend", AttentionBackendEnum.FLASH_ATTN, "leave attention_b"),
        ("model_config", "enable_prompt_embeds", True, "enable_prompt_embeds"),
        ("model_config", "enable_trace_replay", True, "enable_trace_replay"),
        ("model_config", "return_sampling_mask", True, "return_sampling_mask"),
        ("model_config", "runner_type", "pooling", "use 'generate'"),
    ],
)
def test_engines(accepted, part, field, value, message):
    """Some of these vLLM itself stops on this machine; trees refuse them wherever it does not."""
    config = copy.copy(accepted)
    owner = config
    if part is not None:
        owner = copy.copy(getattr(config, part))
        setattr(config, part, owner)
    object.__setattr__(owner, field, value)
    with pytest.raises(Unsupported) as error:
        prepare_engine(config)
    assert_one_line(error, message)


def test_data_parallel_widths():
    config = copy.deepcopy(configured(tree_by_batch_size=[[1, 4, "chain:2"], [5, None, None]]))
    prepare_engine(config)
    config.parallel_config.data_parallel_size = 2
    with pytest.raises(Unsupported) as error:
        prepare_engine(config)
    assert_one_line(error, "speculative_config['tree_by_batch_size'] with data_parallel_size > 1")


def test_data_parallel_experts(accepted, monkeypatch):
    config = copy.copy(accepted)
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.data_parallel_size = 2
    prepare_engine(config)
    monkeypatch.setattr(ModelConfig, "is_moe", property(lambda self: True))
    with pytest.raises(Unsupported) as error:
        prepare_engine(config)
    assert_one_line(error, "start separate engines")


def test_a_draft_with_experts_beside_a_target_without(accepted, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    draft = model(tmp_path / "draft", "Qwen3MoeForCausalLM", "qwen3_moe", **experts)
    with pytest.raises(Unsupported) as error:
        configured(draft=draft)
    assert_one_line(error, "has experts, for which vLLM prepares its processes only if the target")
    configured(model=draft, draft=draft)


@pytest.mark.skipif(running() != "0.32.0", reason="vLLM 0.33 has no older executor")
def test_rays_older_executor(accepted, monkeypatch):
    config = copy.copy(accepted)
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.distributed_executor_backend = "ray"
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(Unsupported) as error:
        prepare_engine(config)
    assert_one_line(error, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 is set")


def test_platforms(accepted, monkeypatch):
    monkeypatch.setattr(type(current_platform), "device_name", "rocm")
    with pytest.raises(Unsupported) as error:
        prepare_engine(accepted)
    assert_one_line(error, "the platform 'rocm' is not supported; use CUDA or the CPU")


def test_a_platform_is_one_record(accepted, monkeypatch):
    """On CUDA the configuration names its worker and backend, and refuses those of the CPU."""
    config = copy.copy(accepted)
    config.parallel_config = copy.copy(config.parallel_config)
    config.attention_config = copy.copy(config.attention_config)
    monkeypatch.setattr(type(current_platform), "device_name", "cuda")
    with pytest.raises(Unsupported) as error:
        prepare_engine(config)
    assert_one_line(error, "worker_cls='vllm_spechub.integration.cpu_worker.SpecHubCPUWorker'")
    config.parallel_config.worker_cls = "auto"
    prepare_engine(config)
    assert config.parallel_config.worker_cls == "vllm_spechub.integration.worker.SpecHubWorker"
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert not AttentionBackendEnum.CUSTOM.is_overridden()  # a user's own, if there is one
    with attention_backend(PLATFORMS["cuda"]):
        assert AttentionBackendEnum.CUSTOM.get_path() == PLATFORMS["cuda"].attention_backend
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    register_backend(AttentionBackendEnum.CUSTOM, "users.own.Backend")
    try:
        with attention_backend(PLATFORMS["cuda"]):
            pass
        assert AttentionBackendEnum.CUSTOM.get_path() == "users.own.Backend"
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()
    prepare_engine(config)  # vLLM validates a configuration more than once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size > 1"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config",
        ),
    ],
)
def test_from_an_engines_arguments(accepted, options, message):
    with pytest.raises(Unsupported) as error:
        configured(distributed_executor_backend="mp", **options)
    assert_one_line(error, message)


def model(folder: Path, architecture: str, model_type: str, **config) -> str:
    """A folder with a configuration, a tokenizer and no weights."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / file, folder)
    common = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    (folder / "config.json").write_text(json.dumps(common | config))
    return str(folder)


MODELS = {
    "mamba": (
        ("MambaForCausalLM", "mamba", {"state_size": 8, "conv_kernel": 4, "expand": 2}),
        "recurrent (Mamba-like) layers",
    ),
    "hybrid": (
        ("JambaForCausalLM", "jamba", {"num_experts": 1, "num_experts_per_tok": 1}),
        "recurrent (Mamba-like) layers",
    ),
    "m-rope": (
        (
            "LlamaForCausalLM",
            "llama",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 4, 4]}},
        ),
        "uses M-RoPE positions without being multimodal",
    ),
    "mla": (
        (
            "LlamaForCausalLM",
            "deepseek_v2",
            {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
        ),
        "uses MLA attention",
    ),
    "alibi": (("LlamaForCausalLM", "llama", {"alibi": True}), "uses ALiBi"),
    "wide heads": (("LlamaForCausalLM", "llama", {"head_dim": 1024}), "heads of size 1024"),
    "chunked": (
        ("LlamaForCausalLM", "llama", {"attention_chunk_size": 64}),
        "chunked attention layers",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("role", ["model", "draft"])
def test_models(accepted, tmp_path, kind, role):
    (architecture, model_type, config), message = MODELS[kind]
    folder = model(tmp_path / "model", architecture, model_type, **config)
    with pytest.raises(Unsupported) as error:
        configured(**{role: folder})
    assert_one_line(error, message)
    assert architecture in str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("is_encoder_decoder", "is an encoder-decoder"),
        ("is_diffusion", "is a diffusion model"),
    ],
)
def test_kinds_of_models(accepted, monkeypatch, kind, message):
    """Their classes need packages that are not there to be looked at."""
    monkeypatch.setattr(ModelConfig, kind, property(lambda self: True))
    with pytest.raises(Unsupported) as error:
        prepare_engine(accepted)
    assert_one_line(error, message)


PRUNING = MultiModalConfig(video_pruning_rate=0.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("is_mm_prefix_lm", True, "lets the tokens of an image see each other in both directions"),
        ("multimodal_config", PRUNING, "pruning the tokens of videos is not supported"),
        ("realtime", True, "hears audio while it decodes"),
    ],
)
def test_multimodal_models(accepted, monkeypatch, field, value, message):
    """A target of which vLLM says that it takes images and audio."""
    target = copy.copy(accepted.model_config)
    config = copy.copy(accepted)
    config.model_config = target
    target.multimodal_config = MultiModalConfig()
    images = property(lambda self: self is target)
    monkeypatch.setattr(ModelConfig, "supports_multimodal_inputs", images)
    prepare_engine(config)
    if field == "multimodal_config":
        target.multimodal_config = value
    elif field == "realtime":
        monkeypatch.setattr(interfaces, "supports_realtime", lambda model: True)
    else:
        monkeypatch.setattr(ModelConfig, field, property(lambda self: value))
    with pytest.raises(Unsupported) as error:
        prepare_engine(config)
    assert_one_line(error, message)
    monkeypatch.setattr(ModelConfig, "supports_multimodal_inputs", property(lambda self: False))
    prepare_engine(config)  # as with language_model_only=True


def test_multimodal_drafts(accepted, monkeypatch):
    draft = accepted.speculative_config.draft_model_config
    kind = property(lambda self: self is draft)
    monkeypatch.setattr(ModelConfig, "is_multimodal_model", kind)
    with pytest.raises(Unsupported) as error:
        prepare_engine(accepted)
    assert_one_line(error, "speculative_config['model'] is multimodal (LlamaForCausalLM), but a")


def test_multimodal_models_are_not_cut(accepted, monkeypatch):
    monkeypatch.setattr(ModelConfig, "is_multimodal_model", property(lambda self: True))
    message = r"\['exit_layer'\]: LlamaForCausalLM is multimodal, and only text models are cut"
    with pytest.raises(ValueError, match=message):
        EarlyExitProposer.check_options({"exit_layer": 1}, accepted.model_config)


def test_heads_on_multimodal_targets(accepted, monkeypatch):
    config = configured(draft=EAGLE3).speculative_config
    kind = property(lambda self: self.model == TARGET)
    monkeypatch.setattr(ModelConfig, "is_multimodal_model", kind)
    with pytest.raises(ValueError, match="is a head, but LlamaForCausalLM is multimodal"):
        Eagle3Proposer.check_config(config)
