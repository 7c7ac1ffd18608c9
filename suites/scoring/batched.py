"""Batched greedy decoding in which rows that have ended leave the batch, for answers that nobody times.

generate() feeds ended rows until the longest is done, and copies the keys and values of all of them at each step; rows
of the shipped tasks end after 40 to 80 % of it in the mean. Here they leave, the recorder is told which go on, and each
row's tokens and routing are those that generate() gives it.
"""

from __future__ import annotations

from typing import Any

import torch

from mobile.runtime.recording import Recorder

DROPPED_SHARE = 1 / 16  # more than this of the rows have ended before they leave, since the others are copied then
CACHE = "past_key_values"
PER_ROW = ("attention_mask", "position_ids", "token_type_ids")


class Batch:
    """The decoding loop of one call of generate(), as its `custom_generate`.

    `ids` are by row what was written, `going` the rows that have not left: each row's number when the batch began.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.ids: list[list[int]] = []
        self.going: list[int] = []

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,  # all of it that is greedy decoding's is in the two before
        **kwargs: Any,
    ) -> torch.Tensor:
        """Decode all rows of `input_ids` (rows, length), prepared by generate(). Return the last rows as they ended."""
        for of_loop in ("synced_gpus", "streamer"):
            kwargs.pop(of_loop, None)
        self.ids = [[] for _ in range(len(input_ids))]
        self.going = list(range(len(input_ids)))
        ended = torch.zeros(len(self.going), dtype=torch.bool, device=input_ids.device)
        begun = False
        while not bool(ended.all()):
            # 1. Drop the rows that have ended, once that is worth it.
            if int(ended.sum()) > DROPPED_SHARE * len(self.going) and hasattr(kwargs.get(CACHE), "reorder_cache"):
                kept = (~ended).nonzero()[:, 0]
                input_ids, ended = input_ids[kept], ended[kept]
                kwargs = _rows(kwargs, kept)
                self.recorder.keep(kept.tolist())
                self.going = [self.going[row] for row in kept.tolist()]
            # 2. Write one token more of each row.
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1 if begun else None, is_first_iteration=not begun, **kwargs
            )
            output = model(**inputs, return_dict=True)
            kwargs, begun = model._update_model_kwargs_for_generation(output, kwargs), True
            tokens = logits_processor(input_ids, output.logits[:, -1].float()).argmax(-1)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            for row, token, over in zip(self.going, tokens.tolist(), ended.tolist(), strict=True):
                if not over:
                    self.ids[row].append(token)
            ended = ended | stopping_criteria(input_ids, None)
        return input_ids


def _rows(kwargs: dict[str, Any], kept: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of the forward passes to come with the rows `kept` alone; the cache changes in place."""
    kwargs[CACHE].reorder_cache(kept)
    per_row = {name: kwargs[name] for name in PER_ROW if kwargs.get(name) is not None}
    return {**kwargs, **{name: value[..., kept, :] for name, value in per_row.items()}}
