# SPDX-License-Identifier: Apache-2.0
"""Whether a model that runs by itself fits a target that it stands beside: as its draft, or as a
member of what is verified."""

from bisect import bisect_left
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config, get_tokenizer
from vllm.tokenizers.registry import tokenizer_args_from_config

from vllm_spechub.drafts.kinds import Head, head_of, tensor_names
from vllm_spechub.drafts.vocabulary import check_vocabularies, first_line


def check_folder(option: str, model: Any) -> None:
    """Check that what looks like a folder is one.

    Args:
        option: what named it, for the message.

    Raises:
        ValueError: one line.
    """
    if str(model).startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ValueError(f"{option}: there is no folder {model!r}")


def head_in(model: ModelConfig) -> Head | None:
    """What kind of head it is; None for a model that runs by itself."""
    return head_of(model.hf_config, tensor_names(model.model, model.revision))


def check_fit(option: str, what: str, model: ModelConfig, target: ModelConfig) -> None:
    """Check that a model reads what its target reads.

    Args:
        option: what named the model, for messages.
        what: what it is to the target: "draft" or "member".

    Raises:
        ValueError: one line that names the option and what is needed.
    """
    if not _reads(model, target.max_model_len):
        most = _longest(model, target.max_model_len)
        raise ValueError(
            f"{option}: the {what} reads {most} positions, the target "
            f"{target.max_model_len}; set max_model_len to at most {most}, or lengthen both "
            f"with hf_overrides as a function, which vLLM applies to the {what} too"
        )
    # vLLM 0.33 would serve the target with a shorter context otherwise
    model.max_model_len = max(model.max_model_len, target.max_model_len)
    _check_tokenizers(option, what, model, target)


def _reads(model: ModelConfig, length: int) -> bool:
    """Whether vLLM would serve the model with so long a context. Its `max_model_len` does not say
    so: for some scaled position embeddings (LongRoPE) that is the length before they are scaled.
    """
    try:
        model.get_and_verify_max_len(length)
    except ValueError:
        return False
    return True


def _longest(model: ModelConfig, too_long: int) -> int:
    """The longest context that vLLM would serve the model with, below one that is too long."""
    return bisect_left(range(too_long), True, lo=1, key=lambda n: not _reads(model, n + 1))


def _check_tokenizers(option: str, what: str, model: ModelConfig, target: ModelConfig) -> None:
    """Compare the tokenizers, unless the user says that there is none."""
    try:
        target_tokenizer = cached_tokenizer_from_config(target)  # the one that requests get
    except Exception as error:
        raise ValueError(
            f"tokenizer: {target.tokenizer!r} has none that can be loaded "
            f"({first_line(error)}); with skip_tokenizer_init=True the engine takes token ids"
        ) from error
    if target_tokenizer is None:
        return
    # in the target's format: one repository may hold Mistral's and Hugging Face's
    mode, *_ = tokenizer_args_from_config(target)
    options: dict[str, Any] = {}
    if model.code_revision is not None:
        options["code_revision"] = model.code_revision
    check_vocabularies(
        option,
        (model.get_vocab_size(), target.get_vocab_size()),
        lambda: get_tokenizer(
            model.model,
            tokenizer_mode=mode,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        ),
        target_tokenizer,
        what,
    )
