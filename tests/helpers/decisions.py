# SPDX-License-Identifier: Apache-2.0
"""A worker extension for tests, which records what every rank's sampler decided, step by step."""


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
