# SPDX-License-Identifier: Apache-2.0
"""`vllm-spechub doctor`: whether kernels, graphs, memory and versions are as they should be."""
