import dataclasses

import pytest
import torch

from baltoro.model.attention import Segments
from baltoro.model.config import NANO, ModelConfig, Yarn
from baltoro.model.init import induction_heads, initialise
from baltoro.model.kimi import Batch, KimiK25


def _repeat_loss(config: ModelConfig, wired: bool, half: int) -> tuple[float, float, float]:
    """Mean loss on the first half, on the second half, and greedy accuracy on the second half, of eight sequences that
    are the same random tokens twice."""
    generator = torch.Generator().manual_seed(0)
    model = KimiK25(config, media_pad=0)
    initialise(model, generator)
    if wired:
        induction_heads(model, generator)
    model.eval().requires_grad_(False)
    once = torch.randint(1, config.text.vocab_size, (8, half), generator=generator)
    ids = torch.cat([once, once], 1)
    hidden = model(Batch(ids.flatten(), Segments([2 * half] * 8), torch.empty(0, 3, 8, 8), []))
    logprobs = model.logits(hidden).log_softmax(-1).view(8, 2 * half, -1)[:, :-1]
    loss = -logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    right = (logprobs.argmax(-1) == ids[:, 1:]).float()
    # The first token of the second half has no earlier occurrence behind it; its successor is the first to be known.
    return float(loss[:, : half - 1].mean()), float(loss[:, half:].mean()), float(right[:, half:].mean())


@pytest.mark.parametrize("half", [20, 120])
@pytest.mark.parametrize("yarn", [None, Yarn(factor=4.0, original_max_position=512)])
def test_induction_heads_predict_a_repetition_untrained(half: int, yarn: Yarn | None) -> None:
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, yarn=yarn))
    first, second, accuracy = _repeat_loss(config, wired=True, half=half)
    _, plain, chance = _repeat_loss(config, wired=False, half=half)
    print(half, yarn, first, second, accuracy, plain, chance)
    assert chance < 0.02
    assert accuracy > 0.9


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
