# SPDX-License-Identifier: Apache-2.0
"""`SpecHubConfig`: what `--speculative-config` accepts.

Nothing here loads weights: every refusal is raised while vLLM is still building its configuration.
"""

from dataclasses import field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, field_validator
from vllm.config import SpeculativeConfig
from vllm.config.utils import config

from vllm_spechub.registry import METHOD, PROPOSERS, RULES
from vllm_spechub.trees.best_tree import parse_tree
from vllm_spechub.trees.measured_schedule import measured_schedule
from vllm_spechub.trees.schedule import TreeSchedule
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

DEFAULT_TREE = "binary:3"

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

    `method` is the proposer's `vllm_method` and `num_speculative_tokens` is the number of drafted
    nodes, so that the scheduler, the KV cache manager and every method check treat a tree as they
    treat a chain of that length, drafted by that method.
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
    proposer_options: dict[str, Any] = field(default_factory=dict)
    """The values of the options that the proposer alone reads (`TreeProposer.options`)."""

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


def spechub_config(vllm_config: "VllmConfig") -> SpecHubConfig:
    """The speculative configuration of an engine that `is_spechub`."""
    config = vllm_config.speculative_config
    if not isinstance(config, SpecHubConfig):
        raise TypeError(f"not a spechub configuration: {config!r}")
    return config


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
    for key, registry in (("verification", RULES), ("proposer", PROPOSERS)):
        if key in options and options[key] not in registry:
            raise ValueError(
                f"speculative_config[{key!r}] is {options[key]!r}, allowed: {', '.join(registry)}"
            )
    proposer = PROPOSERS.load(options.get("proposer", SpecHubConfig.proposer))
    allowed = (*ALLOWED_KEYS, *sorted(proposer.options))
    for key in options:
        if key not in allowed:
            reason = ""
            if key == "num_speculative_tokens":
                reason = " (--spec-tokens): with spechub the tree says how many tokens are drafted"
            if key == "use_heterogeneous_vocab":
                reason = ": draft and target need one vocabulary"
            raise ValueError(
                f"speculative_config[{key!r}] is not an option of method {METHOD!r}{reason}. "
                f"Allowed: {', '.join(allowed)}"
            )
    options.pop("method", None)
    sharpening = options.get("sharpening", 1.0)
    if type(sharpening) not in (int, float) or not 0 < sharpening < float("inf"):
        raise ValueError(
            f"speculative_config['sharpening'] is {sharpening!r}, allowed: a finite number above 0"
        )
    proposer.check_options(options, target_model_config)
    proposer_options = {key: options.pop(key) for key in proposer.options if key in options}
    schedule = _schedule(options, target_model_config)
    varies = schedule.nodes_by_batch_size()
    try:
        spechub = SpecHubConfig(
            **options,
            method=proposer.vllm_method,
            proposer_options=proposer_options,
            tree=schedule.trees[0],
            tree_by_batch_size=schedule if varies else None,
            num_speculative_tokens=schedule.trees[0].num_nodes,
            num_speculative_tokens_per_batch_size=varies,
            target_model_config=target_model_config,
            target_parallel_config=target_parallel_config,
        )
    except (ValidationError, OSError, ValueError) as error:
        raise ValueError(f"speculative_config: {_first_line(error)}") from error
    if spechub.method != proposer.vllm_method:
        raise ValueError(
            f"speculative_config['model']: vLLM takes {spechub.model!r} for a draft of method "
            f"{spechub.method!r} by its path or configuration, but proposer {spechub.proposer!r} "
            f"needs {proposer.vllm_method!r}; rename the folder or choose another draft"
        )
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
            by_batch_size = measured_schedule(
                target_model_config.model, options.get("model") or target_model_config.model, rule
            )
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
