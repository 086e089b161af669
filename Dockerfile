# SPDX-License-Identifier: Apache-2.0
# vLLM for CUDA with vllm-spechub.
#
#     docker build --tag vllm-spechub .   # for vLLM 0.33.0: --build-arg VLLM=0.33.0
#     docker run --gpus all --ipc host --publish 8000:8000 \
#         --volume ~/.cache/huggingface:/root/.cache/huggingface vllm-spechub \
#         TARGET --speculative-config spechub --spec-model DRAFT
#
# Another command than `vllm serve`:
#
#     docker run --gpus all --entrypoint vllm-spechub vllm-spechub tune --help
#
# Not tried: this file has never been built, and the plugin has never run on a GPU. The name of the base
# follows vLLM's for all its releases; those of these two have not been pulled. Tried without Docker,
# beside vLLM 0.32.0 for the CPU: the same `uv pip install` of the same files, as a dry run. It would add
# this package and change nothing else. hadolint finds nothing in this file.
ARG VLLM=0.32.0
FROM vllm/vllm-openai:v${VLLM}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /opt/vllm-spechub
COPY pyproject.toml setup.py README.md LICENSE ./
COPY triton_kernels triton_kernels
COPY vllm_spechub vllm_spechub

# The base's torch, Triton, transformers and vLLM stay: if something needs others, the build fails.
# numpy may change, which must be older than 2.4 here.
ENV UV_BREAK_SYSTEM_PACKAGES=1
RUN uv pip freeze --system | grep -E '^(torch|triton|transformers|vllm)==' > /tmp/constraints.txt \
    && uv pip install --system --no-cache --constraint /tmp/constraints.txt '.[cli]' \
    && rm /tmp/constraints.txt

WORKDIR /vllm-workspace
ENTRYPOINT ["vllm", "serve"]
