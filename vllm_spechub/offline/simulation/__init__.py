# SPDX-License-Identifier: Apache-2.0
"""Simulations of the tokens per step of rules and shapes for a pair of models, without an engine.

`texts` samples texts from the target, `rows` reads both models' distributions at tree nodes in the
middle of them, `drafts` draws the trees of many plans with common noise, `reach` turns a drafted
tree into the probability that each node is accepted, `study` puts them together and `report`
prints, saves and plots.
"""
