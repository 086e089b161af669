# SPDX-License-Identifier: Apache-2.0
"""Methods added to the workers of a measured engine, through `worker_extension_cls`."""


class Observed:
    """A worker that reports how much memory it uses."""

    def used_memory(self) -> int:
        """Bytes in use: on CUDA what PyTorch has reserved, including graphs and the KV cache;
        otherwise the process's resident memory."""
        import torch

        if torch.cuda.is_available():
            return torch.cuda.memory_reserved()
        import psutil

        return psutil.Process().memory_info().rss
