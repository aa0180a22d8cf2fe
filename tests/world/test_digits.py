import random
from typing import Any, cast

import numpy as np
from sklearn.datasets import load_digits

from baltoro.world.digits import Digit, enlarged, sample_digit

DATA = cast(Any, load_digits())


def test_halves_of_the_data_set():
    rng = random.Random(1)
    train = {sample_digit(rng, "train").index for _ in range(9000)}
    heldout = {sample_digit(rng, "heldout").index for _ in range(9000)}
    assert (min(train), max(train)) == (0, 898)
    assert (min(heldout), max(heldout)) == (899, 1796)
    pictures = DATA.images
    assert not {pictures[i].tobytes() for i in train} & {pictures[i].tobytes() for i in heldout}


def test_value_is_the_label_and_the_picture_is_the_digit():
    rng = random.Random(2)
    for _ in range(200):
        digit = sample_digit(rng, "train")
        assert digit.value == DATA.target[digit.index]
        # Averages over 4 x 4 blocks bring the 8 x 8 original back, a little blurred.
        small = enlarged(digit.index, 32).reshape(8, 4, 8, 4).mean(axis=(1, 3)).ravel()
        assert np.corrcoef(small, DATA.images[digit.index].ravel())[0, 1] > 0.95


def test_both_polarities_have_ink_and_ground():
    rng = random.Random(3)
    corners = {int(np.median(Digit(0, 0).render(rng).pixels[0])) for _ in range(50)}
    assert {0, 255} <= corners
