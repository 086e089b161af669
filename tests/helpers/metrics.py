# SPDX-License-Identifier: Apache-2.0
"""The metrics that an engine has counted."""


def spec_metrics(llm) -> dict:
    """vLLM's counters of speculative decoding, by their short names."""
    metrics = {}
    for metric in llm.get_metrics():
        if "spec_decode" in metric.name:
            value = getattr(metric, "values", None) or metric.value
            metrics[metric.name.removeprefix("vllm:spec_decode_")] = value
    return metrics


def spechub_metrics(llm) -> dict:
    """Our metrics: a value, or one per label that is not vLLM's own."""
    found: dict = {}
    for metric in llm.get_metrics():
        if not metric.name.startswith("vllm:spechub_"):
            continue
        name = metric.name.removeprefix("vllm:spechub_")
        labels = [v for k, v in metric.labels.items() if k not in ("model_name", "engine")]
        value = metric if name == "emitted_tokens" else metric.value
        if labels:
            found.setdefault(name, {})[labels[0]] = value
        else:
            found[name] = value
    return found
