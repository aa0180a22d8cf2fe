"""Sequences to one packed batch of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baltoro.chat.messages import TokenSequence
from baltoro.model.kimi import Batch
from baltoro.model.packed import Segments


@dataclass(frozen=True)
class TrainingBatch:
    """`targets` int64 [M]: the ids to predict; `sources` int64 [M]: the packed positions that predict them."""

    batch: Batch
    sources: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        return self.batch.segments.total


def pack(sequences: Sequence[TokenSequence], patch_size: int, device: torch.device | None = None) -> TrainingBatch:
    """All sequences one after another; where the mask marks a token, the position before it predicts it."""
    ids = torch.tensor([i for s in sequences for i in s.ids], dtype=torch.int64)
    mask = torch.tensor([m for s in sequences for m in s.loss_mask], dtype=torch.bool)
    segments = Segments([len(s.ids) for s in sequences], device)
    starts = np.cumsum([0] + [len(s.ids) for s in sequences])[:-1]
    mask[torch.from_numpy(starts)] = False  # nothing predicts a first token
    marked = mask.nonzero()[:, 0]
    media = [item for s in sequences for item in s.media]
    patches = (
        torch.from_numpy(np.concatenate([item.patches for item in media]))
        if media
        else torch.empty(0, 3, patch_size, patch_size)
    )
    batch = Batch(ids.to(device), segments, patches.to(device), [item.grid_thw for item in media])
    return TrainingBatch(batch, (marked - 1).to(device), ids[marked].to(device))
