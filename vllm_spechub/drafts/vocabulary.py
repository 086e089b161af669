# SPDX-License-Identifier: Apache-2.0
"""Whether a draft has its target's vocabulary, by the tokenizers of both.

The engine and the commands load tokenizers in different ways, and check them here.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

logger = logging.getLogger("vllm.spechub")


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...


def check_vocabularies(
    option: str,
    sizes: tuple[int, int],
    load_draft_tokenizer: Callable[[], Tokenizer],
    target_tokenizer: Tokenizer,
    what: str = "draft",
) -> None:
    """Check that both models mean the same tokens.

    The target may have added tokens that the draft lacks, such as those for images. Otherwise the
    models' sizes may differ by padding, that is by ids that no token of the tokenizer has. If one
    of them has no tokenizer, only their sizes are compared.

    Args:
        option: what named the draft, for messages.
        sizes: `vocab_size` of the draft and of the target.
        load_draft_tokenizer: may raise anything if there is none.
        target_tokenizer: the target's.
        what: the draft, or what else the other model is to the target.

    Raises:
        ValueError: one line that names the option and what differs.
    """
    draft_size, target_size = sizes
    shared = target_tokenizer.get_vocab()
    try:
        draft_tokenizer = load_draft_tokenizer()
        own = draft_tokenizer.get_vocab()
    except Exception as error:
        own, unknown = {}, f"the {what}'s tokenizer cannot be loaded ({first_line(error)})"
    else:
        made_up = [
            name
            for name, tokenizer in ((what, draft_tokenizer), ("target", target_tokenizer))
            if is_made_up(tokenizer)
        ]
        unknown = f"the {made_up[0]} has no tokenizer" if made_up else None
    if unknown is not None:
        if draft_size != target_size:
            raise ValueError(
                f"{option}: the {what} has vocab_size={draft_size} and the target {target_size}, "
                f"which may differ by padding only, but {unknown}; put the tokenizer's files "
                "beside the model's weights"
            )
        logger.warning("%s: the %s's vocabulary is not checked: %s", option, what, unknown)
        return
    lacking = target_tokenizer.get_added_vocab().keys() - own.keys()
    common = {token: number for token, number in shared.items() if token not in lacking}
    if own != common:
        different = _first_difference(own, common)
        raise ValueError(
            f"{option}: the {what}'s tokenizer differs from the target's (first in "
            f"{different!r}); {what} and target need one vocabulary"
        )
    if max(common.values()) >= min(sizes) and draft_size != target_size:
        raise ValueError(
            f"{option}: the {what}'s vocab_size={draft_size} and the target's "
            f"vocab_size={target_size} may differ by padding only, but the tokenizer's ids go up "
            f"to {max(common.values())}"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0].rstrip(" :") or type(error).__name__


def is_made_up(tokenizer: Tokenizer) -> bool:
    """Whether it has special tokens only: transformers makes up such a one for some models that
    have no files of a tokenizer."""
    return tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys()


def _first_difference(own: Mapping[str, int], shared: Mapping[str, int]) -> str:
    """The token with the smallest id that only one of them has, or that has two ids."""
    different = own.items() ^ shared.items()
    return min(different, key=lambda entry: (entry[1], entry[0]))[0]
