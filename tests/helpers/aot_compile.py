# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels for GPUs that are not there, and record that all of them were.

The tests run under `TRITON_INTERPRET=1`, where `@triton.jit` yields interpreted functions. A worker
process without that variable imports the same modules and compiles them for real.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "kernels" / "compiled.json"
"""What the last passing run of every compilation compiled: a digest, and Triton's version."""


def compiled_now() -> dict[str, str]:
    """What a run of every compilation would compile: kernels, compilations and the compiler."""
    from helpers.sources import digest_of  # the worker process does not find it

    files = sorted((ROOT / "triton_kernels").rglob("*.py"))
    files += [
        ROOT / "tests" / "helpers" / "aot_compile.py",
        ROOT / "tests" / "kernels" / "test_compile.py",
    ]
    return {"sources": digest_of(files), "triton": version("triton")}


class Loop(NamedTuple):
    """A loop over a row, as compiled."""

    instructions: int
    load_bytes: int
    """What a thread loads in one iteration."""
    is_asynchronous: bool
    """Whether it loads ahead, into shared memory."""
    spills: int
    """Instructions that spill registers, or load what was spilled."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports for one kernel, and its loops over a row, in their order."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    loops: tuple[Loop, ...]


class Compiler:
    """A callable that compiles kernels in a worker process, which starts at the first call."""

    def __init__(self) -> None:
        self._worker: subprocess.Popen | None = None

    def __call__(
        self,
        kernel: Any,
        signature: dict[str, str],
        constexprs: dict[str, Any],
        capability: int,
        num_warps: int = 4,
        num_stages: int = 3,
        maxnreg: int | None = None,
    ) -> Resources:
        """Compile `kernel`, a module-level `@triton.jit` function.

        Args:
            kernel: the function as imported, interpreted or not.
            signature: the type of each run-time argument, such as "*fp32", "i32" or "fp32";
                "i32:16" for one that the launcher finds to be a multiple of 16. A list stands for a
                Triton tuple.
            constexprs: the value of each constexpr argument.
            capability: compute capability without the dot: 80, 90 or 100.

        Raises:
            RuntimeError: the compilation failed; the message holds the worker's traceback.
        """
        if self._worker is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self._worker = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        job = {
            "module": kernel.fn.__module__,
            "name": kernel.fn.__name__,
            "signature": signature,
            "constexprs": constexprs,
            "capability": capability,
            "options": {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg},
        }
        self._worker.stdin.write(json.dumps(job) + "\n")
        self._worker.stdin.flush()
        answer = json.loads(self._worker.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        loops = tuple(Loop(*loop) for loop in answer.pop("loops"))
        return Resources(**answer, warps=num_warps, loops=loops)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.stdin.close()
            self._worker.wait()


def _load_bytes(instruction: str) -> int:
    width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", instruction)
    return int(width[1]) // 8 if width else 4


def _passes(disassembly: str) -> list[tuple[int, int, bool, int]]:
    """The innermost loops that read memory: see `Loop`."""
    places, loops, seen = {}, [], []
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L_x?_?\d+):", line.strip()):
            places[label[1]] = len(seen)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            seen.append(line)
            branch = re.search(r"\bBRA\b.*`\((\.L_x?_?\d+)\)", line)
            if branch and branch[1] in places:
                loops.append((places[branch[1]], len(seen)))
    passes = []
    for start, end in loops:
        body = " ".join(seen[start:end])
        inner = any(start <= a and b <= end for a, b in loops if (a, b) != (start, end))
        # what stands out of line, for shuffles of threads that have parted, is no loop
        if "LDG" in body and not inner and "WARPSYNC" not in body:
            asynchronous = re.findall(r"LDGSTS\S*", body)
            loads = asynchronous or re.findall(r"LDG\S*", body)
            spills = len(re.findall(r"\b(?:STL|LDL)\b", body))
            loaded = sum(map(_load_bytes, loads))
            passes.append((end - start, loaded, bool(asynchronous), spills))
    return passes


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas

    kernel = getattr(importlib.import_module(job["module"]), job["name"])
    signature = {**job["signature"], **dict.fromkeys(job["constexprs"], "constexpr")}
    # What the launcher sees at run time: torch allocations are aligned.
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in job["signature"].items()
        if isinstance(kind, str) and (kind.startswith("*") or kind.endswith(":16"))
    }
    signature = {
        k: v.removesuffix(":16") if isinstance(v, str) else v for k, v in signature.items()
    }
    signature = {k: tuple(v) if isinstance(v, list) else v for k, v in signature.items()}
    source = triton.compiler.ASTSource(kernel, signature, job["constexprs"], aligned)
    target = GPUTarget("cuda", job["capability"], 32)
    compiled = triton.compile(source, target=target, options=job["options"])

    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source_file, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source_file.write_text(ptx)
        architecture = re.search(r"\.target (\w+)", ptx).group(1)
        command = [get_ptxas(job["capability"]).path, "-v", f"--gpu-name={architecture}"]
        log = subprocess.run(
            [*command, source_file, "-o", binary], capture_output=True, text=True, check=True
        ).stderr
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", binary]
        listing = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "shared_bytes": compiled.metadata.shared,
        "loops": _passes(listing),
    }


def _serve() -> None:
    import traceback

    for line in sys.stdin:
        try:
            answer = _compile(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
