# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers with statistics of trees. vLLM alone decides what is scheduled, and when."""

from collections import Counter
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_spechub.config import spechub_config
from vllm_spechub.engine.grammar import unseen_drafts
from vllm_spechub.integration.messages import (
    ScheduledDrafts,
    TreeDraftTokenIds,
    TreeRunnerOutput,
)
from vllm_spechub.integration.reporting import reporting
from vllm_spechub.integration.tree_metrics import (
    StepObserver,
    TreeDecodingStats,
    TreeRequestMetrics,
)
from vllm_spechub.trees.tree import TokenTree

REQUEST_METRICS = "metrics of requests"


class TreeScheduler(Scheduler):
    """vLLM's synchronous scheduler, which also remembers which tree each request drafted.

    vLLM's own statistics take a draft's nodes as positions, and vLLM only knows how many nodes a
    step drafts. The statistics here count depths.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.schedule_of_trees = spechub_config(vllm_config).schedule
        # by request: the place in the schedule of the tree that it drafted when it ran last; None
        # if the schedule had no tree for that batch
        self.tree_index: dict[str, int | None] = {}
        # by request: the tree that the workers have made of level widths, if a grammar needs it
        self.drafted_trees: dict[str, TokenTree] = {}
        self.observer = StepObserver(self.schedule_of_trees)
        # the requests for which the proposer found nothing when they ran last
        self.undrafted: set[str] = set()
        # the step whose output is being processed
        self.step_drafts = ScheduledDrafts.checked({})
        self.step_output = EMPTY_MODEL_RUNNER_OUTPUT
        self.fallbacks: Counter[str] = Counter()

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        metrics = request.spec_decode_metrics
        if metrics is not None and not isinstance(metrics, TreeRequestMetrics):
            with reporting(REQUEST_METRICS):
                request.spec_decode_metrics = TreeRequestMetrics.for_observer(self.observer)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        scheduled = scheduler_output.num_scheduled_tokens
        # What this step verifies was drafted when its requests ran last.
        scheduler_output.scheduled_spec_decode_tokens = ScheduledDrafts(
            scheduler_output.scheduled_spec_decode_tokens,
            self.schedule_of_trees.trees,
            {req_id: self.tree_index.get(req_id, 0) for req_id in scheduled},
            self.drafted_trees,
        )
        for req_id in scheduler_output.finished_req_ids:
            self.tree_index.pop(req_id, None)
            self.drafted_trees.pop(req_id, None)
        index = self.schedule_of_trees.index(scheduler_output.num_spec_tokens_to_schedule)
        self.tree_index.update(dict.fromkeys(scheduled, index))
        super()._update_after_schedule(scheduler_output)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self.step_drafts = ScheduledDrafts.checked(scheduler_output.scheduled_spec_decode_tokens)
        self.step_output = model_runner_output
        with reporting(REQUEST_METRICS):
            self._tell_request_metrics()
        if self.log_stats:
            with reporting("statistics of steps without a tree"):
                self.fallbacks = self._count_fallbacks(scheduler_output.num_scheduled_tokens)
        return super().update_from_output(scheduler_output, model_runner_output)

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        self._remember_trees(draft_token_ids)
        super().update_draft_token_ids_in_output(draft_token_ids, scheduler_output)

    def _remember_trees(self, draft_token_ids: DraftTokenIds) -> None:
        """Remember the trees that come with a step's drafts."""
        if not isinstance(draft_token_ids, TreeDraftTokenIds):
            return
        for req_id, (_, *parents) in zip(
            draft_token_ids.req_ids, draft_token_ids.parents, strict=True
        ):
            if req_id in self.requests:
                self.drafted_trees[req_id] = TokenTree(tuple(parents))

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        self._remember_trees(draft_token_ids)
        super().update_draft_token_ids(draft_token_ids)
        drafts = zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        self.undrafted = {req_id for req_id, nodes in drafts if not nodes}

    def _handle_stopped_request(self, request: Request) -> bool:
        """A session goes on after the last token that it has kept.

        What the stop has cut off from an accepted path counts as computed, but its KV belongs to
        the tokens that were dropped. vLLM 0.33 takes it back itself.
        """
        kept = request.num_tokens - 1 + request.num_output_placeholders
        request.num_computed_tokens = min(request.num_computed_tokens, kept)
        return super()._handle_stopped_request(request)

    def _count_fallbacks(self, num_scheduled_tokens: dict[str, int]) -> Counter[str]:
        """The number of decoding requests of this step that had no tree, by reason."""
        fallbacks: Counter[str] = Counter()
        for req_id in num_scheduled_tokens.keys() - self.step_drafts.keys():
            request = self.requests.get(req_id)
            decodes = num_scheduled_tokens[req_id] == 1
            if decodes and request is not None and request.num_output_tokens > 0:
                if self.step_drafts.tree_index[req_id] is None:
                    fallbacks["load"] += 1
                elif request.num_computed_tokens + 1 >= self.max_model_len:
                    fallbacks["max_model_len"] += 1
                elif req_id in self.undrafted:
                    fallbacks["nothing_found"] += 1
                else:
                    fallbacks["budget"] += 1
        return fallbacks

    def _tell_request_metrics(self) -> None:
        """Tell the per-request metrics which tree they count next."""
        for req_id in self.step_drafts:
            request = self.requests.get(req_id)
            metrics = request.spec_decode_metrics if request is not None else None
            if isinstance(metrics, TreeRequestMetrics):
                metrics.depths = self.observer.depths[self.step_drafts.drafted_index(req_id)]

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """The masks for every node of the trees that were drafted.

        With asynchronous scheduling, the masks of a request that missed a step are made before the
        scheduler knows its drafts. Its tree cannot be used, and is marked as invalid here.
        """
        output = super().get_grammar_bitmask(scheduler_output)
        if output is not None:
            unseen = unseen_drafts(scheduler_output, output)
            invalid = scheduler_output.num_invalid_spec_tokens or {}
            scheduler_output.num_invalid_spec_tokens = invalid | unseen
        return output

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: TreeDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> TreeDecodingStats | None:
        if not self.log_stats:
            return None
        if num_invalid_spec_tokens and request_id in num_invalid_spec_tokens:
            self.fallbacks["grammar"] += 1
            return spec_decoding_stats
        with reporting("statistics of verified trees"):
            assert isinstance(self.step_output, TreeRunnerOutput)
            place = self.step_output.req_id_to_index[request_id]
            slots = self.step_output.accepted_slots
            path = self.step_output.accepted_paths[place]
            if path[0] < 0:
                self.fallbacks["lost"] += 1
                return spec_decoding_stats
            return self.observer.add_tree(
                spec_decoding_stats,
                self.step_drafts.drafted_index(request_id),
                num_draft_tokens,
                num_accepted_tokens,
                path,
                None if slots is None else slots[place],
            )
        return spec_decoding_stats

    def make_stats(
        self, spec_decoding_stats: TreeDecodingStats | None = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        if self.fallbacks:
            stats = spec_decoding_stats or TreeDecodingStats.new(self.observer.depth)
            spec_decoding_stats = replace(stats, fallbacks=dict(self.fallbacks))
            self.fallbacks = Counter()
        return super().make_stats(spec_decoding_stats, *args, **kwargs)


class AsyncTreeScheduler(TreeScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler with the same additions."""
