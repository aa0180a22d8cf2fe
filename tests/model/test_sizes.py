"""The published layout counted on the meta device: no weight is allocated. Totals from model.md section 2."""

import pytest
import torch

from baltoro.model.config import K25
from baltoro.model.kimi import KimiK25, count_parameters, routers


@pytest.fixture(scope="module")
def k25() -> KimiK25:
    with torch.device("meta"):
        return KimiK25(K25, media_pad=163605)


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_k25_totals(k25: KimiK25) -> None:
    biases = sum(router.e_score_correction_bias.numel() for router in routers(k25))
    assert biases == 60 * 384
    assert _numel(k25.language_model) + biases == 1_026_408_232_448
    assert _numel(k25.vision_tower) == 416_866_032
    assert _numel(k25.mm_projector) == 54_277_888


def test_k25_active_per_token(k25: KimiK25) -> None:
    total, active = count_parameters(k25)
    assert total == 1_026_408_232_448 - 60 * 384 + 416_866_032 + 54_277_888
    assert active == 32_861_500_928 - 60 * 384 + 416_866_032 + 54_277_888
