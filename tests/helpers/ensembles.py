# SPDX-License-Identifier: Apache-2.0
"""Models combined plainly: an ensemble in transformers, one row and one token at a time.

It is written from the definitions of the target distributions, in double precision, and takes
nothing of the engine's.
"""

import torch
from vllm import SamplingParams

from helpers.oracle import processed_row, reference_model
from helpers.pair import DRAFT, TARGET


def models_of(spec: dict, target=TARGET, draft=DRAFT) -> list[str]:
    """The target, the draft if its rows are combined, and the members."""
    members = [member["model"] for member in spec.get("members", [])]
    reads_draft = "weight" in spec or ("beta" in spec and not members)
    return [target, *[draft] * reads_draft, *members]


def weights_of(spec: dict) -> list[float]:
    """Those of the models but the target."""
    weights = [spec["weight"]] if "weight" in spec else []
    return weights + [member["weight"] for member in spec.get("members", [])]


def combined_row(
    # [vocab_size] each, raw, as `models_of` orders them
    rows: list[torch.Tensor],
    spec: dict,
    prompt: list[int],
    output: list[int],
    params: SamplingParams,
) -> torch.Tensor:
    """The row from which the token after `output` is drawn. [vocab_size] float64

    `params` must be `resolved`. For a greedy request the best token of the row counts.
    """

    def processed(row):
        return processed_row(row, prompt, output, params).double()

    p, *others = (row.double() for row in rows)
    # a member lacks the tokens that its vocabulary does not reach
    others = [torch.nn.functional.pad(q, (0, len(p) - len(q)), value=-torch.inf) for q in others]
    if spec["type"] in ("mixture", "logits"):
        weighted = [(q, w) for q, w in zip(others, weights_of(spec), strict=True) if w]
        weighted.append((p, 1 - sum(w for _, w in weighted)))
        if len(weighted) == 1:
            return processed(p)
        if spec["type"] == "mixture":
            return sum(w * processed(row.float()).softmax(0) for row, w in weighted).log()
        summed = sum(w * row for row, w in weighted)
        for row, _ in weighted:
            summed[row == -torch.inf] = -torch.inf
        return processed(summed)
    (q,) = others
    raw = (1 + spec["beta"]) * p - spec["beta"] * q
    raw[p.softmax(0) < spec["alpha"] * p.softmax(0).max()] = -torch.inf
    row = processed(raw)
    return row if (row > -torch.inf).any() else processed(p)


def member_rows(tokens: list[int], models=(TARGET, DRAFT)) -> list[torch.Tensor]:
    """Each model's raw rows after each of the tokens, [num_tokens, vocab_size]."""
    return [reference_model(model)(input_ids=known(tokens, model)).logits[0] for model in models]


def known(tokens: list[int], model: str) -> torch.Tensor:
    """The tokens as a model reads them, which may lack some. [1, num_tokens]"""
    last = reference_model(model).config.vocab_size - 1
    return torch.tensor([tokens]).clamp(max=last)


def greedy_ensemble(prompt: list[int], spec: dict, max_tokens: int, target=TARGET):
    """What the ensemble answers at temperature 0, and how near the second best token ever was."""
    params, models = SamplingParams(temperature=0), models_of(spec, target)
    text, nearest = list(prompt), float("inf")
    caches = [None] * len(models)
    fed = text
    for _ in range(max_tokens):
        rows = []
        for i, model in enumerate(models):
            read = reference_model(model)(
                input_ids=known(fed, model), past_key_values=caches[i], use_cache=True
            )
            caches[i] = read.past_key_values
            rows.append(read.logits[0, -1])
        row = combined_row(rows, spec, prompt, text[len(prompt) :], params)
        best = row.topk(2)
        nearest = min(nearest, float(best.values[0] - best.values[1]))
        fed = [int(best.indices[0])]
        text += fed
    return text[len(prompt) :], nearest
