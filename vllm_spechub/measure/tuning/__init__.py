# SPDX-License-Identifier: Apache-2.0
"""`vllm-spechub tune`: find the schedule of trees for a pair of models, prompts and a machine."""
