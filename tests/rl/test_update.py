import dataclasses
import random
import statistics

import pytest
import torch
from torch import Tensor

from baltoro.chat.messages import TokenSequence
from baltoro.model.config import NANO
from baltoro.model.init import initialise
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.packed import Segments
from baltoro.optim.muon import MuonAdamW, MuonConfig
from baltoro.rl.objective import ObjectiveConfig
from baltoro.rl.update import Sample, update

CONFIG = dataclasses.replace(
    NANO, text=dataclasses.replace(NANO.text, vocab_size=40, hidden_size=32, num_layers=2, initializer_range=0.2)
)
OBJECTIVE = ObjectiveConfig(alpha=0.8, beta=1.25, tau=0.05)


class Recorder(MuonAdamW):
    """Keeps the gradients of the step instead of taking it."""

    def step(self, lr: float) -> float:
        self.seen = {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in self.params.items()}
        for p in self.params.values():
            p.grad = None
        return 0.0


def _model() -> KimiK25:
    model = KimiK25(CONFIG, media_pad=39)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def _logprobs(model: KimiK25, ids: list[int]) -> Tensor:
    """Of every token after the first, each sequence alone."""
    hidden = model(Batch(torch.tensor(ids), Segments([len(ids)]), torch.empty(0, 3, 8, 8), []))
    return model.logits(hidden)[:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def _samples(model: KimiK25) -> list[Sample]:
    rng = random.Random(0)
    out: list[Sample] = []
    for length, advantage in ((9, 0.5), (30, -0.25), (12, -0.5), (21, 0.25), (14, 0.0)):
        ids = [rng.randrange(39) for _ in range(length)]
        mask = [0, 0, *(rng.randrange(2) for _ in range(length - 3)), 1]
        with torch.no_grad():
            known = [0.0, *_logprobs(model, ids).tolist()]
        engine = [p + rng.gauss(0, 0.2) if m else 99.0 for p, m in zip(known, mask, strict=True)]
        out.append(Sample(TokenSequence(ids, [], mask), engine, advantage, [i // 7 for i in range(length)]))
    return out


def test_gradients_are_those_of_eq_1_over_the_whole_batch_however_it_is_cut() -> None:
    model = _model()
    samples = _samples(model)
    total = sum(sum(s.sequence.loss_mask) for s in samples)
    loss = torch.zeros(())
    for sample in samples:
        logprobs = _logprobs(model, sample.sequence.ids)
        for position, marked in enumerate(sample.sequence.loss_mask):
            if marked:
                d = logprobs[position - 1] - sample.engine_logprobs[position]
                inside = bool(0.8 <= d.exp() <= 1.25)
                ratio = d.exp() if inside else d.exp().detach().clamp(0.8, 1.25)
                loss = loss - (ratio * sample.advantage - 0.05 * d * d) / total
    named = dict(model.named_parameters())
    gaps = [
        (age, abs(engine - p))
        for s in samples
        for age, engine, p, m in zip(
            s.ages,
            s.engine_logprobs,
            [0.0, *_logprobs(model, s.sequence.ids).tolist()],
            s.sequence.loss_mask,
            strict=True,
        )
        if m
    ]
    by_age = {age: statistics.mean(gap for a, gap in gaps if a == age) for age in range(5)}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    for micro_tokens in (1, 35, 10_000):
        recorder = Recorder(model.named_parameters(), MuonConfig())
        report = update(model, recorder, samples, 0.1, OBJECTIVE, micro_tokens)
        assert report.loss == pytest.approx(float(loss.detach()), abs=1e-6)
        assert report.tokens == total
        assert 0.1 < report.outside < 0.6
        assert report.mismatch_by_age == pytest.approx(by_age, abs=1e-5)
        for name, gradient in zip(named, gradients, strict=True):
            torch.testing.assert_close(recorder.seen[name], gradient, atol=2e-6, rtol=1e-3)


def test_one_step_raises_what_was_good_and_lowers_what_was_bad() -> None:
    model = _model()
    good, bad = [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8, 7]
    mask = [0, 0, 0, 1, 1, 1]
    before = [_logprobs(model, ids).detach() for ids in (good, bad)]
    samples = [
        Sample(TokenSequence(ids, [], mask), [0.0, *known.tolist()], advantage, [0] * 6)
        for ids, known, advantage in zip((good, bad), before, (0.5, -0.5), strict=True)
    ]
    optimizer = MuonAdamW(model.named_parameters(), MuonConfig(weight_decay=0.0), torch.float32)
    update(model, optimizer, samples, 2e-3, ObjectiveConfig(), 100)
    after = [_logprobs(model, ids).detach() for ids in (good, bad)]
    assert float((after[0] - before[0])[2:].sum()) > 0.05
    assert float((after[1] - before[1])[2:].sum()) < -0.05
