import numpy as np
import torch

from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.train.packing import pack


def _item(grid: tuple[int, int, int], fill: float) -> MediaItem:
    return MediaItem(np.full((grid[0] * grid[1] * grid[2], 3, 8, 8), fill, dtype=np.float32), grid)


def test_targets_and_sources_by_hand() -> None:
    sequences = [
        TokenSequence([10, 11, 12, 13], [], [0, 0, 1, 1]),
        TokenSequence([20, 21], [_item((1, 2, 2), 2.0)], [1, 1]),  # nothing stands before 20
        TokenSequence([30], [], [0]),
        TokenSequence([40, 41, 42], [_item((1, 2, 4), 4.0), _item((3, 2, 2), 5.0)], [0, 1, 0]),
    ]
    batch = pack(sequences, 8)
    assert batch.batch.ids.tolist() == [10, 11, 12, 13, 20, 21, 30, 40, 41, 42]
    assert batch.targets.tolist() == [12, 13, 21, 41]
    assert batch.sources.tolist() == [1, 2, 4, 7]
    assert batch.tokens == 10
    assert batch.batch.segments.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0, 1, 2]
    assert batch.batch.grids == [(1, 2, 2), (1, 2, 4), (3, 2, 2)]
    assert batch.batch.patches[:, 0, 0, 0].tolist() == [2.0] * 4 + [4.0] * 8 + [5.0] * 12


def test_text_alone_has_no_patches() -> None:
    batch = pack([TokenSequence([1, 2], [], [0, 1])], 8)
    assert batch.batch.patches.shape == (0, 3, 8, 8)
    assert batch.batch.ids.dtype == torch.int64
