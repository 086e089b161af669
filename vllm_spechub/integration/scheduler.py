# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers with statistics of trees. What is scheduled, and when, is theirs alone."""

from collections import Counter
from dataclasses import replace

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_spechub.engine.grammar import unseen_drafts
from vllm_spechub.integration.tree_metrics import (
    StepObserver,
    TreeDecodingStats,
    TreeRequestMetrics,
)


class _TreeStatistics:
    """What both schedulers remember and count: vLLM's own counts take a draft's nodes for
    positions, and know only how many nodes a step drafts."""

    def __init__(self, vllm_config, *args, **kwargs) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.schedule_of_trees = vllm_config.speculative_config.schedule
        # the place in the schedule of the tree that each request drafts when it runs next, or ran
        # last; None if the batch was too large for any
        self.drafted: dict[str, int | None] = {}
        self.observer = StepObserver(self.schedule_of_trees)
        self.step_output: ModelRunnerOutput | None = None
        self.fallbacks: Counter[str] = Counter()

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if request.spec_decode_metrics is not None and not isinstance(
            request.spec_decode_metrics, TreeRequestMetrics
        ):
            request.spec_decode_metrics = TreeRequestMetrics.of(self.observer)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # What this step verifies was drafted when its requests ran last.
        scheduler_output.drafted = {
            req_id: self.drafted.get(req_id, 0) for req_id in scheduler_output.num_scheduled_tokens
        }
        for req_id in scheduler_output.finished_req_ids:
            self.drafted.pop(req_id, None)
        num_nodes = scheduler_output.num_spec_tokens_to_schedule
        index = self.schedule_of_trees.index(num_nodes)
        self.drafted.update(dict.fromkeys(scheduler_output.num_scheduled_tokens, index))
        super()._update_after_schedule(scheduler_output)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ):
        self.step_output = model_runner_output
        self.step_drafted = scheduler_output.drafted
        self._tell_request_metrics(scheduler_output)
        if self.log_stats:
            self.fallbacks = self._count_fallbacks(scheduler_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _count_fallbacks(self, scheduler_output: SchedulerOutput) -> Counter[str]:
        """Decoding requests of this step that had no tree, by reason."""
        fallbacks: Counter[str] = Counter()
        scheduled = scheduler_output.num_scheduled_tokens
        for req_id in scheduled.keys() - scheduler_output.scheduled_spec_decode_tokens.keys():
            request = self.requests.get(req_id)
            if scheduled[req_id] == 1 and request is not None and request.num_output_tokens > 0:
                if scheduler_output.drafted[req_id] is None:
                    fallbacks["load"] += 1
                elif request.num_computed_tokens + 1 >= self.max_model_len:
                    fallbacks["max_model_len"] += 1
                else:
                    fallbacks["budget"] += 1
        return fallbacks

    def _tell_request_metrics(self, scheduler_output: SchedulerOutput) -> None:
        """Tell per-request metrics which tree they are about to count."""
        for req_id in scheduler_output.scheduled_spec_decode_tokens:
            request = self.requests.get(req_id)
            if request is not None and request.spec_decode_metrics is not None:
                depths = self.observer.depths[scheduler_output.drafted[req_id]]
                request.spec_decode_metrics.depths = depths

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Masks for every node of the trees that were drafted.

        With asynchronous scheduling a request that missed a step meets its masks before the
        scheduler knows its drafts. Its tree goes unused, and is marked as invalid here.
        """
        self.structured_output_manager.draft_trees = {
            req_id: self.schedule_of_trees.trees[scheduler_output.drafted[req_id]]
            for req_id in scheduler_output.scheduled_spec_decode_tokens
        }
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
        row = self.step_output.req_id_to_index[request_id]
        return self.observer.add_tree(
            spec_decoding_stats,
            self.step_drafted[request_id],
            num_draft_tokens,
            num_accepted_tokens,
            self.step_output.accepted_paths[row],
        )

    def make_stats(
        self, spec_decoding_stats: TreeDecodingStats | None = None, *args, **kwargs
    ) -> SchedulerStats | None:
        if self.fallbacks:
            stats = spec_decoding_stats or TreeDecodingStats.new(self.observer.depth)
            spec_decoding_stats = replace(stats, fallbacks=dict(self.fallbacks))
            self.fallbacks = Counter()
        return super().make_stats(spec_decoding_stats, *args, **kwargs)


class TreeScheduler(_TreeStatistics, Scheduler):
    """For synchronous scheduling."""


class AsyncTreeScheduler(_TreeStatistics, AsyncScheduler):
    """For asynchronous scheduling."""
