import itertools
import random

import numpy as np
import pytest

from baltoro.world import lettering
from baltoro.world.lettering import STEMS, ink, sample_lettering
from baltoro.world.scenes import Split


def drawn(split: Split) -> list[tuple[list[str], str]]:
    """Stems and font."""
    rng = random.Random(1)
    sampled = (sample_lettering(rng, split) for _ in range(8000))
    return [(lettering.text.split(" "), lettering.font) for lettering in sampled]


def test_splits_share_no_pair_in_a_font_but_every_pair_is_trained_on():
    train, heldout = drawn("train"), drawn("heldout")
    assert {tuple(stems) for stems, _ in train if len(stems) == 1} == {(stem,) for stem in STEMS}
    assert {len(stems) for stems, _ in train} == {1, 2, 3}
    assert {len(stems) for stems, _ in heldout} == {2}
    beside, held = (
        {(*pair, font) for stems, font in texts for pair in itertools.pairwise(stems)} for texts in (train, heldout)
    )
    assert not beside & held
    assert len(beside | held) == 3 * len(STEMS) ** 2
    assert len({(a, b) for a, b, _ in beside}) == len(STEMS) ** 2
    for place in (0, 1):
        assert {pair[place] for pair in held} == set(STEMS)


@pytest.mark.parametrize("font", lettering._FONTS)
@pytest.mark.parametrize("pixels_high", lettering._PIXELS)
def test_no_two_stems_look_alike(font: str, pixels_high: int):
    pictures = [ink(stem, font, pixels_high) for stem in STEMS]
    width = max(picture.shape[1] for picture in pictures)
    padded = np.stack([np.pad(picture, ((0, 0), (0, width - picture.shape[1]))) for picture in pictures])
    difference = np.abs(padded[:, None] - padded[None]).sum(axis=(2, 3))
    assert difference[~np.eye(len(STEMS), dtype=bool)].min() > 20  # in full pixels
    assert padded.sum(axis=(1, 2)).min() > 40


def test_ink_stays_inside_and_stands_out():
    rng = random.Random(3)
    for _ in range(400):
        pixels = sample_lettering(rng, "train").render(rng).pixels.astype(int)
        ground = pixels[0, 0]
        assert (pixels[[0, -1]] == ground).all()
        assert (pixels[:, [0, -1]] == ground).all()
        luminance = pixels @ np.array([0.299, 0.587, 0.114])
        assert np.ptp(luminance) > 60
