import dataclasses

import pytest
import torch

from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.packed import Segments

PAD = 7


@pytest.fixture(scope="module")
def model() -> KimiK25:
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, vocab_size=32, num_layers=2))
    module = KimiK25(config, media_pad=PAD)
    initialise(module, torch.Generator().manual_seed(0))
    return module.eval().requires_grad_(False)


def _patches(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_media_tokens_stand_in_their_places_in_order(model: KimiK25) -> None:
    ids = torch.tensor([1, PAD, PAD, 2, PAD, 3])
    patches = _patches(12)
    x = model.embed(ids, patches, [(1, 2, 4), (1, 2, 2)])
    first, second = model.encode_media(patches[:8], [(1, 2, 4)]), model.encode_media(patches[8:], [(1, 2, 2)])
    torch.testing.assert_close(x[[1, 2, 4]], torch.cat([first, second]), atol=1e-5, rtol=1e-4)
    assert torch.equal(x[[0, 3, 5]], model.language_model.model.embed_tokens.weight[[1, 2, 3]])


def test_an_image_changes_only_what_follows_in_its_document(model: KimiK25) -> None:
    ids = torch.tensor([1, 2, PAD, 3, 4, 1, PAD, 3])
    patches = _patches(8)
    other = patches.clone()
    other[:4] += 1.0
    grids = [(1, 2, 2), (1, 2, 2)]
    a, b = (model(Batch(ids, Segments([5, 3]), p, grids)) for p in (patches, other))
    same = (a - b).abs().amax(-1) < 1e-6
    assert same.tolist() == [True, True, False, False, False, True, True, True]


@pytest.mark.parametrize(("pads", "grids"), [(1, [(1, 2, 4)]), (3, [(1, 2, 4)]), (0, [(1, 2, 2)]), (2, [])])
def test_wrong_number_of_placeholders_is_refused(model: KimiK25, pads: int, grids: list[tuple[int, int, int]]) -> None:
    ids = torch.tensor([1, *[PAD] * pads, 2])
    patches = _patches(sum(t * h * w for t, h, w in grids))
    with pytest.raises(ValueError, match=f"{pads} media placeholders for"):
        model.embed(ids, patches, grids)
