import dataclasses

import pytest
import torch

from baltoro.model.config import NANO, ModelConfig, Yarn
from baltoro.model.init import induction_heads, initialise
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.packed import Segments


def _losses(config: ModelConfig, wired: bool, half: int) -> tuple[float, float]:
    """Mean loss on the first and on the second half of sequences that are the same random tokens twice."""
    generator = torch.Generator().manual_seed(0)
    model = KimiK25(config, media_pad=0)
    initialise(model, generator)
    if wired:
        induction_heads(model, generator)
    model.eval().requires_grad_(False)
    once = torch.randint(1, config.text.vocab_size, (4, half), generator=generator)
    ids = torch.cat([once, once], 1)
    hidden = model(Batch(ids.flatten(), Segments([2 * half] * 4), torch.empty(0, 3, 8, 8), []))
    logprobs = model.logits(hidden).log_softmax(-1).view(4, 2 * half, -1)[:, :-1]
    loss = -logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    # The first token of the second half cannot be known to repeat; its successor is the first that can be looked up.
    return float(loss[:, : half - 1].mean()), float(loss[:, half:].mean())


@pytest.mark.parametrize("yarn", [None, Yarn(factor=4.0, original_max_position=512)])
@pytest.mark.parametrize(("half", "gain"), [(20, 2.5), (100, 1.5)])
def test_untrained_induction_heads_see_a_repetition(half: int, gain: float, yarn: Yarn | None) -> None:
    """In nats per token, before any training: seen about 8.1 -> 5.0 over 20 tokens and 8.0 -> 5.8 over 100. Without the
    circuit both halves are alike."""
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, yarn=yarn))
    first, second = _losses(config, wired=True, half=half)
    assert second < first - gain
    first, second = _losses(config, wired=False, half=half)
    assert abs(second - first) < 0.2


def test_induction_heads_need_a_fitting_layout() -> None:
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, v_head_dim=16))
    with pytest.raises(ValueError, match="v_head_dim"):
        induction_heads(KimiK25(config, media_pad=0), torch.Generator())


def test_initialisation_is_a_function_of_the_seed() -> None:
    models = [KimiK25(NANO, media_pad=0) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, torch.Generator().manual_seed(seed))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["language_model.lm_head.weight"], states[2]["language_model.lm_head.weight"])
