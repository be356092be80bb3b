"""The Bradley-Terry loss over groups: all pairs of a speech in one step, each of its responses read once.

    rows = [group_example(pairs_of_one_speech, use_margin=False), ...]
    pad_apart(tokenizer, rows[0], max_length=512)
    batch = GroupCollator(tokenizer, max_length=512)(rows)  # tensors of one step
    loss = preference_loss(rewards_N, batch, smoothing=0.0, center=0.01)

A single pair is a group of two responses, so both ways of training are one. With K responses a speech's K (K - 1) / 2
pairs cost K readings instead of K (K - 1), as in InstructGPT (arXiv 2203.02155, section 3.5).

Shapes: N responses, T tokens, P pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psyray.errors import PsyrayError
from psyray.records import Row
from psyray.reward.body import chat_tokens, padded


def group_example(pairs: Sequence[Row], use_margin: bool) -> Row:
    """PAIRS rows of one conversation as one group: its texts, each once, and by place which beat which."""
    place: dict[str, int] = {}
    sides = {side: [place.setdefault(p[side], len(place)) for p in pairs] for side in ("chosen", "rejected")}
    margins = [float(pair["margin"]) if use_margin else 0.0 for pair in pairs]
    return {"messages": pairs[0]["messages"], "responses": list(place), **sides, "margin": margins}


def blank(group: Row) -> Row:
    """A group of no pair that fills a step up: it is read, for all workers take the same turns, and weighs nothing."""
    return {"messages": group["messages"], "responses": [""], "chosen": [], "rejected": [], "margin": []}


@dataclass(frozen=True)
class GroupCollator:
    """Groups as the tensors of one step, filled up on the right.

    `input_ids` and `attention_mask` are [N, T]; `chosen` and `rejected`, places among the N, `margin` and `share` [P].
    Each group weighs the same, divided equally among its pairs: a pair weighs 1 / share.
    """

    tokenizer: Any
    max_length: int

    def __call__(self, groups: Sequence[Row]) -> dict[str, Any]:
        import torch

        tokens: list[list[int]] = []
        # Whole numbers for the weights: the trainer rounds what is broken to bfloat16.
        columns: dict[str, list[Any]] = {"chosen": [], "rejected": [], "margin": [], "share": []}
        for group in groups:
            for side in ("chosen", "rejected"):
                columns[side] += [len(tokens) + place for place in group[side]]
            columns["margin"] += group["margin"]
            columns["share"] += [len(group["margin"])] * len(group["margin"])
            tokens += _read(self.tokenizer, group, self.max_length)
        ids, mask = padded(tokens, self.tokenizer.pad_token_id)
        kinds = {"margin": torch.float32}
        found = {key: torch.tensor(c, dtype=kinds.get(key, torch.int64)) for key, c in columns.items()}
        return {"input_ids": ids, "attention_mask": mask} | found


def _read(tokenizer: Any, group: Row, max_length: int) -> list[list[int]]:
    """The group's chats as tokens, as they are scored later: one that is too long loses its beginning."""
    chats = [[*group["messages"], {"role": "assistant", "content": text}] for text in group["responses"]]
    return [chat_tokens(tokenizer, chat, max_length) for chat in chats]


def pad_apart(tokenizer: Any, group: Row, max_length: int) -> None:
    """Have the tokenizer pad with a special token other than the one that chats, such as the group's, end in.

    Sequence classification reads the last token that is not padding, and many a tokenizer pads with just the token
    that its template ends a chat in. PsyrayError where it has no other.
    """
    last = _read(tokenizer, group, max_length)[0][-1]
    special = [place for place, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    found = [token for token in (tokenizer.pad_token_id, *special) if token not in (None, last)]
    if not found:
        raise PsyrayError(
            "the reward model's tokenizer has no special token but the one that ends a chat: there is nothing to pad "
            "with; give it a padding token of its own"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found[0])


def preference_loss(rewards_N: Any, batch: Mapping[str, Any], *, smoothing: float, center: float) -> Any:
    """The sum over groups of their pairs' mean of

        -(1 - s) log sigmoid(z) - s log sigmoid(-z) + center (r_chosen + r_rejected)^2

    with z = r_chosen - r_rejected - margin (Llama 2, arXiv 2307.09288, equation 2) and the centring of 2312.09244.
    With a smoothing s > 0 the first two are least where the gap is margin + log((1 - s) / s), not endless.
    """
    from torch.nn.functional import logsigmoid

    chosen_P, rejected_P = rewards_N[batch["chosen"]], rewards_N[batch["rejected"]]
    z_P = chosen_P - rejected_P - batch["margin"]
    loss_P = -(1 - smoothing) * logsigmoid(z_P) - smoothing * logsigmoid(-z_P)
    return ((loss_P + center * (chosen_P + rejected_P) ** 2) / batch["share"]).sum()
