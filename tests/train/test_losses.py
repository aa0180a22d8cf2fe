import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from baltoro.chat.messages import TokenSequence
from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.packed import Segments
from baltoro.train.losses import head_cross_entropy, head_logprobs, next_token_loss, siglip_loss
from baltoro.train.packing import pack


def test_siglip_loss_is_the_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 7, generator=generator) * 3, torch.randn(5, 7, generator=generator)
    total = 0.0
    for i in range(5):
        for j in range(5):
            a, b = images[i].tolist(), texts[j].tolist()
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            logit = 4.0 * cosine - 1.5
            total += math.log(1 + math.exp(-logit if i == j else logit))
    got = siglip_loss(images, texts, torch.tensor(4.0), torch.tensor(-1.5))
    assert float(got) == pytest.approx(total / 5, rel=1e-5)


def test_next_token_loss_is_the_mean_over_marked_tokens_of_every_document_alone() -> None:
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, vocab_size=32, num_layers=2))
    model = KimiK25(config, media_pad=31)
    initialise(model, torch.Generator().manual_seed(0))
    model.eval().requires_grad_(False)
    sequences = [
        TokenSequence([3, 1, 4, 1, 5, 9, 2, 6], [], [0, 0, 0, 1, 1, 0, 1, 1]),
        TokenSequence([5, 3, 5, 8], [], [1, 1, 0, 1]),
    ]
    losses: list[float] = []
    for s in sequences:
        hidden = model(Batch(torch.tensor(s.ids), Segments([len(s.ids)]), torch.empty(0, 3, 8, 8), []))
        probabilities = model.logits(hidden).double().softmax(-1)
        for i in range(1, len(s.ids)):
            if s.loss_mask[i]:
                losses.append(-math.log(float(probabilities[i - 1, s.ids[i]])))
    assert len(losses) == 6
    assert float(next_token_loss(model, pack(sequences, 8))) == pytest.approx(sum(losses) / 6, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 1024, 2500])
def test_blocks_through_the_head_equal_the_whole_with_its_gradients(rows: int) -> None:
    """In float64, below, at and beyond the rows of one block; the loss is scaled, as by a mean over micro-batches, and
    every log-probability has a weight of its own, as from Eq. 1."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (rows,), generator=generator)
    slopes = torch.randn(rows, generator=generator, dtype=torch.float64)

    def whole(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (h @ w.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    _assert_same(
        hidden,
        weight,
        lambda h, w: head_cross_entropy(h, w, targets),
        lambda h, w: -whole(h, w).mean(),
    )
    _assert_same(
        hidden,
        weight,
        lambda h, w: (head_logprobs(h, w, targets) * slopes).sum(),
        lambda h, w: (whole(h, w) * slopes).sum(),
    )


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _assert_same(hidden: torch.Tensor, weight: torch.Tensor, *losses: Loss) -> None:
    results: list[tuple[torch.Tensor, ...]] = []
    for loss in losses:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w)
        (value * 0.3).backward()
        assert h.grad is not None
        assert w.grad is not None
        results.append((value.detach(), h.grad, w.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)
