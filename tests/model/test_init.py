import dataclasses
from collections.abc import Sequence

import pytest
import torch

from baltoro.model.config import NANO, ModelConfig, VisionConfig, Yarn
from baltoro.model.init import induction_heads, initialise, whiten_patches
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.packed import Segments
from baltoro.model.vit import VisionTower

LABELS, COLUMNS = range(2020, 2040), range(2000, 2020)


def _untrained(
    seed: int, labels: Sequence[int] = LABELS, columns: Sequence[int] = COLUMNS
) -> tuple[KimiK25, torch.Generator]:
    """A nano model with the circuit and nothing learned, and the generator behind it."""
    generator = torch.Generator().manual_seed(seed)
    model = KimiK25(NANO, media_pad=0)
    initialise(model, generator)
    induction_heads(model, labels, columns, generator)
    return model.eval().requires_grad_(False), generator


def _logits(model: KimiK25, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab] of one sequence."""
    return model.logits(model(Batch(torch.tensor(ids), Segments([len(ids)]), torch.empty(0, 3, 8, 8), [])))


def _second_half(config: ModelConfig, wired: bool, half: int) -> float:
    """Share of right predictions on the second half of sequences that are the same random tokens twice, from the third
    token on: the first cannot be known to repeat, and what stood before it differs the first time."""
    generator = torch.Generator().manual_seed(0)
    model = KimiK25(config, media_pad=0)
    initialise(model, generator)
    if wired:
        induction_heads(model, LABELS, COLUMNS, generator)
    model.eval().requires_grad_(False)
    once = torch.randint(1, COLUMNS[0], (4, half), generator=generator)
    ids = torch.cat([once, once], 1)
    hidden = model(Batch(ids.flatten(), Segments([2 * half] * 4), torch.empty(0, 3, 8, 8), []))
    right = model.logits(hidden).argmax(-1).view(4, 2 * half)[:, :-1] == ids[:, 1:]
    return float(right[:, half + 1 :].float().mean())


@pytest.mark.parametrize("yarn", [None, Yarn(factor=4.0, original_max_position=512)])
@pytest.mark.parametrize("half", [20, 300])
def test_untrained_induction_heads_see_a_repetition(half: int, yarn: Yarn | None) -> None:
    """Before any training; without the circuit nothing but chance."""
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, yarn=yarn))
    assert _second_half(config, wired=True, half=half) > 0.98
    assert _second_half(config, wired=False, half=half) < 0.02


def test_untrained_induction_heads_follow_the_longest_match() -> None:
    """The last token occurred twice, with other successors; the token before it decides."""
    model, generator = _untrained(1)
    right = 0
    for _ in range(20):
        one, two, last, *rest = torch.randperm(2000, generator=generator)[:60].add(1).tolist()
        for before, wanted in ((one, rest[0]), (two, rest[1])):
            ids = [*rest[2:20], one, last, rest[0], *rest[20:40], two, last, rest[1], *rest[40:], before, last]
            right += int(_logits(model, ids)[-1].argmax()) == wanted
    assert right >= 36


def _rows_told_apart(marked: bool) -> float:
    """Share of right values when twelve rows are written again in another order. A row is its label, eight tokens that
    all rows have, one of four values, and five tokens that all rows have."""
    right = 0
    for seed in range(8):
        model, generator = _untrained(seed, labels=LABELS if marked else ())
        key, end, values = torch.randperm(2000, generator=generator)[:17].add(1).split((8, 5, 4))
        value = values[torch.randint(4, (12,), generator=generator)].tolist()
        rows = [[LABELS[i], *key.tolist(), value[i], *end.tolist()] for i in range(12)]
        order = torch.randperm(12, generator=generator).tolist()
        ids = [token for i in order for token in rows[i]] + [token for row in rows for token in row]
        guesses = _logits(model, ids).argmax(-1)[len(ids) // 2 + 8 :: 15].tolist()
        right += sum(guess == want for guess, want in zip(guesses, value, strict=True))
    return right / (8 * 12)


def test_untrained_induction_heads_tell_rows_apart_by_their_labels() -> None:
    """Where everything that the circuit looks back at is the same in all rows."""
    assert _rows_told_apart(marked=True) > 0.85
    assert _rows_told_apart(marked=False) < 0.45


def test_untrained_induction_heads_know_where_a_repetition_ends() -> None:
    """Twelve rows with values like 2.0.0, written again in another order: behind the second 0 a value has its end, not
    a point, as behind the first."""
    right = 0
    for seed in range(8):
        model, generator = _untrained(seed)
        equals, point, end, *parts = torch.randperm(1990, generator=generator)[:27].add(1).tolist()
        rows = [[LABELS[i], equals, parts[i], point, parts[12 + i], point, parts[12 + i], end] for i in range(12)]
        order = torch.randperm(12, generator=generator).tolist()
        ids = [token for i in order for token in rows[i]] + [token for row in rows for token in row]
        guesses = _logits(model, ids).argmax(-1)[len(ids) // 2 + 6 :: 8].tolist()
        right += guesses.count(end)
    assert right / (8 * 12) > 0.85


def _next_columns(marked: bool, length: int) -> int:
    """In how many of 20 rows the next column is the likeliest of five. A list of columns stands first, then a page with
    all of them in another order, then a row's cell whose value of `length` tokens stands nowhere else."""
    right = 0
    for seed in range(20):
        model, generator = _untrained(seed, columns=COLUMNS if marked else ())
        columns = [COLUMNS[i] for i in torch.randperm(20, generator=generator)[:5].tolist()]
        words = torch.randperm(1990, generator=generator).add(1).tolist()
        asked, wanted = columns[1], columns[3]
        listed = [columns[4], asked, wanted, columns[0]]
        page = [token for column in columns for token in (words.pop(), column, words.pop(), words.pop())]
        cell = [LABELS[3], words.pop(), asked, *(words.pop() for _ in range(length))]
        ids = [words.pop(), *listed, words.pop(), *page, words.pop(), *cell]
        logits = _logits(model, ids)[-1]
        right += max(columns, key=logits.tolist().__getitem__) == wanted
    return right


@pytest.mark.parametrize(("length", "known"), [(2, 12), (6, 11)])
def test_untrained_induction_heads_know_the_next_column(length: int, known: int) -> None:
    """However long the value before it is."""
    assert _next_columns(marked=True, length=length) >= known
    assert _next_columns(marked=False, length=length) <= 5


def _columns_told_apart(marked: bool) -> float:
    """Share of values found in a page of five columns whose values begin with the same three tokens and go on
    differently; a row with the page's label has them in another order."""
    right = 0
    for seed in range(8):
        model, generator = _untrained(seed, columns=COLUMNS if marked else ())
        columns = [COLUMNS[i] for i in torch.randperm(20, generator=generator)[:5].tolist()]
        start, values = torch.randperm(1990, generator=generator)[:8].add(1).split((3, 5))
        cells = [[column, *start.tolist(), value] for column, value in zip(columns, values.tolist(), strict=True)]
        order = torch.randperm(5, generator=generator).tolist()
        page = [token for cell in cells for token in cell]
        ids = [LABELS[3], *page, LABELS[3]] + [token for i in order for token in cells[i]]
        guesses = _logits(model, ids).argmax(-1)[len(ids) // 2 + 4 :: 5].tolist()
        right += sum(guess == cells[i][-1] for guess, i in zip(guesses, order, strict=True))
    return right / (8 * 5)


def test_untrained_induction_heads_tell_columns_apart() -> None:
    """Where two values of a page are alike for longer than the circuit looks back."""
    assert _columns_told_apart(marked=True) > 0.9
    assert _columns_told_apart(marked=False) < 0.3


@pytest.mark.parametrize("change", [{"v_head_dim": 16}, {"num_heads": 4}])
def test_induction_heads_need_a_fitting_layout(change: dict[str, int]) -> None:
    config = dataclasses.replace(NANO, text=dataclasses.replace(NANO.text, **change))
    with pytest.raises(ValueError, match=r"5 heads or more.* v_head_dim"):
        induction_heads(KimiK25(config, media_pad=0), LABELS, COLUMNS, torch.Generator())


def test_initialisation_is_a_function_of_the_seed() -> None:
    models = [KimiK25(NANO, media_pad=0) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise(model, torch.Generator().manual_seed(seed))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["language_model.lm_head.weight"], states[2]["language_model.lm_head.weight"])


def test_whitened_patches_are_uncorrelated_and_nothing_is_lost() -> None:
    """Patches that are 8 hidden causes, of which the strongest is 300 times the weakest, in 12 pixels: 8 channels of
    unit variance and mean 0, from which the patches can be had back."""
    generator = torch.Generator().manual_seed(0)
    tower = VisionTower(VisionConfig(2, 8, 1, 1, 8, 2, 2))
    causes = torch.randn(4000, 8, generator=generator) * torch.logspace(0, 2.5, 8)
    pixels = causes @ torch.linalg.qr(torch.randn(12, 8, generator=generator))[0].T + 5
    whiten_patches(tower, pixels.view(-1, 3, 2, 2), generator)
    channels = tower.patch_embed.proj(pixels.view(-1, 3, 2, 2)).detach().view(-1, 8)
    torch.testing.assert_close(torch.cov(channels.T), torch.eye(8), atol=2e-3, rtol=0)
    torch.testing.assert_close(channels.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    centred = pixels - pixels.mean(0)
    again = channels @ torch.linalg.lstsq(channels, centred).solution
    torch.testing.assert_close(again, centred, atol=0.05, rtol=0)


def test_a_tower_wider_than_a_patch_holds_all_of_it() -> None:
    """12 pixels in 20 channels (K2.5's has 588 in 1,152): 12 uncorrelated directions, and unit variance on average."""
    generator = torch.Generator().manual_seed(0)
    tower = VisionTower(VisionConfig(2, 20, 1, 1, 8, 2, 2))
    pixels = torch.randn(4000, 12, generator=generator) * torch.logspace(0, 1, 12)
    whiten_patches(tower, pixels.view(-1, 3, 2, 2), generator)
    channels = tower.patch_embed.proj(pixels.view(-1, 3, 2, 2)).detach().view(-1, 20)
    expected = torch.tensor([0.0] * 8 + [20 / 12] * 12)
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(channels.T)), expected, atol=5e-3, rtol=0)
