# SPDX-License-Identifier: Apache-2.0
"""The plugin: idempotent, checked against vLLM, and absent without a spechub configuration."""

import subprocess
import sys

import pytest
import vllm

from helpers.pair import PAIR
from vllm_spechub import plugin
from vllm_spechub.integration import patch as patches
from vllm_spechub.integration import patches as ledger
from vllm_spechub.integration.patch import Patch, PatchMismatch
from vllm_spechub.integration.patches import frontend
from vllm_spechub.integration.patches.metrics import FieldType


def test_signatures_match_this_vllm():
    patches.check_all(ledger.ALL)


def test_register_twice_wraps_once():
    plugin.register()
    first = [patch._resolve() for patch in ledger.EVERYWHERE if not isinstance(patch, FieldType)]
    before = [getattr(owner, name) for owner, name in first]
    plugin.register()
    after = [getattr(owner, name) for owner, name in first]
    assert [getattr(f, "__func__", f) for f in before] == [getattr(f, "__func__", f) for f in after]


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("vllm.engine.arg_utils:EngineArgs.add_cli_args", "takes .*, expected"),
        ("vllm.engine.arg_utils:EngineArgs.no_such", "is gone"),
        ("vllm.no_such_module:f", "is gone"),
    ],
)
def test_a_changed_symbol_names_the_supported_version(symbol, message):
    changed = Patch(symbol, ("other",), "", "", "", "", lambda original: original)
    with pytest.raises(PatchMismatch, match=f"supports vLLM 0.32.0 and 0.33.0, .*{message}"):
        patches.check_all([changed])


def test_another_vllm_is_left_alone(monkeypatch):
    """The mismatch is for whoever asks for spechub, and for nobody else."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(frontend, "_mismatch", None)
    plugin.register()
    target = str(PAIR / "target")
    spec = {"method": "spechub", "model": str(PAIR / "draft")}
    with pytest.raises(
        PatchMismatch, match=r"supports vLLM 0\.32\.0 and 0\.33\.0, this is 0\.34\.0"
    ):
        EngineArgs(model=target, speculative_config=spec).create_engine_config()
    EngineArgs(model=target).create_engine_config()


def in_fresh_process(program: str, **env: str) -> list[str]:
    import os

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=os.environ | env,
    )
    return done.stdout.strip().splitlines()


def test_without_a_spechub_config_nothing_changes():
    """The same engine configuration, runner, worker, backend and kernels with and without it."""
    target = str(PAIR / "target")
    program = (
        "from vllm.engine.arg_utils import EngineArgs; "
        f"c = EngineArgs(model={target!r}, dtype='float32').create_engine_config(); "
        "from vllm.triton_utils import dispatcher; "
        "from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES; "
        "print(c.compute_hash(), c.use_v2_model_runner, c.parallel_config.worker_cls, "
        "c.attention_config.backend, sorted(dispatcher._registry), dict(_ATTN_OVERRIDES), "
        "c.speculative_config)"
    )
    assert in_fresh_process(program)[-1] == in_fresh_process(program, VLLM_PLUGINS="")[-1]


def test_help_shows_the_method():
    program = (
        "import sys; sys.argv = ['vllm', 'serve', '--help=speculative']; "
        "from vllm.entrypoints.cli.main import main; main()"
    )
    assert "spechub" in " ".join(in_fresh_process(program))
