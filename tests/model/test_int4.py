import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from baltoro.model.int4 import GROUP, dequantise, pack, quantise, unpack

steps = hnp.arrays(np.int8, (3, 64), elements=st.integers(-8, 7))
# Positive normal bfloat16 that leave room for eight steps and for half a step.
scales = hnp.arrays(np.int16, (3, 2), elements=st.integers(0x0180, 0x7D00)).map(
    lambda bits: torch.from_numpy(bits.copy()).view(torch.bfloat16)
)
floats = st.floats(-(2.0**100), 2.0**100, width=32)


def test_eight_steps_fill_an_int32_lowest_nibble_first() -> None:
    """Steps -8..-1 are stored as 0..7, so the word reads 7 6 5 4 3 2 1 0 in hexadecimal; 0..7 as 8..15."""
    word = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32)
    values = torch.arange(-8, 8, dtype=torch.int8)[None]
    assert torch.equal(pack(values), word)
    assert torch.equal(unpack(word), values)


@given(steps)
def test_packing_by_shifts_agrees_and_unpacks(values: np.ndarray) -> None:
    nibbles = (values.astype(np.int64) + 8).reshape(3, -1, 8)
    words = (nibbles << (4 * np.arange(8))).sum(-1).astype(np.uint32).view(np.int32)
    assert np.array_equal(pack(torch.from_numpy(values)).numpy(), words)
    assert np.array_equal(unpack(torch.from_numpy(words)).numpy(), values)


def test_a_group_shares_a_scale_along_the_input() -> None:
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    values = torch.full((1, 64), 3, dtype=torch.int8)
    assert dequantise(values, scale).tolist() == [[1.5] * 32 + [6.0] * 32]


def _with(values: np.ndarray, place: int, step: int) -> torch.Tensor:
    """`step` in each group."""
    groups = values.reshape(6, GROUP).copy()
    groups[:, place] = step
    return torch.from_numpy(groups.reshape(3, 64))


@given(steps, scales, st.sampled_from([7, -8]), st.integers(0, 31))
def test_in_float32_a_group_that_reaches_an_end_comes_back(
    values: np.ndarray, scale: torch.Tensor, end: int, place: int
) -> None:
    q = _with(values, place, end)
    again, same = quantise(dequantise(q, scale))
    assert torch.equal(again, q)
    assert torch.equal(same, scale)


@given(steps, scales, st.sampled_from([1, -1]), st.integers(0, 31))
def test_after_bfloat16_the_weights_of_a_group_with_a_single_step_come_back(
    values: np.ndarray, scale: torch.Tensor, one: int, place: int
) -> None:
    q = _with(values, place, one)
    weight = dequantise(q, scale).bfloat16()
    again, same = quantise(weight)
    assert torch.equal(dequantise(again, same).bfloat16(), weight)
    # {1, 2} and {2, 4} of half the scale are the same weights; what reaches an end has one spelling.
    full = ((q == 7) | (q == -8)).view(3, 2, GROUP).any(-1)
    assert torch.equal(same[full], scale[full])
    assert torch.equal(again.view(3, 2, GROUP)[full], q.view(3, 2, GROUP)[full])


@given(hnp.arrays(np.float32, (2, 64), elements=floats), st.booleans())
def test_every_weight_is_kept_within_half_a_scale(weight: np.ndarray, rounded: bool) -> None:
    w = torch.from_numpy(weight)
    w = w.bfloat16() if rounded else w
    q, scale = quantise(w)
    error = (w.double() - dequantise(q, scale).double()).abs().unflatten(-1, (-1, GROUP))
    assert (error <= scale.double()[..., None] / 2).all()


@given(st.integers(0, 2**32), st.integers(-100, 100), st.booleans())
def test_so_is_every_weight_of_a_group_without_a_grid(seed: int, exponent: int, rounded: bool) -> None:
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    w = w.bfloat16() if rounded else w
    q, scale = quantise(w)
    error = (w.double() - dequantise(q, scale).double()).abs().unflatten(-1, (-1, GROUP))
    assert (error <= scale.double()[..., None] / 2).all()


def test_normal_weights_lose_less_than_by_the_minmax_observer() -> None:
    """Root mean square error on normal weights, against scale = largest magnitude / 7.5 with clipping."""
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    ours = (w - dequantise(*quantise(w))).square().mean()
    groups = w.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    minmax = (groups - (groups / scale).round().clamp(-8, 7) * scale).square().mean()
    assert ours < 0.95 * minmax


def test_zeros_stay_zeros() -> None:
    q, scale = quantise(torch.zeros(2, 32))
    assert not q.any()
    assert (scale == 2.0**-126).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    w = torch.ones(2, 64)
    w[1, 40] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise(w)
