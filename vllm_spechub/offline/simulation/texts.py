# SPDX-License-Identifier: Apache-2.0
"""The pair of models, the prompts, and texts that are sampled from the target."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelPair:
    """A target and a draft over one vocabulary."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, target: str, draft: str, device: str, dtype: torch.dtype) -> "ModelPair":
        """Load both from Hugging Face folders or names.

        Raises:
            ValueError: the vocabularies differ in size.
        """

        def load(name: str) -> PreTrainedModel:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            torch.nn.Module.to(model, device)
            return model.eval()

        models = load(target), load(draft)
        sizes = [model.config.get_text_config().vocab_size for model in models]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"DRAFT has vocab_size={sizes[1]}, TARGET has {sizes[0]}: they must be the same"
            )
        return cls(*models, AutoTokenizer.from_pretrained(target))

    @property
    def vocab_size(self) -> int:
        return self.target.config.get_text_config().vocab_size

    @property
    def max_positions(self) -> int:
        """The number of positions that both models can read."""
        configs = (model.config.get_text_config() for model in (self.target, self.draft))
        return min(getattr(config, "max_position_embeddings", 1 << 30) for config in configs)

    def encode(self, prompt: str, max_tokens: int) -> torch.Tensor:
        """The prompt's last `max_tokens` tokens. [num_tokens] int64"""
        ids = self.tokenizer(prompt)["input_ids"][-max_tokens:]
        if not ids:
            start = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0
            ids = [start]
        return torch.tensor(ids, device=self.target.device)


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Read prompts from a file: JSON lines as in Spec-Bench (`prompt`, or `turns`, of which the
    first is used) if its name ends in .jsonl or .json, else text with one prompt per line.

    Raises:
        ValueError: there are no prompts, or a JSON line has neither `turns` nor `prompt`.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = []
    for number, line in enumerate(lines, start=1):
        if path.suffix not in (".jsonl", ".json"):
            prompts.append(line)
            continue
        try:
            record = json.loads(line)
            prompt = record["turns"][0] if "turns" in record else record["prompt"]
        except (ValueError, KeyError, IndexError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(f"{path}, prompt {number}: no `turns` and no `prompt` in it")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts[:limit]


@dataclass(frozen=True)
class Roots:
    """Places in sampled texts where a step may begin; the root is the last emitted token."""

    # [num_texts, length]
    texts: torch.Tensor
    # [num_roots]: which text, and the root's position in it
    text: torch.Tensor
    position: torch.Tensor


@torch.inference_mode()
def sample_roots(
    pair: ModelPair,
    # [num_prompt_tokens]
    prompt: torch.Tensor,
    temperature: float,
    num_texts: int,
    num_tokens: int,
    roots_per_text: int,
    generator: torch.Generator,
) -> Roots:
    """Sample texts from the target, divide each into equal parts, and choose a root in each part.

    Roots are sampled tokens; those from the first end of text on are left out.
    """
    tokens = prompt.expand(num_texts, -1)
    cache, step = None, tokens
    for _ in range(num_tokens):
        out = pair.target(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature == 0:
            step = logits.argmax(dim=1, keepdim=True)
        else:
            step = torch.softmax(logits / temperature, dim=1).multinomial(1, generator=generator)
        tokens = torch.cat([tokens, step], dim=1)
    stretch = num_tokens // roots_per_text
    device = tokens.device
    offset = torch.randint(stretch, (num_texts, roots_per_text), generator=generator, device=device)
    position = len(prompt) + torch.arange(roots_per_text, device=device) * stretch + offset
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    if pair.tokenizer.eos_token_id is not None:
        ended |= tokens == pair.tokenizer.eos_token_id
        ended[:, : len(prompt)] = False
        ended = ended.cumsum(dim=1) > 0
    text, column = (~ended.gather(1, position)).nonzero(as_tuple=True)
    return Roots(tokens, text, position[text, column])
