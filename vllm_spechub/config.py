# SPDX-License-Identifier: Apache-2.0
"""`SpecHubConfig`, and the options of `--speculative-config` that it is built from.

Nothing here loads weights: every refusal is raised while vLLM is still building its configuration.
"""

from collections.abc import Callable, Collection
from dataclasses import field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError
from vllm.config import LoadConfig, SpeculativeConfig
from vllm.config.cache import CacheDType
from vllm.config.utils import config

from vllm_spechub.drafts.alone import check_fit, check_folder, head_in
from vllm_spechub.drafts.kinds import MODEL, MTP, proposer_for
from vllm_spechub.drafts.vocabulary import first_line
from vllm_spechub.registry import METHOD, PROPOSERS, RULES
from vllm_spechub.targets.base import MEMBERS, OPTION, Member, TargetDistribution, parse_target
from vllm_spechub.trees.best_tree import parse_tree, shipped_rates
from vllm_spechub.trees.expert_cost import schedule_for_experts
from vllm_spechub.trees.level_tree import LevelTree, Measured
from vllm_spechub.trees.measured_schedule import measured_schedule, measured_widths
from vllm_spechub.trees.schedule import BatchRange, TreeSchedule
from vllm_spechub.trees.tree import TokenTree, Tree
from vllm_spechub.trees.validation import one_line
from vllm_spechub.triton_kernels.rules import DEFAULT_RULE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

DEFAULT_TREE = "binary:3"
DEFAULT_SCHEDULE_ON_CUDA = (
    (1, 8, DEFAULT_TREE),
    (9, 20, "binary:2"),
    (21, 128, "chain:2"),
    (129, None, None),
)
"""What is drafted on CUDA for a dense target unless the user says otherwise. Up to 8 requests a
step mostly reads weights, and nodes are nearly free; from there on they cost arithmetic. The bounds
are an estimate for a target of 8B parameters on an H100 (docs/benchmarks.md); `vllm-spechub tune`
measures them."""
AUTO = "auto"


def default_schedule_on_cuda(experts: int, chosen: int) -> TreeSchedule:
    """What is drafted on CUDA unless the user says otherwise.

    Args:
        experts: of a layer of the target, 0 if it has none.
        chosen: how many of them a token chooses, 0 if that is not known.
    """
    schedule = TreeSchedule.parse(DEFAULT_SCHEDULE_ON_CUDA, DEFAULT_RULE)
    if not experts or not chosen:
        return schedule
    trees = [tree for tree in schedule.trees if isinstance(tree, TokenTree)]
    ranges = schedule_for_experts(experts, chosen, trees, shipped_rates(DEFAULT_RULE))
    return TreeSchedule(tuple(BatchRange(*each) for each in ranges))


HINTS = {
    "num_speculative_tokens": (
        " (--spec-tokens): with spechub the tree says how many tokens are drafted"
    ),
    "use_heterogeneous_vocab": ": draft and target must share one vocabulary",
}
"""What the error adds for options of vLLM that users may expect to work here."""


class Options(BaseModel):
    """The keys that a spechub `--speculative-config` may have. vLLM's other speculative options
    belong to its own methods."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["spechub"] = METHOD
    model: str | None = Field(None, description="a folder or a Hugging Face id")
    """The draft model or head. Without it, the target's own MTP layer drafts, if there is one."""
    verification: str = DEFAULT_RULE
    """The name of the verification rule. It stands before the trees, which may depend on it."""
    tree: TokenTree | LevelTree = TokenTree.parse(DEFAULT_TREE)
    """The draft tree: a family ("binary:3", "kary:4:2", "chain:5", "caterpillar:5:3"), the list of
    its drafted nodes' parents in breadth-first order, where 0 is the root, the list of its drafted
    nodes' paths ([[0], [1], [0, 0]]), "auto[:NODES[:DEPTH]]", the widths of the levels of trees
    that each step decides ("levels:4,7,9,10"), or "levels:auto[:NODES[:DEPTH]]" for widths that
    were measured for the pair."""
    tree_by_batch_size: TreeSchedule | Literal["auto"] | None = None
    """Instead of `tree`, the trees to draft by the number of running requests: [[first, last,
    tree], ...], or "auto" for the schedule that `vllm-spechub tune` measured on this machine."""
    sharpening: float = Field(
        1.0, strict=True, gt=0, allow_inf_nan=False, description="a finite number above 0"
    )
    """The power to which the draft's distribution is raised where a rule samples a child."""
    proposer: str = MODEL
    """The name of the proposer, which drafts the trees; by default the one that fits the draft."""
    target_distribution: TargetDistribution | None = None
    """What is verified, of the target's rows and the draft model's; by default the target's."""
    # The options below are vLLM's own, and are passed on to it unchanged.
    kv_cache_dtype: CacheDType | None = None
    draft_tensor_parallel_size: int | None = Field(
        None, strict=True, ge=1, description="a whole number from 1"
    )
    quantization: str | None = None
    revision: str | None = None
    code_revision: str | None = None
    draft_load_config: LoadConfig | None = None

    @field_validator("verification", "proposer", mode="before")
    @classmethod
    def _is_registered(cls, name: Any, info: ValidationInfo) -> str:
        registry = RULES if info.field_name == "verification" else PROPOSERS
        if name not in registry:
            allowed = ", ".join(registry)
            raise PydanticCustomError("unknown_name", "{allowed}", {"allowed": allowed})
        return name

    @field_validator("tree", mode="before")
    @classmethod
    def _parse_tree(cls, spec: Any, info: ValidationInfo) -> TokenTree | LevelTree:
        return parse_tree(spec, *_parsed_for(info))

    @field_validator("tree_by_batch_size", mode="before")
    @classmethod
    def _parse_schedule(cls, spec: Any, info: ValidationInfo) -> TreeSchedule | str | None:
        if spec is None or spec == AUTO:
            return spec
        return TreeSchedule.parse(spec, *_parsed_for(info))

    @field_validator("target_distribution", mode="before")
    @classmethod
    def _parse_target(cls, spec: Any) -> TargetDistribution | None:
        return None if spec is None else parse_target(spec)


def _parsed_for(info: ValidationInfo) -> tuple[str, Measured | None]:
    """The rule that a tree is parsed for, and what finds the widths that were measured."""
    # An unknown rule has already failed its own check, and its error is the one reported.
    rule = info.data.get("verification", DEFAULT_RULE)
    return rule, partial(info.context["widths"], rule) if info.context else None


VLLM_KEYS = Options.model_fields.keys() & {f.name for f in fields(SpeculativeConfig)} - {"method"}
"""The options that vLLM's configuration has too, under the same names."""


@config(kw_only=True)
class BesideTarget(SpeculativeConfig):
    """vLLM's speculative configuration, of a model that stands beside a target."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, except `method`, which whoever made this decides: vLLM would replace it by
        what it guesses from words in the model's path."""
        if name != "method":
            super().__setattr__(name, value)

    def verify_equal_vocab_size_if_draft_model(self) -> None:
        """Do nothing: vocabularies are compared elsewhere, and may differ by padding."""


@config(kw_only=True)
class SpecHubConfig(BesideTarget):
    """vLLM's speculative configuration with draft trees.

    `method` is the proposer's `vllm_method` and `num_speculative_tokens` the number of drafted
    nodes, so that the scheduler, the KV cache manager and every check of a method treat a tree as
    they treat that method's chain of the same length.
    """

    schedule: TreeSchedule
    """Which tree is drafted for each number of running requests."""
    verification: str
    """The name of the verification rule."""
    sharpening: float
    """The power to which the draft's distribution is raised where a rule samples a child."""
    proposer: str
    """The name of the proposer, which drafts the trees."""
    proposer_options: dict[str, Any] = field(default_factory=dict)
    """The options that the proposer declares itself, in `TreeProposer.options`."""
    target_distribution: TargetDistribution | None = None
    """What is verified; the target's own distribution if None."""
    members: SkipValidation[tuple[BesideTarget, ...]] = ()
    """The further members of what is verified."""

    @property
    def reads_draft(self) -> bool:
        """Whether the draft is a member of what is verified."""
        return self.target_distribution is not None and self.target_distribution.reads_draft

    @property
    def tree(self) -> Tree:
        """The tree with the most nodes, which buffers are sized for."""
        return self.schedule.trees[0]

    def __repr__(self) -> str:
        return (
            f"SpecHubConfig(model={self.model!r}, tree={self.tree}, nodes={self.tree.num_nodes}, "
            f"depth={self.tree.depth}, verification={self.verification!r}, "
            f"sharpening={self.sharpening}, proposer={self.proposer!r}, "
            f"target_distribution={self.target_distribution!r})"
        )


def is_spechub(vllm_config: "VllmConfig") -> bool:
    """Whether an engine drafts trees."""
    return isinstance(vllm_config.speculative_config, SpecHubConfig)


def spechub_config(vllm_config: "VllmConfig") -> SpecHubConfig:
    """The speculative configuration of an engine for which `is_spechub` holds.

    Raises:
        TypeError: the engine has another speculative configuration, or none.
    """
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

    Args:
        options: keys and values of `--speculative-config`.
        target_model_config: of the target.
        target_parallel_config: of the target.

    Raises:
        ValueError: one line that names the key and what is allowed.
    """
    if "proposer" not in options:
        options = options | {"proposer": proposer_for(options, target_model_config)}
    declared = _declared_by_proposer(options)

    def own_options() -> dict[str, Any]:
        proposer = PROPOSERS.load(options["proposer"])
        proposer.check_options(options, target_model_config)
        return proposer.own_options(options, target_model_config)

    def widths(rule: str, nodes: int, depth: int) -> LevelTree:
        draft = _measured_draft(options, target_model_config)
        return measured_widths(target_model_config.model, draft, rule, nodes, depth, own_options())

    given = _validate(options, declared, widths)
    proposer = PROPOSERS.load(given.proposer)
    own = own_options()
    schedule = _schedule(given, own, target_model_config, target_parallel_config)
    try:
        spechub = SpecHubConfig(
            method=proposer.vllm_method,
            schedule=schedule,
            verification=given.verification,
            sharpening=given.sharpening,
            proposer=given.proposer,
            proposer_options=own,
            target_distribution=given.target_distribution,
            num_speculative_tokens=schedule.trees[0].num_nodes,
            num_speculative_tokens_per_batch_size=schedule.nodes_by_batch_size(),
            target_model_config=target_model_config,
            target_parallel_config=target_parallel_config,
            **{key: getattr(given, key) for key in VLLM_KEYS}
            | proposer.vllm_options(target_model_config),
        )
    except ValidationError as error:
        raise ValueError(one_line(error, _describe).splitlines()[0]) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"speculative_config: {first_line(error)}") from error
    try:
        rule = RULES.load(spechub.verification)
        rule.check(spechub.verification, spechub.sharpening, spechub.schedule.trees)
    except ValueError as error:
        raise ValueError(f"speculative_config['verification']: {error}") from None
    levels = [str(tree) for tree in schedule.trees if isinstance(tree, LevelTree)]
    if levels and not proposer.follows_levels:
        raise ValueError(
            f"speculative_config['tree'] is {levels[0]!r}, but proposer {given.proposer!r} drafts "
            "static trees only; use another tree"
        )
    proposer.check_config(spechub)
    if given.target_distribution is not None:
        spechub.members = tuple(
            _beside(f"speculative_config[{OPTION!r}][{MEMBERS!r}][{i}]", member, spechub)
            for i, member in enumerate(given.target_distribution.members)
        )
    return spechub


def _measured_draft(options: dict[str, Any], target_model_config: "ModelConfig") -> str | None:
    """What a measurement names the draft; None if there is none."""
    # a target's own MTP layer is measured as a draft in the target's folder
    own = target_model_config.model if options["proposer"] == MTP else None
    return options.get("model") or own


def _beside(option: str, member: Member, spechub: SpecHubConfig) -> BesideTarget:
    """The configuration of a member, as vLLM makes it of a draft."""
    check_folder(option, member.model)
    try:
        beside = BesideTarget(
            method=MODEL,
            model=member.model,
            quantization=member.quantization,
            revision=member.revision,
            code_revision=member.code_revision,
            num_speculative_tokens=1,
            target_model_config=spechub.target_model_config,
            target_parallel_config=spechub.target_parallel_config,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {first_line(error)}") from error
    head = head_in(beside.draft_model_config)
    if head is not None:
        raise ValueError(
            f"{option}: {member.model!r} drafts from the target's hidden states ({head.sign}), but "
            "a member must be a model that runs by itself; choose another"
        )
    check_fit(option, "member", beside.draft_model_config, spechub.target_model_config)
    return beside


def _declared_by_proposer(options: dict[str, Any]) -> list[str]:
    """The keys that the chosen proposer declares; none if there is no such proposer."""
    name = options["proposer"]
    return sorted(PROPOSERS.load(name).options) if name in PROPOSERS else []


def _validate(
    options: dict[str, Any],
    declared: Collection[str],
    widths: Callable[[str, int, int], LevelTree],
) -> Options:
    """Check the common options, leaving out the keys that the proposer declares itself.

    Args:
        widths: finds the level widths that were measured with a rule.
    """
    common = {key: value for key, value in options.items() if key not in declared}
    try:
        given = Options.model_validate(common, context={"widths": widths})
    except ValidationError as error:
        first = error.errors()[0]
        key, *rest = first["loc"]
        if first["type"] == "extra_forbidden" and not rest:
            allowed = ", ".join((*Options.model_fields, *declared))
            raise ValueError(
                f"speculative_config[{key!r}] is not an option of method {METHOD!r}"
                f"{HINTS.get(str(key), '')}. Allowed: {allowed}"
            ) from None
        raise ValueError(one_line(error, _describe)) from None
    if "tree" in given.model_fields_set and given.tree_by_batch_size is not None:
        raise ValueError(
            "speculative_config['tree'] and speculative_config['tree_by_batch_size'] exclude each "
            "other: give one of them"
        )
    target = given.target_distribution
    if target is not None and target.reads_draft and given.proposer != MODEL:
        raise ValueError(
            f"speculative_config[{OPTION!r}] needs a draft model as its other member, but proposer "
            f"{given.proposer!r} has no distribution of its own; use {MODEL!r} with a 'model' that "
            f"runs by itself, or name {MEMBERS!r} in the draft's place"
        )
    if target is not None and given.tree_by_batch_size == AUTO:
        raise ValueError(
            "speculative_config['tree_by_batch_size'] is 'auto', but `vllm-spechub tune` measures "
            "without 'target_distribution'; give the ranges, [[FIRST, LAST, TREE], ...]"
        )
    return given


def _describe(where: tuple[int | str, ...]) -> tuple[str, str | None]:
    """What `one_line` asks about the option at a place."""
    option = Options.model_fields.get(str(where[0])) if where else None
    name = "speculative_config" + "".join(f"[{part!r}]" for part in where)
    return name, option.description if option else None


def _schedule(
    given: Options,
    own_options: dict[str, Any],
    target_model_config: "ModelConfig",
    target_parallel_config: "ParallelConfig",
) -> TreeSchedule:
    if given.tree_by_batch_size is None:
        from vllm.platforms import current_platform

        # vLLM does not vary the number of drafted tokens with data parallelism.
        varies = current_platform.is_cuda() and target_parallel_config.data_parallel_size == 1
        if varies and "tree" not in given.model_fields_set:
            return default_schedule_on_cuda(
                target_model_config.get_num_experts(), target_model_config.get_num_experts_per_tok()
            )
        return TreeSchedule.constant(given.tree)
    if isinstance(given.tree_by_batch_size, TreeSchedule):
        return given.tree_by_batch_size
    rule, target = given.verification, target_model_config.model
    try:
        draft = _measured_draft(vars(given), target_model_config)
        measured = measured_schedule(target, draft, given.proposer, rule, own_options)
        return TreeSchedule.parse(measured, rule)
    except ValueError as error:
        raise ValueError(f"speculative_config['tree_by_batch_size']: {error}") from None
