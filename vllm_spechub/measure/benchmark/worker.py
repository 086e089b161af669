# SPDX-License-Identifier: Apache-2.0
"""What a measured engine's workers are asked; loaded with `worker_extension_cls`."""


class Observed:
    """A worker that says how much memory it takes."""

    def used_memory(self) -> int:
        """Bytes: on CUDA what PyTorch holds, graphs and KV cache included; else all resident."""
        import torch

        if torch.cuda.is_available():
            return torch.cuda.memory_reserved()
        import psutil

        return psutil.Process().memory_info().rss
