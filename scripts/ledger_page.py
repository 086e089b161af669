#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Renders the patch ledger into `docs/patches.md`."""

from pathlib import Path

from vllm_spechub.integration.patch import SUPPORTED_VLLM
from vllm_spechub.integration.patches import CPU_WORKER, EVERYWHERE, WORKER

PAGE = Path(__file__).parents[1] / "docs" / "patches.md"

TOUCHES = """\
## Extension points and other touches, which replace nothing

| what | for |
|---|---|
| entry point `vllm.general_plugins` | loading the plugin in every process |
| `scheduler_config.scheduler_cls` | vLLM's schedulers with statistics of trees, named only in a \
spechub configuration |
| `parallel_config.worker_cls` | our workers, named only in a spechub configuration |
| `parallel_config.distributed_executor_backend`, `RayExecutorV2._init_executor`, \
`initialize_ray_cluster` | asking every node of a Ray cluster for this package before its workers \
start, in a spechub configuration only |
| `register_backend(AttentionBackendEnum.CUSTOM, ..)` | tree attention on CUDA |
| `register_backend(AttentionBackendEnum.CPU_ATTN, ..)` | tree attention on the CPU, \
in a spechub worker only |
| `selector._cached_get_attn_backend.cache_clear()` | forgetting the backend that an earlier \
engine of the same process chose, in a spechub worker only |
| `vllm.triton_utils.dispatcher.register_kernels` | host versions of the V2 runner's Triton \
kernels, in a spechub CPU worker only |
| `triton.next_power_of_2`, set where vLLM's placeholder for Triton lacks it | launchers that \
compute block sizes with it, in a spechub CPU worker only |
| `StructuredOutputManager._get_constraint_bounds`, `._grammar_bitmask` | asking whether a token \
ends the reasoning; the buffer of masks |
| `ModelState` and its hooks | positions, masks, sampler, cache tensors |
| `LoRAModelManager.set_adapter_mapping`, its last mapping | a LoRA adapter for each of a tree's \
logits rows, where the V2 runner maps one row to a request |
| `Worker.wake_up` | small tensors made anew whose contents sleep mode does not keep |
"""


def render() -> str:
    """The page's text."""
    lines = [
        "# Patch ledger",
        "",
        "<!-- rendered by python scripts/ledger_page.py; edit vllm_spechub/integration/patches/ "
        "-->",
        "",
        f"Every symbol of vLLM {SUPPORTED_VLLM} that the plugin replaces. Version and signatures "
        "are checked when the plugin loads; on a mismatch vLLM stays as it is, and asking for "
        "spechub gives an error that names the supported version.",
        "",
    ]
    for title, where, ledger in (
        ("In every process", "when vLLM loads its plugins", EVERYWHERE),
        ("In a worker that serves trees", "before its model runner is built", WORKER),
        ("In such a worker on the CPU", "before its host kernels are registered", CPU_WORKER),
    ):
        lines += [f"## {title}", "", f"Applied {where}.", ""]
        for patch in ledger:
            lines += [
                f"### `{patch.symbol}`",
                "",
                f"- parameters: `({', '.join(patch.parameters)})`",
                f"- why: {patch.why}",
                f"- how: {patch.how}",
                f"- upstream: {patch.upstream}",
                f"- can go when: {patch.until}",
                "",
            ]
    return "\n".join(lines) + TOUCHES


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
