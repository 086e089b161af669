# SPDX-License-Identifier: Apache-2.0
"""The pair of models, the prompts, and texts that are sampled from the target."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from vllm_spechub.drafts.sources import Sources
from vllm_spechub.drafts.vocabulary import check_vocabularies, first_line, is_made_up

if TYPE_CHECKING:
    from vllm_spechub.drafts.kinds import Head
    from vllm_spechub.offline.heads import HeadDescription, OfflineHead

UNLIMITED = 1 << 30
"""The positions that a model reads whose configuration names no number."""


@dataclass(frozen=True)
class PairDescription:
    """What is known of a pair before weights are loaded."""

    sources: Sources
    # of the target
    tokenizer: PreTrainedTokenizerBase
    target_config: PretrainedConfig
    # None for a head
    draft_config: PretrainedConfig | None
    # positions that both models read
    max_positions: int
    # of a draft that is a head
    head: "HeadDescription | None" = None
    # how many of the draft's layers run; None for all
    draft_layers: int | None = None

    @classmethod
    def read(
        cls, sources: Sources, draft_option: str = "DRAFT", draft_layers: int | None = None
    ) -> "PairDescription":
        """Read configurations and tokenizers.

        Args:
            sources: Hugging Face folders or names.
            draft_option: what named the draft, for messages.
            draft_layers: how many of the draft's layers run; None for all.

        Raises:
            ValueError: the target has no tokenizer, the draft has another vocabulary or fewer
                layers, it is multimodal, or a head of another target or one that runs in engines
                only.
        """
        target = AutoConfig.from_pretrained(sources.target, **sources.target_options)
        target.update(sources.overrides)
        own = target.get_text_config()
        head = _describe_head(draft_option, sources, own)
        draft = None
        if head is None:
            draft = AutoConfig.from_pretrained(sources.draft, **sources.draft_options)
            if _reads_images(draft):
                raise ValueError(
                    f"{draft_option} {sources.draft!r} is multimodal, but a draft reads text only; "
                    "use a text model of the target's vocabulary"
                )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                sources.tokenizer, **sources.tokenizer_options
            )
        except Exception as error:  # each kind of tokenizer has its own
            raise ValueError(f"{_named(sources)} has no tokenizer: {first_line(error)}") from error
        if is_made_up(tokenizer):
            raise ValueError(f"{_named(sources)} has no tokenizer")
        # a head reads what its target reads
        read = own if draft is None else draft.get_text_config()
        if draft is not None:
            check_vocabularies(
                draft_option,
                (read.vocab_size, own.vocab_size),
                lambda: AutoTokenizer.from_pretrained(sources.draft, **sources.draft_options),
                tokenizer,
            )
        most = read.num_hidden_layers
        if draft_layers is not None and not 1 <= draft_layers <= most:
            raise ValueError(f"--draft-layers is {draft_layers}, allowed: 1 to {most}")
        lengths = (getattr(config, "max_position_embeddings", None) for config in (own, read))
        longest = min(length or UNLIMITED for length in lengths)
        return cls(sources, tokenizer, target, draft, longest, head, draft_layers)

    @property
    def vocab_size(self) -> int:
        """The target's."""
        return self.target_config.get_text_config().vocab_size

    def encode(self, prompt: str, max_tokens: int) -> torch.Tensor:
        """The prompt's last `max_tokens` tokens, at least one. [num_tokens] int64, on the CPU"""
        ids = self.tokenizer(prompt)["input_ids"][-max_tokens:]
        if not ids:
            ids = [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0]
        return torch.tensor(ids)

    def load(self, device: str | torch.device, dtype: torch.dtype) -> "ModelPair":
        """Load both models' weights."""

        def load(name: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
            # asked without images, it is a text model
            loader = AutoModelForImageTextToText if _reads_images(config) else AutoModelForCausalLM
            model: PreTrainedModel = loader.from_pretrained(
                name, config=config, dtype=dtype, **options
            )
            torch.nn.Module.to(model, device)
            return model.eval()

        sources = self.sources
        target = load(sources.target, self.target_config, sources.target_options)
        if self.head is not None:
            return ModelPair(target, self.head.load(target, device, dtype), self)
        assert self.draft_config is not None  # only heads have none
        draft = load(sources.draft, self.draft_config, sources.draft_options)
        if self.draft_layers is not None:
            _cut(draft, self.draft_layers)
        draft_size = self.draft_config.get_text_config().vocab_size
        if draft_size != self.vocab_size:
            _fit_vocabulary(draft, draft_size, self.vocab_size)
        return ModelPair(target, draft, self)


def _reads_images(config: PretrainedConfig) -> bool:
    """Whether transformers has a model only with its images' encoder."""
    kind = type(config)
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def read_head(draft: str, **options: Any) -> "Head | None":
    """What kind of head a draft is; None for a model, and without vLLM, which knows the kinds."""
    if find_spec("vllm") is None:
        return None
    from vllm_spechub.drafts import kinds

    return kinds.read_head(draft, **options)


def _describe_head(
    option: str, sources: Sources, target: PretrainedConfig
) -> "HeadDescription | None":
    head = read_head(sources.draft, **sources.draft_options)
    if head is None:
        return None
    from vllm_spechub.offline.heads import HeadDescription

    return HeadDescription.read(option, sources, head, target)


def _named(sources: Sources) -> str:
    """What names the tokenizer, for messages."""
    tokenizer = sources.engine.get("tokenizer")
    return f"tokenizer {tokenizer!r}" if tokenizer else f"TARGET {sources.target!r}"


def _cut(draft: PreTrainedModel, layers: int) -> None:
    """Leave a draft its first layers, as `draft_layers` does in an engine.

    Raises:
        ValueError: its layers are not where transformers usually has them.
    """
    most = draft.config.get_text_config().num_hidden_layers
    lists = [
        (part, name)
        for part in draft.modules()
        for name, child in part.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == most
    ]
    if len(lists) != 1:
        raise ValueError(f"--draft-layers: {type(draft).__name__} cannot be cut; leave it out")
    (part, name), *_ = lists
    setattr(part, name, getattr(part, name)[:layers])
    draft.config.get_text_config().num_hidden_layers = layers


def _fit_vocabulary(draft: PreTrainedModel, own_size: int, size: int) -> None:
    """Make a draft take and give `size` tokens, as the engine does: what it pads beyond them is cut
    off, and what it lacks is read as its last token and never drafted."""

    def read(model, args, kwargs):
        return args, kwargs | {"input_ids": kwargs["input_ids"].clamp(max=own_size - 1)}

    def give(model, args, output):
        output.logits = torch.nn.functional.pad(
            output.logits, (0, size - own_size), value=-torch.inf
        )
        return output

    draft.register_forward_pre_hook(read, with_kwargs=True)
    draft.register_forward_hook(give)


@dataclass(frozen=True)
class ModelPair:
    """A target and a draft over one vocabulary. Called with `input_ids` by name, each gives logits
    [num_rows, num_tokens, vocab_size], unless the draft is a head."""

    target: PreTrainedModel
    draft: Union[PreTrainedModel, "OfflineHead"]
    description: PairDescription

    @classmethod
    def load(
        cls, target: str, draft: str, device: str | torch.device, dtype: torch.dtype
    ) -> "ModelPair":
        """Check and load both from Hugging Face folders or names.

        Raises:
            ValueError: as `PairDescription.read`.
        """
        return PairDescription.read(Sources(target, draft)).load(device, dtype)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's."""
        return self.description.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.description.vocab_size

    @property
    def max_positions(self) -> int:
        """The number of positions that both models can read."""
        return self.description.max_positions

    def encode(self, prompt: str, max_tokens: int) -> torch.Tensor:
        """The prompt's last `max_tokens` tokens, at least one. [num_tokens] int64"""
        return self.description.encode(prompt, max_tokens).to(self.target.device)


JSON_LINES = (".jsonl", ".json", ".ndjson")
"""Files of prompts that are read as JSON Lines; any other is text."""


def read_prompts(path: Path, limit: int | None = None) -> list[str]:
    """Read prompts from a file in UTF-8, with or without a byte-order mark.

    If its name ends in .jsonl, .json or .ndjson, it holds JSON Lines as in Spec-Bench (`prompt`, or
    `turns`, of which the first is used), else text with one prompt per line. Lines end with LF or
    CRLF and nothing else. Blank lines are skipped.

    Raises:
        ValueError: there are no prompts, or a line holds none; the message names file and line.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    is_json = path.suffix.lower() in JSON_LINES
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip(" \t\r"):
            continue
        try:
            prompts.append(_prompt_of_record(line) if is_json else _prompt_of_text(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return prompts[:limit]


def _prompt_of_text(line: str) -> str:
    if "\0" in line:
        raise ValueError("a NUL character in it; text must be UTF-8, not UTF-16")
    return line


def _prompt_of_record(line: str) -> str:
    """Raises: ValueError, for what is no record of a prompt."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError("no JSON object; JSON Lines have one in every line, and no list around")
    if "turns" in record:
        turns = record["turns"]
        if not (isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns)):
            raise ValueError("`turns` is not a list of strings")
        prompt = turns[0]
    elif "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str):
            raise ValueError("`prompt` is not a string")
    else:
        raise ValueError("no `turns` and no `prompt` in it")
    if not prompt:
        raise ValueError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair in it, which no UTF-8 has") from None
    return prompt


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
