# SPDX-License-Identifier: Apache-2.0
"""What a user adds to workers with `worker_extension_cls`."""


class Greeter:
    """Answers a `collective_rpc`."""

    def greet(self) -> str:
        return f"hello from {type(self).__name__}"
