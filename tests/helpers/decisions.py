# SPDX-License-Identifier: Apache-2.0
"""A worker extension for tests, which records what every rank drafted and decided, step by step."""


class DecisionRecorder:
    """Mixed into vLLM's worker by `worker_extension_cls`; called through `collective_rpc`."""

    def record_decisions(self) -> None:
        self.decisions = []
        sampler = self.model_runner.rejection_sampler
        original = type(sampler).__call__
        decisions = self.decisions

        class Recording(type(sampler)):
            def __call__(self, logits, batch, *args, **kwargs):
                drafted = batch.input_ids[batch.logits_indices].tolist()
                output = original(self, logits, batch, *args, **kwargs)
                emitted = output.sampled_token_ids.tolist()
                trees = self.layout.nodes.flat("parents").tolist()
                decisions.append((drafted, emitted, output.num_sampled.tolist(), trees))
                return output

        sampler.__class__ = Recording

    def recorded_decisions(self) -> list:
        return self.decisions

    def record_draft_rows(self) -> None:
        from helpers.heads import recorded_rows

        self.recording = recorded_rows()
        self.draft_rows = self.recording.__enter__()

    def recorded_draft_rows(self, count: int) -> list:
        """Some of a head's rows: text, path and logits."""
        chosen = self.draft_rows[:: max(1, len(self.draft_rows) // count)]
        return [(row.text, row.path, row.logits.tolist()) for row in chosen]
