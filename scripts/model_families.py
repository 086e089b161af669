# SPDX-License-Identifier: Apache-2.0
"""The model families that are tried with trees, and the table of what was seen.

`tests/engine/test_families.py` makes a tiny random model of each, serves it as target and as draft,
and compares rows and texts with plain decoding. To add a family, add an entry to `FAMILIES` and run

    pytest tests/engine/test_families.py --all-families

which also writes `docs/models.json`, the record that the table in `docs/models.md` shows.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_table import table

RECORD = Path(__file__).parents[1] / "docs" / "models.json"
"""What the last passing run of all families saw, with its versions and a digest of its sources."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as users know it.
        made_by: transformers' name, such that it has a class `<made_by>Config`.
        options: of that configuration, beyond `COMMON` in `tests/helpers/models.py`.
        what: what is unusual about its positions, windows, caches or layers.
        refused: if trees do not support it, a part of the line that says so.
        refused_as_draft: the same, if they support it as target only.
        environment: variables that are set while it is served.
        weights: how the weights are stored: as they are, or quantised by one of the schemes in
            `tests/helpers/models.py`.
        always: whether every test run tries it; others only with `--all-families`.
    """

    name: str
    made_by: str
    options: dict[str, Any] = field(default_factory=dict)
    what: str = ""
    refused: str | None = None
    refused_as_draft: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    weights: str = "float32"
    always: bool = False


GROUPED = {"num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 32}
WINDOW = 20
ALTERNATING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
SHARED_CACHES = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 2048,
    "hidden_size_per_layer_input": 16,
}
MLA = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
}
NO_MLA = {"VLLM_MLA_DISABLE": "1"}


def scaled(rope_type: str, **options: Any) -> dict[str, Any]:
    """Rotary positions beyond the 64 that a model was made for."""
    original = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {"rope_type": rope_type} | original | options}


DEEPSEEK = (
    MLA
    | {
        "q_lora_rank": 32,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    }
    | scaled("yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
)

FAMILIES = (
    Family(
        "Llama 2, Llama 3",
        "Llama",
        HEADS | scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
        "Llama 3's scaled RoPE",
    ),
    Family("Mistral", "Mistral", HEADS | {"sliding_window": WINDOW}, "a window in every layer"),
    Family("Qwen 2, Qwen 2.5", "Qwen2", GROUPED | scaled("yarn", factor=4.0), "YaRN"),
    Family("Qwen 3", "Qwen3", HEADS),
    Family(
        "Qwen 2 MoE",
        "Qwen2Moe",
        GROUPED
        | {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        "experts, one of them shared",
    ),
    Family(
        "Qwen 3 MoE",
        "Qwen3Moe",
        HEADS | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        "experts",
        always=True,
    ),
    Family("Mixtral", "Mixtral", HEADS | {"num_local_experts": 4}, "experts", always=True),
    Family("Gemma 2", "Gemma2", HEADS | ALTERNATING, "soft caps, windows in every other layer"),
    Family(
        "Gemma 3",
        "Gemma3Text",
        HEADS | ALTERNATING,
        "two RoPE bases, windows in some layers",
    ),
    Family(
        "Gemma 3n",
        "Gemma3nText",
        HEADS
        | SHARED_CACHES
        | {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8, "altup_num_inputs": 2},
        "layers that share a cache, windows in some layers; as a text model",
    ),
    Family(
        "Gemma 4",
        "Gemma4Text",
        HEADS | SHARED_CACHES | {"global_head_dim": 64},
        "layers that share a cache, heads of two sizes, windows in some layers; as a text model",
        always=True,
    ),
    Family(
        "Phi-3, Phi-4-mini",
        "Phi3",
        GROUPED
        | {"original_max_position_embeddings": 8, "pad_token_id": 0}
        | scaled(
            "longrope",
            short_factor=[1.0] * 16,
            long_factor=[1.0 + i / 4 for i in range(16)],
            original_max_position_embeddings=8,
        ),
        "LongRoPE",
        always=True,
    ),
    Family("Phi-2", "Phi", {}, "partly rotated heads, parallel blocks"),
    Family(
        "OPT",
        "OPT",
        {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        "learned positions, projections into and out of the layers (350m)",
        always=True,
    ),
    Family("GPT-2", "GPT2", {}, "learned positions"),
    Family("GPT-J", "GPTJ", {"rotary_dim": 16}, "partly rotated heads, interleaved"),
    Family("GPT-NeoX, Pythia", "GPTNeoX", {}, "partly rotated heads, parallel blocks"),
    Family("Falcon", "Falcon", {"alibi": False}, "one KV head, parallel blocks"),
    Family("StableLM", "StableLm", GROUPED, "partly rotated heads"),
    Family("StarCoder 2", "Starcoder2", GROUPED | {"sliding_window": WINDOW}, "windows"),
    Family(
        "Granite 3",
        "Granite",
        GROUPED
        | {"embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
        "scaled embeddings, attention and residuals",
    ),
    Family("OLMo 2", "Olmo2", GROUPED, "norms after the blocks"),
    Family("OLMo 3", "Olmo3", GROUPED | ALTERNATING, "windows in some layers"),
    Family("SmolLM 3", "SmolLM3", GROUPED | {"no_rope_layers": [1, 0]}, "layers without RoPE"),
    Family(
        "Command R7B, Command A",
        "Cohere2",
        GROUPED | ALTERNATING,
        "windows with RoPE, other layers without either",
    ),
    Family("GLM-4", "Glm4", HEADS, "partly rotated heads, interleaved"),
    Family("EXAONE 4", "Exaone4", GROUPED | ALTERNATING, "windows with RoPE, others without"),
    Family(
        "gpt-oss",
        "GptOss",
        HEADS
        | ALTERNATING
        | {"num_local_experts": 4, "num_experts_per_tok": 2}
        | scaled("yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False),
        "attention sinks, windows in every other layer, experts, YaRN; tried without MXFP4, which "
        "vLLM runs on GPUs and with AMX",
        always=True,
    ),
    Family("DeepSeek V2, V3 and others with MLA", "DeepseekV2", DEEPSEEK, refused="uses MLA"),
    Family(
        "DeepSeek V2 with `VLLM_MLA_DISABLE=1`",
        "DeepseekV2",
        DEEPSEEK,
        "vLLM's own way to serve it with plain attention, at the price of a larger KV cache",
        environment=NO_MLA,
    ),
    Family(
        "DeepSeek V3 with `VLLM_MLA_DISABLE=1`",
        "DeepseekV3",
        DEEPSEEK | {"topk_method": "noaux_tc"},
        "the same",
        refused_as_draft="MTP layers that vLLM loads as DeepSeekMTPModel cannot draft trees",
        environment=NO_MLA,
    ),
    Family(
        "Jamba",
        "Jamba",
        {"num_experts": 1, "num_experts_per_tok": 1},
        "as all hybrid models",
        refused="recurrent (Mamba-like) layers",
    ),
    Family("Mamba", "Mamba", {"state_size": 8}, "", refused="recurrent (Mamba-like) layers"),
    Family("BLOOM", "Bloom", {}, "as all models with ALiBi", refused="uses ALiBi"),
    Family(
        "W8A8",
        "Llama",
        HEADS,
        "8-bit weights and activations, in the format of compressed-tensors",
        weights="w8a8",
        always=True,
    ),
)


CUTTABLE = (
    "Llama 2, Llama 3",
    "Mistral",
    "Qwen 2, Qwen 2.5",
    "Qwen 3",
    "Gemma 2",
    "Gemma 3",
    "Phi-3, Phi-4-mini",
    "OPT",
    "GPT-2",
    "GPT-J",
    "Falcon",
    "StableLM",
    "Granite 3",
    "Command R7B, Command A",
    "GLM-4",
    "EXAONE 4",
    "Qwen 2 MoE",
    "Qwen 3 MoE",
    "Mixtral",
    "gpt-oss",
    "W8A8",
)
"""The families whose first layers are tried as the draft (`tests/engine/test_early_exit.py`)."""


def cut_families() -> str:
    """Their names, as a sentence."""
    return "; ".join(CUTTABLE) + "."


def families() -> str:
    """The table of all families, with what the recorded run saw."""
    seen = json.loads(RECORD.read_text())["families"]
    rows = []
    for family in FAMILIES:
        refused = (family.refused, family.refused or family.refused_as_draft)
        states = ["works" if why is None else "refused" for why in refused]
        reasons = [why for why in (family.refused, family.refused_as_draft) if why is not None]
        rows.append(
            [
                family.name,
                f"`{seen[family.name]}`" if family.name in seen else "",
                *states,
                "; ".join([*reasons, *([family.what] if family.what else [])]),
            ]
        )
    return table(["family", "class in vLLM", "as target", "as draft", "notes"], rows)


def recorded_with() -> str:
    """The versions of the recorded run."""
    record = json.loads(RECORD.read_text())
    return f"vLLM {record['vllm']} and transformers {record['transformers']}"
