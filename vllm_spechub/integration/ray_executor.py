# SPDX-License-Identifier: Apache-2.0
"""vLLM's Ray executor, which first checks that every node has this package in this version."""

from importlib import metadata

# Ray is an optional dependency, which may be missing where types are checked.
import ray  # pyright: ignore[reportMissingImports]
from ray.util.placement_group import (  # pyright: ignore[reportMissingImports]
    placement_group_table,
)
from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
    NodeAffinitySchedulingStrategy,
)
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

PACKAGE = "vllm-spechub"


class SpecHubRayExecutor(RayExecutorV2):
    """vLLM's Ray executor for spechub.

    Workers unpickle a `SpecHubConfig` before they run any code of their own. On a node without this
    package that fails with an error that names neither the node nor the remedy, so it checks first.
    """

    def _build_runtime_env(self) -> dict:
        # vLLM calls this when it has chosen the nodes, right before it starts workers there.
        runtime_env = super()._build_runtime_env()
        group = placement_group_table(self.parallel_config.placement_group)
        check_nodes(set(group["bundles_to_node_id"].values()), runtime_env)
        return runtime_env


def check_nodes(node_ids: set[str], runtime_env: dict) -> None:
    """Ask every node which version of this package its workers would import.

    Args:
        node_ids: Ray's ids, in hexadecimal.
        runtime_env: Ray's runtime environment of the workers.

    Raises:
        RuntimeError: one line that names the nodes that lack the package or have another version.
    """
    package, wanted = PACKAGE, metadata.version(PACKAGE)

    def installed() -> tuple[str, str | None]:
        # Nested, so that Ray sends its code: the node may not be able to import this module.
        import platform
        from importlib import metadata

        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = None
        return platform.node(), version

    task = ray.remote(num_cpus=0)(installed)
    found = ray.get(
        [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                runtime_env=runtime_env,
            ).remote()
            for node_id in sorted(node_ids)
        ]
    )
    wrong = [
        f"{host} has {f'{package} {version}' if version else f'no {package}'}"
        for host, version in found
        if version != wanted
    ]
    if wrong:
        raise RuntimeError(
            f"spechub: this is {package} {wanted}, but node {', node '.join(wrong)}; "
            f"install {package} {wanted} next to vLLM on every node"
        )
