# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 and EAGLE heads without an engine, on the hidden states of a transformers model.

The definitions are those of `vllm_spechub/proposers/heads.py`: a row joins the target's hidden
state at a position with the token after it, and below the root the hidden state that the head
itself gave for the parent takes its place. The layers are those of transformers.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import nn
from transformers import Cache, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.registry import _SPECULATIVE_DECODING_MODELS
from vllm.transformers_utils.config import get_config

from vllm_spechub.drafts.fit import (
    TargetSize,
    aux_layers,
    check_fit,
    check_tokens,
    fed_size,
    num_aux_layers,
)
from vllm_spechub.drafts.kinds import EAGLE, EAGLE3, Head, check_kind, read_head
from vllm_spechub.drafts.sources import Sources

# By how vLLM runs a head: its configuration and layer in transformers.
_FAMILIES = {
    "EagleLlamaForCausalLM": (LlamaConfig, LlamaDecoderLayer),
    "Eagle3LlamaForCausalLM": (LlamaConfig, LlamaDecoderLayer),
    "Eagle3Qwen3ForCausalLM": (Qwen3Config, Qwen3DecoderLayer),
}


def family_of(config: PretrainedConfig, head: Head) -> str | None:
    """Which of `_FAMILIES` a head is of; None for one that runs in engines only.

    Args:
        config: as vLLM reads it.
        head: what kind it is.
    """
    if head.kind not in (EAGLE, EAGLE3):
        return None
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return None
    prefix = "Eagle3" if head.kind == EAGLE3 else "Eagle"
    # the first heads are named as a model that runs by itself
    names = [name for each in config.architectures or () for name in (each, prefix + each)]
    run = (_SPECULATIVE_DECODING_MODELS.get(name, ("", ""))[1] for name in names)
    return next((family for family in run if family in _FAMILIES), None)


def needs_engine(sources: Sources) -> bool:
    """Whether a pair's draft is a head that cannot be loaded here."""
    head = read_head(sources.draft, **sources.draft_options)
    return head is not None and family_of(_config(sources), head) is None


def _config(sources: Sources) -> PretrainedConfig:
    """A head's configuration, as vLLM reads it."""
    options: dict[str, Any] = {"trust_remote_code": False} | sources.draft_options
    return get_config(sources.draft, **options)


class HeadDescription(NamedTuple):
    """What is known of a head before its weights are loaded."""

    name: str
    kind: str
    # as vLLM reads it
    config: PretrainedConfig
    # of `_FAMILIES`
    family: str
    target: TargetSize
    option: str

    @classmethod
    def read(
        cls, option: str, sources: Sources, head: Head, target: PretrainedConfig
    ) -> "HeadDescription":
        """Check what the configurations of a head and of its target say.

        Args:
            option: what named the head, for messages.
            sources: where the head comes from.
            head: what kind it is.
            target: the target's configuration.

        Raises:
            ValueError: one line: the head does not fit the target, or runs in engines only.
        """
        name, config = sources.draft, _config(sources)
        check_kind(option, name, head)
        family = family_of(config, head)
        if family is None:
            raise ValueError(
                f"{option} {name!r} is a head ({head.sign}), which runs only in an engine with its "
                "target: `vllm-spechub tune` measures it there"
            )
        size = TargetSize(target.hidden_size, target.vocab_size, target.num_hidden_layers)
        check_fit(option, head.kind, config, size)
        return cls(name, head.kind, config, family, size, option)

    @property
    def draft_vocab_size(self) -> int:
        """The number of tokens that the head can draft."""
        return getattr(self.config, "draft_vocab_size", None) or self.config.vocab_size

    def weights(self) -> dict[str, torch.Tensor]:
        """The head's weights by the names of `OfflineHead`."""
        folder = Path(self.name)
        if not folder.is_dir():
            files = ["*.safetensors", "pytorch_model*.bin"]
            folder = Path(snapshot_download(self.name, allow_patterns=files))
        found: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        for file in [] if found else sorted(folder.glob("pytorch_model*.bin")):
            found |= torch.load(file, map_location="cpu", weights_only=True)
        return {
            name.removeprefix("model.").replace("midlayer.", "layers.0."): weight
            for name, weight in found.items()
            # t2d only says which tokens d2t maps to
            if "rotary_emb" not in name and name != "t2d"
        }

    def load(
        self, target: PreTrainedModel, device: str | torch.device, dtype: torch.dtype
    ) -> "OfflineHead":
        """Load the weights.

        Raises:
            ValueError: one line that names the weights that are missing or not understood.
        """
        weights = self.weights()
        if self.draft_vocab_size == self.target.vocab_size:
            weights.pop("d2t", None)  # vLLM does not read it either
        else:
            check_tokens(self.option, self.name, weights.get("d2t"), self.target.vocab_size)
        with torch.device("meta"):
            head = OfflineHead(self, weights)
        cast = {
            name: weight.to(device, dtype if weight.is_floating_point() else None)
            for name, weight in weights.items()
        }
        own = head.state_dict()
        wrong = own.keys() ^ cast.keys()
        wrong |= {name for name in own.keys() & cast.keys() if own[name].shape != cast[name].shape}
        if wrong:
            raise ValueError(
                f"{self.option} {self.name!r}: {', '.join(sorted(wrong))} in its weights are "
                "missing, unknown or of another shape than its configuration says"
            )
        head.load_state_dict(cast, assign=True)
        head.rotary = LlamaRotaryEmbedding(head.config).to(device)
        # a head without its own reads and gives its target's tokens as the target does
        for name, shared in (
            ("embed_tokens", target.get_input_embeddings()),
            ("lm_head", target.get_output_embeddings()),
        ):
            if getattr(head, name) is None:
                setattr(head, name, shared)
        return head.eval().requires_grad_(False)


class OfflineHead(nn.Module):
    """A head beside its target.

    Args:
        description: what it is.
        weights: what the checkpoint has; the target's embedding and output matrix take the place of
            missing ones.
    """

    # of transformers, whose layers have more names than `nn.Module` tells
    layers: Any
    embed_tokens: Any
    lm_head: Any
    rotary: LlamaRotaryEmbedding
    d2t: torch.Tensor | None

    def __init__(self, description: HeadDescription, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        read, kind = description.config, description.kind
        make_config, make_layer = _FAMILIES[description.family]
        config = make_config(**read.to_dict(), attn_implementation="sdpa")
        size, eps = config.hidden_size, config.rms_norm_eps
        self.kind, self.config, self.vocab_size = kind, config, description.target.vocab_size
        self.logit_scale = getattr(read, "logit_scale", 1.0)
        self.norm_before_residual = getattr(read, "norm_before_residual", False)
        self.norm_output = getattr(read, "norm_output", False)
        self.layers = nn.ModuleList(make_layer(config, i) for i in range(config.num_hidden_layers))
        first: Any = self.layers[0]
        if kind == EAGLE3:
            self.aux_layers = sorted(aux_layers(read, description.target.num_layers))
            joined = num_aux_layers(read) * fed_size(kind, read)
            options = getattr(read, "eagle_config", None) or {}
            if options.get("norm_before_fc", getattr(read, "norm_before_fc", False)):
                self.input_norm = LlamaRMSNorm(joined, eps)
            if getattr(read, "fc_norm", False):
                norms = (LlamaRMSNorm(fed_size(kind, read), eps) for _ in self.aux_layers)
                self.fc_norm = nn.ModuleList(norms)
            self.fc = nn.Linear(joined, size, bias=False)
            for name in ("q_proj", "k_proj", "v_proj"):
                narrow = getattr(first.self_attn, name)
                wide = nn.Linear(2 * size, narrow.out_features, bias=narrow.bias is not None)
                setattr(first.self_attn, name, wide)
            first.hidden_norm = LlamaRMSNorm(size, eps)
            self.norm = LlamaRMSNorm(size, eps)
        else:
            self.fc = nn.Linear(2 * size, size, bias=False)
            first.input_layernorm = nn.Identity()
        own_size = description.draft_vocab_size
        self.embed_tokens = self.lm_head = None
        if "embed_tokens.weight" in weights:
            self.embed_tokens = nn.Embedding(config.vocab_size, size)
        if "lm_head.weight" in weights or own_size != self.vocab_size:
            self.lm_head = nn.Linear(size, own_size, bias=False)
        offsets = torch.zeros(own_size, dtype=torch.int64) if "d2t" in weights else None
        self.register_buffer("d2t", offsets)

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def read_target(
        self,
        target: PreTrainedModel,
        # [num_texts, length] int64
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """What the head is fed of the target's hidden states. [num_texts, length, hidden_size]"""
        decoder: Any = target.get_decoder()
        if self.kind == EAGLE:
            return decoder(input_ids=tokens).last_hidden_state
        last: list[torch.Tensor] = []

        def keep(module, inputs, output):
            last.append(output[0] if isinstance(output, tuple) else output)

        # transformers norms the last of its hidden states
        hook = decoder.layers[-1].register_forward_hook(keep)
        streams = decoder(input_ids=tokens, output_hidden_states=True).hidden_states
        hook.remove()
        joined = torch.cat([(*streams[:-1], *last)[layer] for layer in self.aux_layers], dim=-1)
        if hasattr(self, "input_norm"):
            joined = self.input_norm(joined)
        if hasattr(self, "fc_norm"):
            parts = joined.chunk(len(self.fc_norm), dim=-1)
            parts = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            joined = torch.cat(parts, dim=-1)
        return self.fc(joined)

    def forward(
        self,
        # [batch_size, num_rows] int64
        tokens: torch.Tensor,
        # [batch_size, num_rows, hidden_size]
        fed: torch.Tensor,
        # [batch_size, num_rows] int64, of the hidden states
        positions: torch.Tensor,
        # [batch_size, 1, num_rows, num_columns], what is added to attention scores; None if causal
        mask: torch.Tensor | None,
        # of the rows before, to which these are added
        cache: Cache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what logits are made of, and what children are fed; both as `fed`."""
        # not the target's own call, which may scale what it embeds
        embeddings = nn.functional.embedding(tokens, self.embed_tokens.weight)
        rotated = self.rotary(fed, positions)
        stream = fed
        for layer in self.layers:
            if layer is not self.layers[0]:
                rows = layer.input_layernorm(stream)
            elif self.kind == EAGLE3:
                normed = layer.hidden_norm(fed)
                stream = normed if self.norm_before_residual else fed
                rows = torch.cat([layer.input_layernorm(embeddings), normed], dim=-1)
            else:
                rows = stream = self.fc(torch.cat([embeddings, fed], dim=-1))
            seen, _ = layer.self_attn(
                hidden_states=rows,
                attention_mask=mask,
                past_key_values=cache,
                position_embeddings=rotated,
            )
            stream = stream + seen
            stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
        if self.kind == EAGLE:
            return stream, stream
        last = self.norm(stream)
        return last, last if self.norm_output else stream

    def logits(
        self,
        # [..., hidden_size], of `forward`
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Over the target's tokens, -inf where the head has none. [..., vocab_size]"""
        own = nn.functional.linear(rows, self.lm_head.weight) * self.logit_scale
        if self.d2t is None:
            return own
        tokens = torch.arange(len(self.d2t), device=own.device) + self.d2t
        found = own.new_full((*own.shape[:-1], self.vocab_size), -torch.inf)
        return found.index_copy_(-1, tokens, own)
