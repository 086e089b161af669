# SPDX-License-Identifier: Apache-2.0
"""Every kernel of this platform against its reference on this device, odd rows included.

The checks run in a process of their own (`python -m vllm_spechub.measure.doctor.kernels`), which
writes a finding as a line of JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vllm_spechub.measure.doctor.finding import FAULT, OK, WARNING, Finding

if TYPE_CHECKING:
    import torch

GIB = 2**30
PROGRAM = "vllm_spechub.measure.doctor.kernels"
FINISHED = "finished"
REPORT = "report this with the whole output: do not use the plugin here"
RULES = ("traversal", "mixed", "rrs")


def check_kernels(full: bool) -> Iterator[Finding]:
    """Run the checks in their process, and say so if it does not reach its end."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", PROGRAM, *(["--full"] if full else [])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    output, errors = process.communicate()
    last = "nothing"
    for line in output.splitlines():
        if line.startswith("["):
            finding = Finding(*json.loads(line))
            last = finding.what
            if last != FINISHED:
                yield finding
    if last != FINISHED:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        yield Finding("kernels", FAULT, f"stopped after {last}: {lines[-1]}", REPORT)


def _findings(full: bool) -> Iterator[Finding]:
    import torch
    from vllm.platforms import current_platform

    from vllm_spechub.integration.select import platform

    platform()  # refuses others
    device = torch.device("cpu" if current_platform.is_cpu() else "cuda")
    if device.type == "cuda":
        yield from _device(torch.cuda.current_device())
    yield _inputs(device)
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for rule in RULES:
            for odd in (False, True):
                yield from _trees(rule, dtype, device, odd)
        yield _attention(dtype, device)
        yield _compaction(dtype, device)
    if full:
        yield from _figures(device)
    yield Finding(FINISHED, OK, "")


def _device(index: int) -> Iterator[Finding]:
    import torch
    import triton
    from vllm.v1.attention.backends import fa_utils

    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    text = f"{name}, compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        yield Finding("device", FAULT, text, "use a GPU of compute capability 8.0 or more")
    else:
        yield Finding("device", OK, f"{text}, Triton {triton.__version__}")
    free, total = torch.cuda.mem_get_info(index)
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 0.9 * total:
        remedy = "stop what else runs there, or lower gpu_memory_utilization"
        yield Finding("device memory", WARNING, text, remedy)
    else:
        yield Finding("device memory", OK, text)
    version = fa_utils.get_flash_attn_version(head_size=128)
    if version is None:
        remedy = "install the vLLM build for this GPU: prompts run a slower kernel"
        yield Finding("FlashAttention", WARNING, "none", remedy)
    else:
        yield Finding("FlashAttention", OK, f"version {version}")


class _Trial:
    """Trees that are drafted and verified, the same by two implementations."""

    def __init__(
        self,
        rule: str,
        tree: str,
        num_reqs: int,
        vocab_size: int,
        dtype: "torch.dtype",
        device: "torch.device",
        odd: bool = False,
    ) -> None:
        import torch

        from vllm_spechub.measure.doctor.odd_rows import ODD_ROWS
        from vllm_spechub.trees.tree import TokenTree
        from vllm_spechub.triton_kernels.arguments import Requests

        generator = torch.Generator(device).manual_seed(5)
        self.rule, self.tree = rule, TokenTree.parse(tree)
        num_internal = len(self.tree.internal_nodes)
        num_nodes = self.tree.num_nodes + 1
        self.logits = torch.randn(
            num_reqs, num_internal, vocab_size, generator=generator, device=device
        )
        target = torch.randn(num_reqs, num_nodes, vocab_size, generator=generator, device=device)
        target[:, torch.tensor(self.tree.internal_nodes)] += 3 * self.logits
        self.logits = (3 * self.logits).to(dtype)
        self.target = target.to(dtype)
        if odd:
            for place, change in enumerate(ODD_ROWS.values()):
                for rows, req in ((self.logits, 2 * place), (self.target, 2 * place + 1)):
                    for row in rows[req]:
                        change(row)
        everyone = torch.arange(num_reqs, device=device)
        temperature = torch.tensor([1.0, 0.0, 0.6], device=device).repeat(num_reqs)[:num_reqs]
        self.requests = Requests(everyone, everyone + 20, temperature, everyone * 77 + 1)

    def state(self):
        """Where one implementation drafts."""
        import torch

        from vllm_spechub.rules.draft_state import DraftState
        from vllm_spechub.triton_kernels.arguments import Drafts

        num_reqs, num_internal, _ = self.logits.shape
        device = self.logits.device
        tokens = torch.zeros(num_reqs, self.tree.num_nodes, dtype=torch.int64, device=device)
        sampled = torch.zeros(num_reqs, num_internal, dtype=torch.int32, device=device)
        return DraftState(self.tree, tokens, Drafts(torch.zeros_like(self.logits), sampled))

    def draft(self, kernels, state) -> None:
        from vllm_spechub.rules.kernel_rule import KernelRule

        rule = KernelRule(self.rule, kernels)
        for level in state.levels:
            logits = self.logits[:, level.internal].flatten(0, 1)
            rule.sample_children(logits, level, self.requests, state)

    def verify(self, kernels, state):
        import torch

        from vllm_spechub.rules.kernel_rule import KernelRule
        from vllm_spechub.triton_kernels.arguments import TargetRows

        num_reqs, num_nodes, _ = self.target.shape
        starts = torch.arange(num_reqs, device=self.target.device) * num_nodes
        roots = state.tokens.new_zeros(num_reqs, 1)
        target = TargetRows(
            self.target.flatten(0, 1),
            self.requests.temperature,
            starts.int(),
            torch.full_like(starts, num_nodes - 1).int(),
            torch.cat([roots, state.tokens], dim=1).flatten(),
        )
        return KernelRule(self.rule, kernels).verify(target, self.requests, state)


def _kernels():
    """This platform's, and the references."""
    from vllm_spechub.integration.select import platform
    from vllm_spechub.rules.base import TreeKernels
    from vllm_spechub.rules.draft_state import DraftState
    from vllm_spechub.triton_kernels.child_sampling import reference as sampling
    from vllm_spechub.triton_kernels.level_allocation import reference as allocation
    from vllm_spechub.triton_kernels.verification import reference as verification

    references = TreeKernels(
        sampling.sample_children,
        verification.verify_tree,
        DraftState.write_tokens,
        allocation.allocate_children,
    )
    return platform().tree_kernels(), references


def _trees(rule: str, dtype: "torch.dtype", device: "torch.device", odd: bool) -> Iterator[Finding]:
    import torch

    kernels, references = _kernels()
    trial = _Trial(rule, "binary:2", 24, 5001, dtype, device, odd)
    ours, theirs = trial.state(), trial.state()
    name = f"{rule}, {str(dtype).partition('.')[2]}{', odd rows' * odd}"
    trial.draft(kernels, ours)
    trial.draft(references, theirs)
    wrong = (ours.tokens != theirs.tokens).any(dim=1)
    wrong |= (ours.drafts.sampled != theirs.drafts.sampled).any(dim=1)
    kept = [state.drafts.logits.nan_to_num(7.0) for state in (ours, theirs)]
    wrong |= (kept[0] != kept[1]).flatten(1).any(dim=1)
    yield _compared(f"child sampling, {name}", wrong)
    # both verify what the reference has drafted
    found, wanted = trial.verify(kernels, theirs), trial.verify(references, theirs)
    wrong = torch.zeros_like(wrong)
    for one, other in zip(found, wanted, strict=True):
        wrong |= (one != other).view(len(wrong), -1).any(dim=1)
    inside = (found.tokens >= -1) & (found.tokens < trial.target.shape[2])
    yield _compared(f"verification, {name}", wrong, bool(inside.all()))


def _compared(what: str, wrong: "torch.Tensor", inside: bool = True) -> Finding:
    """One request may differ: a draw that falls within rounding of its threshold."""
    text = f"{len(wrong) - int(wrong.sum())} of {len(wrong)} requests as the reference"
    if not inside:
        return Finding(what, FAULT, f"{text}, tokens outside the vocabulary", REPORT)
    return Finding(what, OK, text) if wrong.sum() <= 1 else Finding(what, FAULT, text, REPORT)


def _attention(dtype: "torch.dtype", device: "torch.device") -> Finding:
    import torch

    from vllm_spechub.trees.tree import TokenTree
    from vllm_spechub.triton_kernels.tree_attention import (
        tree_attention,
        tree_attention_reference,
    )

    generator = torch.Generator(device).manual_seed(3)
    tree = TokenTree.parse("binary:3")
    width, heads, kv_heads, head_size, block_size = tree.num_nodes + 1, 8, 2, 64, 16
    contexts = torch.tensor([3000, 17, 250], dtype=torch.int32, device=device)
    seq_lens = contexts + width
    most = -(-int(seq_lens.max()) // block_size)
    table = torch.arange(3 * most, dtype=torch.int32, device=device).view(3, most)
    shape = (3 * most, kv_heads, 2, head_size * block_size)
    memory = torch.randn(shape, generator=generator, device=device).to(dtype)
    if device.type == "cpu":  # keys are stored by dimension
        keys = memory[:, :, 0].unflatten(2, (head_size, block_size)).permute(0, 3, 1, 2)
    else:
        keys = memory[:, :, 0].unflatten(2, (block_size, head_size)).transpose(1, 2)
    values = memory[:, :, 1].unflatten(2, (block_size, head_size)).transpose(1, 2)
    query = torch.randn(3 * width, heads, head_size, generator=generator, device=device).to(dtype)
    until = contexts.repeat_interleave(width)
    mask = torch.from_numpy(tree.ancestor_masks).to(device).repeat(3)
    starts = torch.arange(4, dtype=torch.int32, device=device) * width
    found, wanted = torch.zeros_like(query), torch.zeros_like(query)
    scale = head_size**-0.5
    rest = (starts, seq_lens, table, until, mask, scale, width)
    tree_attention_reference(query, keys, values, wanted, *rest)
    if device.type == "cpu":
        import numpy as np

        from vllm_spechub.cpu.tree_kernels.attention import attend_trees

        cache = memory.numpy()
        attend_trees(
            query.numpy(),
            cache.reshape(3 * most, kv_heads, 2, head_size, block_size),
            cache.reshape(3 * most, kv_heads, 2, block_size, head_size),
            table.numpy(),
            seq_lens.numpy(),
            starts[:3].long().numpy(),
            np.full(3, width),
            until.numpy(),
            mask.numpy(),
            np.float32(scale),
            np.float32(0.0),
            0,
            np.full(heads, -np.inf, np.float32),
            found.numpy(),
        )
    else:
        tree_attention(query, keys, values, found, *rest)
    error = float((found - wanted).abs().max())
    what = f"attention, {str(dtype).partition('.')[2]}"
    text = f"largest difference {error:.1e}"
    bound = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    return Finding(what, OK, text) if error <= bound else Finding(what, FAULT, text, REPORT)


def _compaction(dtype: "torch.dtype", device: "torch.device") -> Finding:
    import torch

    from vllm_spechub.integration.select import platform
    from vllm_spechub.triton_kernels.compaction import compact_reference

    found = torch.randn(8, 16, 2, 32, device=device).to(dtype)
    wanted = found.clone()
    table = torch.tensor([[5, 0], [1, 7]], dtype=torch.int32, device=device)
    roots = torch.tensor([12, 3], device=device)
    path = torch.tensor([[0, 2, 5, 9], [0, 1, 4, -1]], dtype=torch.int32, device=device)
    compact_reference([wanted], table, roots, path)
    platform().cache_kernels().compactor([found])(table, roots, path)
    wrong = int((found != wanted).sum())
    what = f"compaction, {str(dtype).partition('.')[2]}"
    text = f"{wrong} of {found.numel()} entries differ"
    return Finding(what, OK, text) if wrong == 0 else Finding(what, FAULT, text, REPORT)


def _inputs(device: "torch.device") -> Finding:
    """What a step reads, as the kernels and as their references fill it."""
    import torch

    from vllm_spechub.triton_kernels import step_inputs

    def integers(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    offsets = integers(0, 0, -1), integers(1, 0, -1), integers(0, 1, 3)
    tokens = torch.arange(3000, device=device)
    # two requests and one that pads
    requests = integers(1, 0, -1, 0, 1, 2, 1, 0, 0).view(3, 3)
    verified = step_inputs.Verified(
        tokens + 50,
        integers(0, 4, 5, dtype=torch.int32),
        integers(1, 0, dtype=torch.int32),
        integers(0, 2, 3, 0, -1, -1, dtype=torch.int32).view(2, 3),
        torch.tensor([0.5, 1.5], device=device),
        integers(2**40, -7),
    )
    outcomes = []
    for lay_out, prepare_drafts in (
        (step_inputs.lay_out, step_inputs.prepare_drafts),
        (step_inputs.lay_out_reference, step_inputs.prepare_drafts_reference),
    ):
        until = torch.zeros_like(tokens, dtype=torch.int32)
        layout = step_inputs.Layout(torch.zeros_like(tokens), until, torch.zeros_like(tokens))
        lay_out(layout, tokens + 7, (tokens % 3).int(), *offsets)
        inputs = step_inputs.DraftInputs(
            idx_mapping=integers(0, 0, 0),
            draft_rows=integers(0, 0, 0),
            first_positions=integers(0, 0, 0),
            root_positions=integers(0, 0, 0),
            sources=integers(*[0] * 9),
            temperature=torch.zeros(3, device=device),
            seeds=integers(0, 0, 0),
        )
        prepare_drafts(inputs, requests, verified, 3)
        outcomes.append([*layout, *inputs])
    wrong = sum(int((one != other).sum()) for one, other in zip(*outcomes, strict=True))
    text = f"{wrong} of {sum(map(len, outcomes[0]))} entries differ"
    return Finding("inputs", OK, text) if wrong == 0 else Finding("inputs", FAULT, text, REPORT)


def _seconds(run: Callable[[], object], device: "torch.device") -> float:
    """The median time of a call, on a GPU with a cold L2 cache."""
    if device.type == "cuda":
        from triton.testing import do_bench

        milliseconds: Any = do_bench(run, return_mode="median")
        return 1e-3 * milliseconds
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _figures(device: "torch.device") -> Iterator[Finding]:
    """Times at the sizes of real models, and what reading every row once would take."""
    import torch

    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    vocab_size, batches = (128_256, (1, 8, 64)) if on_gpu else (32_000, (1, 4))
    block = torch.zeros((GIB if on_gpu else GIB // 16), dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / _seconds(lambda: other.copy_(block), device)
    yield Finding("figures: copy", OK, f"{bandwidth / 1e9:.0f} GB/s")
    kernels, _ = _kernels()
    for batch in batches:
        trial = _Trial("traversal", "binary:3", batch, vocab_size, dtype, device)
        trial.requests.temperature.fill_(1.0)
        state = trial.state()
        rows = trial.logits.nbytes
        for name, run, num_bytes in (
            # read once, and kept
            ("child sampling", lambda: trial.draft(kernels, state), 2 * rows),  # noqa: B023
            ("verification", lambda: trial.verify(kernels, state), 2 * rows),  # noqa: B023
        ):
            run()
            seconds = _seconds(run, device)
            floor = num_bytes / bandwidth
            text = f"{1e6 * seconds:.0f} us, {seconds / floor:.1f} times its floor"
            yield Finding(f"figures: {name}, batch {batch}", OK, text)


if __name__ == "__main__":
    for finding in _findings("--full" in sys.argv[1:]):
        print(json.dumps(finding), flush=True)
