import dataclasses
import math

import pytest
import torch

from baltoro.model.config import K25, MOONLIGHT
from baltoro.model.rope import inverse_frequencies, rotate, rotations, softmax_scale, yarn_correction_range


def test_k25_scale_and_correction_range() -> None:
    text = K25.text
    assert text.yarn is not None
    assert softmax_scale(text) == pytest.approx(0.1446796, abs=5e-8)
    assert softmax_scale(MOONLIGHT.text) == pytest.approx(192**-0.5, rel=1e-12)
    assert yarn_correction_range(64, 50000.0, text.yarn) == (8, 20)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    stretched = inverse_frequencies(K25.text)
    plain = inverse_frequencies(dataclasses.replace(K25.text, yarn=None))
    torch.testing.assert_close(plain, torch.tensor([50000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64))
    assert torch.equal(stretched[:9], plain[:9])
    torch.testing.assert_close(stretched[20:], plain[20:] / 64)
    # Half way of the ramp, index 14: the mean of the frequency and its 64th part.
    assert float(stretched[14]) == pytest.approx(float(plain[14]) * (1 + 1 / 64) / 2, rel=1e-5)


def test_rotation_is_a_complex_product_of_adjacent_channels() -> None:
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    frequencies = torch.tensor([1.0, 0.3, 0.05, 0.01])
    positions = torch.tensor([0, 1, 2, 7, 4000])
    rotation = rotations(positions, frequencies, x.dtype)
    turned = rotate(x, rotation)
    for t, position in enumerate(positions.tolist()):
        for h in range(3):
            for pair, frequency in enumerate(frequencies.tolist()):
                value = complex(*x[t, h, 2 * pair : 2 * pair + 2].tolist())
                angle = position * frequency
                want = value * complex(math.cos(angle), math.sin(angle))
                got = complex(*turned[t, h, 2 * pair : 2 * pair + 2].tolist())
                assert abs(got - want) < 1e-3 if position == 4000 else abs(got - want) < 1e-6
