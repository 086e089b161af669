# SPDX-License-Identifier: Apache-2.0
# vLLM for CUDA with vllm-spechub.
#
#     docker build --tag vllm-spechub .
#     docker run --gpus all --ipc host --publish 8000:8000 \
#         --volume ~/.cache/huggingface:/root/.cache/huggingface vllm-spechub \
#         TARGET --speculative-config spechub --spec-model DRAFT
#
# The image runs `vllm serve`, as its base does. For a command of this package:
#
#     docker run --gpus all --entrypoint vllm-spechub vllm-spechub tune --help
#
# Not tried: this file has never been built, nor has the plugin ever run on a GPU. Tried, without
# Docker: the wheel that `pip wheel .` builds from these files is installed beside an installed vLLM
# with the same command and the same constraints, and vLLM then loads the plugin.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /opt/vllm-spechub
COPY pyproject.toml setup.py README.md LICENSE ./
COPY triton_kernels triton_kernels
COPY vllm_spechub vllm_spechub

# What the image holds stays as it is: if a requirement asks for another torch, Triton, transformers or
# vLLM, the build fails. numpy may change, as the kernels' interpreter needs one before 2.4.
RUN python3 -m pip freeze --exclude-editable \
        | grep -E '^(torch|triton|transformers|vllm)==' > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt '.[cli]' \
    && python3 -c "import vllm_spechub.plugin as plugin; plugin.register()"

WORKDIR /vllm-workspace
