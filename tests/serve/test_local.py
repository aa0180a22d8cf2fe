"""The embedded engine against teacher-forced forwards of the same model: within 1e-5 in float32, 1e-9 in float64."""

import asyncio
import contextlib
import dataclasses
import random

import numpy as np
import pytest
import torch

from baltoro.agent.engine import Completion, Sampling
from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.chat.tokenizer import Tokenizer
from baltoro.model.attention import CachePlan
from baltoro.model.config import NANO
from baltoro.model.decoder import Decoder
from baltoro.model.init import initialise
from baltoro.model.kimi import Batch, KimiK25
from baltoro.model.packed import Segments
from baltoro.model.vit import Grid
from baltoro.serve.local import LocalEngine

TOKENIZER = Tokenizer({bytes([b]): b for b in range(256)})
PAD, STOP = TOKENIZER.media_pad, TOKENIZER.im_end


def _model(seed: int, stops: float = 0.0, dtype: torch.dtype = torch.float32) -> KimiK25:
    """`stops` makes the stop token likely: all embeddings share a direction, and the stop token's head points there."""
    text = dataclasses.replace(
        NANO.text,
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=48,
        kv_lora_rank=96,
        num_layers=2,
        num_heads=4,
        initializer_range=0.1,
    )
    vision = dataclasses.replace(NANO.vision, num_layers=1, hidden_size=32, intermediate_size=32)
    model = KimiK25(dataclasses.replace(NANO, text=text, vision=vision), PAD, dtype)
    initialise(model, torch.Generator().manual_seed(seed))
    model.eval().requires_grad_(False)
    model.language_model.lm_head.weight *= 4  # distributions with a few likely tokens
    if stops:
        shared = torch.randn(48, generator=torch.Generator().manual_seed(seed))
        model.language_model.model.embed_tokens.weight += shared
        model.language_model.lm_head.weight[STOP] = stops * shared / shared.norm()
    return model


def _item(seed: int, grid: tuple[int, int, int] = (1, 2, 4)) -> MediaItem:
    n = grid[0] * grid[1] * grid[2]
    return MediaItem(np.random.default_rng(seed).standard_normal((n, 3, 8, 8), dtype=np.float32), grid)


def _prompt(seed: int, length: int, *media: MediaItem) -> TokenSequence:
    """Random bytes, each picture's placeholders after the first of them."""
    rng = random.Random(seed)
    ids = [rng.randrange(256)]
    for item in media:
        _, h, w = item.grid_thw
        ids += [PAD] * (h * w // 4) + [rng.randrange(256)]
    return TokenSequence(ids + [rng.randrange(256) for _ in range(length)], list(media))


def _rescored(model: KimiK25, prompt: TokenSequence, completion: Completion) -> torch.Tensor:
    """[sampled, vocabulary] log-probabilities of one forward over everything."""
    ids = torch.tensor(prompt.ids + completion.ids)
    patches = torch.cat([torch.empty(0, 3, 8, 8), *(torch.from_numpy(m.patches) for m in prompt.media)])
    hidden = model(Batch(ids, Segments([len(ids)]), patches, [m.grid_thw for m in prompt.media]))
    return model.logits(hidden)[len(prompt.ids) - 1 : -1].log_softmax(-1)


def _check(model: KimiK25, prompt: TokenSequence, completion: Completion) -> None:
    want = _rescored(model, prompt, completion)[torch.arange(len(completion.ids)), completion.ids]
    tolerance = 1e-9 if model.dtype == torch.float64 else 1e-5
    got = torch.tensor(completion.logprobs, dtype=want.dtype)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def _ask(engine: LocalEngine, *requests: tuple[TokenSequence, Sampling]) -> list[Completion]:
    async def run() -> list[Completion]:
        async with engine.run():
            return await asyncio.gather(*(engine.generate(p, s, "a") for p, s in requests))

    return asyncio.run(run())


def _engine(
    model: KimiK25,
    slots: int = 4,
    max_len: int = 96,
    *,
    cache_tokens: int | None = None,
    page: int = 4,
    chunk: int = 2048,
) -> LocalEngine:
    return LocalEngine(
        {"a": model}, TOKENIZER, slots=slots, max_len=max_len, cache_tokens=cache_tokens, page=page, chunk=chunk
    )


def test_logprobs_are_those_of_the_model_at_temperature_1() -> None:
    """More requests than slots, of different lengths, temperatures and media, some ending by themselves."""
    model = _model(0, stops=1.6)
    media: list[list[MediaItem]] = [[], [_item(1)], [], [_item(2), _item(3, (3, 4, 2))], [], [_item(4, (1, 4, 4))]]
    samplings = [Sampling(20, 1.0, 1.0, 0), Sampling(20, 0.6, 0.9, 1), Sampling(20, 0.0, 1.0, 2)]
    requests = [(_prompt(i, 3 + 7 * i, *media[i % 6]), samplings[i % 3]) for i in range(9)]
    done = _ask(_engine(model), *requests)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for (prompt, _), completion in zip(requests, done, strict=True):
        _check(model, prompt, completion)
        assert (completion.ids[-1] == STOP) == (completion.finish_reason == "stop")
        assert STOP not in completion.ids[:-1]


def test_a_narrow_model_trained_in_bfloat16_decodes_in_float32() -> None:
    prompt = _prompt(1, 12, _item(1))
    [completion] = _ask(_engine(_model(0, dtype=torch.bfloat16)), (prompt, Sampling(20)))
    _check(_model(0), prompt, completion)


def test_greedy_takes_the_best_token_whoever_else_is_served() -> None:
    model = _model(1)
    prompt = _prompt(0, 12, _item(1))
    alone = _ask(_engine(model), (prompt, Sampling(16, temperature=0.0)))[0]
    assert _rescored(model, prompt, alone).argmax(-1).tolist() == alone.ids
    mates = [(_prompt(i, 5 * i), Sampling(30, seed=i)) for i in range(1, 6)]
    crowd = _ask(_engine(model, slots=3), *mates[:2], (prompt, Sampling(16, temperature=0.0)), *mates[2:])
    assert crowd[2].ids == alone.ids


def test_a_greedy_completion_is_computed_once_for_all_who_ask() -> None:
    """Also where the one who asked first gives up; and again after an update."""
    engine, prompt, sampling = _engine(_model(1)), _prompt(0, 12, _item(1)), Sampling(16, temperature=0.0)
    alone = _ask(_engine(_model(1)), (prompt, sampling))[0]

    async def run() -> None:
        async with engine.run():
            first, *others = [asyncio.create_task(engine.generate(prompt, sampling, "a")) for _ in range(4)]
            while engine.sampled_tokens < 3:
                await asyncio.sleep(0)
            first.cancel()
            served = await asyncio.gather(*others)
            assert [c.ids for c in served] == 3 * [alone.ids]
            assert [c.logprobs for c in served] == 3 * [pytest.approx(alone.logprobs, abs=1e-5)]
            assert engine.sampled_tokens == 3 + len(alone.ids)
            shorter = await engine.generate(prompt, Sampling(4, temperature=0.0), "a")
            assert shorter.ids == alone.ids[:4]
            engine.update("a", _model(3))
            assert (await engine.generate(prompt, sampling, "a")).ids != alone.ids

    asyncio.run(run())


def test_the_seed_alone_decides_the_draw() -> None:
    model = _model(2)
    request = (_prompt(0, 9), Sampling(24, seed=11))
    alone = _ask(_engine(model), request)[0]
    mates = [(_prompt(i, 4 * i), Sampling(7 * i, seed=i)) for i in range(1, 5)]
    assert _ask(_engine(model, slots=2), *mates, request)[-1].ids == alone.ids
    other = (request[0], Sampling(24, seed=12))
    assert _ask(_engine(model), other)[0].ids != alone.ids


def test_draws_follow_the_distribution_and_top_p_cuts_its_tail() -> None:
    model = _model(8)
    prompt = _prompt(0, 5)
    first = _rescored(model, prompt, Completion([0], [0.0], "length", 0))[0].exp()
    drawn = _ask(_engine(model, slots=64), *((prompt, Sampling(1, seed=i)) for i in range(600)))
    best = int(first.argmax())
    share = sum(c.ids[0] == best for c in drawn) / 600
    deviation = float(first[best] * (1 - first[best]) / 600) ** 0.5
    assert abs(share - float(first[best])) < 4 * deviation
    cut = _ask(_engine(model, slots=64), *((prompt, Sampling(1, top_p=0.3, seed=i)) for i in range(100)))
    ordered, order = first.sort(descending=True)
    nucleus = set(order[: int((ordered.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert {c.ids[0] for c in cut} == nucleus & {c.ids[0] for c in cut}
    assert not {c.ids[0] for c in drawn} <= nucleus


def _turns(
    engine: LocalEngine, opening: TokenSequence, following: TokenSequence, seed: int
) -> tuple[TokenSequence, Completion]:
    """A conversation of two turns; returns the second prompt and its completion."""

    async def run() -> tuple[TokenSequence, Completion]:
        async with engine.run():
            first = await engine.generate(opening, Sampling(40, seed=seed), "a")
            assert first.finish_reason == "stop"
            prompt = TokenSequence(opening.ids + first.ids + following.ids, opening.media + following.media)
            return prompt, await engine.generate(prompt, Sampling(12, seed=seed + 1), "a")

    return asyncio.run(run())


def test_a_continued_context_is_as_good_as_a_fresh_one() -> None:
    model = _model(4, stops=1.6)
    engine = _engine(model, slots=1)
    prompt, second = _turns(engine, _prompt(0, 8, _item(1)), _prompt(1, 6, _item(2, (2, 4, 2))), 0)
    _check(model, prompt, second)
    assert _ask(_engine(model), (prompt, Sampling(12, seed=1)))[0].ids == second.ids


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of the engine read."""
    counts: list[int] = []
    plain = Decoder.extend

    def counted(self: Decoder, x: torch.Tensor, cache: list[torch.Tensor], plan: CachePlan) -> torch.Tensor:
        counts.append(len(x))
        return plain(self, x, cache, plan)

    monkeypatch.setattr(Decoder, "extend", counted)
    return counts


def test_continuing_reads_only_the_new_tokens(reads: list[int]) -> None:
    _turns(_engine(_model(4, stops=1.6)), _prompt(0, 8, _item(1)), _prompt(1, 6, _item(2, (2, 4, 2))), 0)
    # First 1 + 2 + 1 + 8 tokens; then the sampled stop token, which was never read, and 1 + 2 + 1 + 6 that follow it.
    assert sorted(reads)[-2:] == [11, 12]


def test_equal_tokens_with_another_picture_are_another_context() -> None:
    model = _model(5, stops=1.6)
    engine = _engine(model)
    opening, other = _prompt(0, 8, _item(1)), _prompt(0, 8, _item(2))

    async def run() -> tuple[TokenSequence, Completion]:
        async with engine.run():
            first = await engine.generate(opening, Sampling(40), "a")
            assert first.finish_reason == "stop"
            prompt = TokenSequence(other.ids + first.ids + [65, 66], other.media)
            return prompt, await engine.generate(prompt, Sampling(12), "a")

    _check(model, *asyncio.run(run()))


def test_new_weights_forget_old_contexts_and_are_named() -> None:
    old, new = _model(4, stops=1.6), _model(6, stops=1.6)
    engine = _engine(old)
    opening = _prompt(0, 8)
    first = _ask(engine, (opening, Sampling(40)))[0]
    assert first.finish_reason == "stop"
    engine.update("a", new)
    prompt = TokenSequence(opening.ids + first.ids + [65, 66, 67])
    second = _ask(engine, (prompt, Sampling(12)))[0]
    _check(new, prompt, second)
    assert (first.weight_version, second.weight_version) == (0, 1)


def test_roles_speak_with_their_own_models() -> None:
    one, two = _model(0), _model(1)
    engine = LocalEngine({"one": one, "two": two}, TOKENIZER, slots=2, max_len=64)
    prompt = _prompt(0, 9)

    async def run() -> tuple[Completion, Completion]:
        async with engine.run():
            first, second = await asyncio.gather(*(engine.generate(prompt, Sampling(8), r) for r in ("one", "two")))
            return first, second

    first, second = asyncio.run(run())
    _check(one, prompt, first)
    _check(two, prompt, second)


def test_a_request_that_cannot_fit_is_refused() -> None:
    engine = _engine(_model(0), max_len=32)

    async def run() -> Completion:
        async with engine.run():
            with pytest.raises(ValueError, match=r"20 \+ 13 tokens exceed the engine's 32"):
                await engine.generate(_prompt(0, 19), Sampling(13), "a")
            return await engine.generate(_prompt(0, 19), Sampling(12), "a")

    assert len(asyncio.run(run()).ids) == 12


def _crowd(seed: int, n: int) -> list[tuple[TokenSequence, Sampling]]:
    """Agents of a few tasks: the prompts of a task begin alike, with a picture and a clip, and end differently."""
    rng = random.Random(seed)
    requests: list[tuple[TokenSequence, Sampling]] = []
    for i in range(n):
        task = i % 3
        shared = _prompt(task, 9 + 6 * task, *[_item(task, (1, 4, 6)), _item(7, (3, 2, 4))][:task])
        ending = _prompt(100 + i, rng.randrange(9), *[_item(50 + i)][: rng.randrange(2)])
        prompt = TokenSequence(shared.ids + ending.ids, shared.media + ending.media)
        requests.append(
            (prompt, Sampling(rng.randrange(1, 20), rng.choice([0.0, 0.7, 1.0]), rng.choice([0.9, 1.0]), i))
        )
    return requests


@pytest.mark.parametrize(
    ("page", "chunk", "cache_tokens"), [(1, 1, None), (4, 3, None), (4, 2048, 96), (16, 5, 96), (3, 7, 300)]
)
def test_paging_sharing_chunks_and_preemption_change_no_draw(page: int, chunk: int, cache_tokens: int | None) -> None:
    """In float64 rounding decides no draw, so every completion is that of the request served alone in one piece."""
    model = _model(4, stops=1.6, dtype=torch.float64)
    requests = _crowd(page, 10)
    engine = _engine(model, slots=6, page=page, chunk=chunk, cache_tokens=cache_tokens)
    done = _ask(engine, *requests)
    for request, completion in zip(requests, done, strict=True):
        _check(model, request[0], completion)
        assert completion.ids == _ask(_engine(model, slots=1, page=96), request)[0].ids
    assert {c.finish_reason for c in done} == {"stop", "length"}
    # The second time most of it is cached already.
    assert [c.ids for c in _ask(engine, *requests)] == [c.ids for c in done]


def test_the_same_schedule_gives_the_same_bits() -> None:
    model = _model(4, stops=1.6)
    first, second = (_ask(_engine(model, slots=5, cache_tokens=128, chunk=9), *_crowd(0, 12)) for _ in range(2))
    assert [(c.ids, c.logprobs) for c in first] == [(c.ids, c.logprobs) for c in second]


def test_agents_that_begin_together_read_their_prompt_once(reads: list[int]) -> None:
    prompt = _prompt(0, 40, _item(1))  # 44 tokens; the last one is always read, so ten pages of four can be shared
    _ask(_engine(_model(0), slots=8), *((prompt, Sampling(1, seed=i)) for i in range(8)))
    assert reads == [44, 7 * 4]


def test_prompts_that_differ_only_in_a_picture_share_what_stands_before_it(reads: list[int]) -> None:
    model = _model(0)
    opening = _prompt(0, 19)
    prompts = [TokenSequence([*opening.ids, PAD, PAD, 65], [_item(i)]) for i in range(2)]
    for prompt, completion in zip(prompts, _ask(_engine(model), *((p, Sampling(1)) for p in prompts)), strict=True):
        _check(model, prompt, completion)
    assert sum(reads) == 23 + 3


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_picture_is_encoded_once_wherever_chunks_and_pages_cut_it(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Grid] = []
    plain = KimiK25.encode_media

    def recorded(self: KimiK25, patches: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        encoded.extend(grids)
        return plain(self, patches, grids)

    model = _model(0)
    prompt = _prompt(0, 3, _item(1, (1, 4, 10)), _item(2, (4, 6, 4)))
    monkeypatch.setattr(KimiK25, "encode_media", recorded)
    engine = _engine(model, chunk=chunk)
    first = _ask(engine, *((prompt, Sampling(3, seed=i)) for i in range(3)))
    assert sorted(encoded) == [(1, 4, 10), (4, 6, 4)]
    monkeypatch.undo()
    for completion in first:
        _check(model, prompt, completion)


def test_a_long_prompt_does_not_hold_up_who_is_writing(reads: list[int]) -> None:
    engine = _engine(_model(0), max_len=400, chunk=8)

    async def run() -> tuple[int, int]:
        async with engine.run():
            writer = engine.stream(_prompt(0, 3), Sampling(60), "a")
            await anext(writer)
            reads.clear()
            reader = asyncio.create_task(engine.generate(_prompt(1, 299), Sampling(1), "a"))
            written = 0
            while not reader.done():
                await anext(writer)
                written += 1
            await writer.aclose()
            return written, len(reads)

    written, steps = asyncio.run(run())
    # 300 tokens by 8: 38 steps, in each of which the writer got its token.
    assert 38 <= written <= steps <= 40
    assert max(reads) == 8 + 1


def _at_rest(engine: LocalEngine) -> bool:
    """Nobody holds a page or a row: all pages ever made are free or cached prefixes."""
    lane = engine._lanes["a"]
    pool = lane.pool
    assert pool.available == pool.capacity
    lane.forget()
    return sorted(pool._free) == list(range(pool.made)) and sorted(lane.rows) == list(range(len(lane.tables)))


def test_pages_come_back_and_memory_grows_with_use() -> None:
    engine = _engine(_model(0), slots=64, max_len=4000)
    lane = engine._lanes["a"]
    _ask(engine, (_prompt(0, 10), Sampling(5)))
    # 11 + 5 tokens, of which the last was never read, in pages of four; storage doubles.
    assert lane.pool.made == 4 <= len(lane.cache[0]) <= 8

    async def leave() -> None:
        async with engine.run():
            streams = [engine.stream(_prompt(i, 50), Sampling(3000), "a") for i in range(4)]
            for stream in streams:
                await anext(stream)
            for stream in streams[:2]:
                await stream.aclose()
            finished = await engine.generate(_prompt(9, 50), Sampling(3), "a")
            assert len(finished.ids) == 3
            await asyncio.gather(*(stream.aclose() for stream in streams[2:]))

    asyncio.run(leave())
    assert _at_rest(engine)
    assert len(lane.cache[0]) < 200


def test_numbers_by_hand() -> None:
    """Two places for three prompts of 9 tokens, which take three pages of 4 each."""
    engine = _engine(_model(0), slots=2)
    seen: list[dict[str, float]] = []

    async def ask(seed: int) -> None:
        async for _ in engine.stream(_prompt(seed, 8), Sampling(8, seed=seed), "a"):
            seen.append(engine.numbers())

    async def run() -> None:
        async with engine.run(), asyncio.TaskGroup() as group:
            for seed in range(3):
                group.create_task(ask(seed))

    asyncio.run(run())
    assert seen[0] == {"running": 2, "waiting": 1, "pages_used": 6, "pages": 48}
    # Where two ended, the third is alone; what the others had read is a cached prefix, which nobody holds.
    assert seen[-2] == {"running": 1, "waiting": 0, "pages_used": 4, "pages": 48}
    assert engine.numbers() == {"running": 0, "waiting": 0, "pages_used": 0, "pages": 48}


def test_who_finds_no_memory_waits_and_all_end(reads: list[int]) -> None:
    """Twelve sequences of up to 90 tokens in memory for 96."""
    model = _model(0)
    engine = _engine(model, slots=12, cache_tokens=96)
    requests = [(_prompt(i, 5 + 3 * i), Sampling(89 - 5 - 3 * i, seed=i)) for i in range(12)]
    done = _ask(engine, *requests)
    assert sum(reads) > sum(len(p.ids) + len(c.ids) - 1 for (p, _), c in zip(requests, done, strict=True))  # some again
    for (prompt, sampling), completion in zip(requests, done, strict=True):
        assert completion.finish_reason == "stop" or len(completion.ids) == sampling.max_tokens
        _check(model, prompt, completion)
    assert _at_rest(engine)


def test_who_waits_for_a_page_that_is_never_filled_fills_it() -> None:
    model = _model(0)
    engine = _engine(model, max_len=400, chunk=8)
    prompt = _prompt(0, 300)

    async def run() -> Completion:
        async with engine.run():
            first = asyncio.create_task(engine.generate(prompt, Sampling(4), "a"))
            second = asyncio.create_task(engine.generate(prompt, Sampling(4), "a"))
            for _ in range(60):
                await asyncio.sleep(0)
            first.cancel()
            return await asyncio.wait_for(second, 60)

    _check(model, prompt, asyncio.run(run()))


def test_agents_that_have_begun_go_first_yet_overtake_nobody_for_ever() -> None:
    engine = _engine(_model(0), slots=1, max_len=64)
    begun = _prompt(0, 11)  # 12 tokens; eight of them are found again, which lets it overtake the last seven
    order: list[str] = []

    async def ask(name: str, prompt: TokenSequence) -> None:
        await engine.generate(prompt, Sampling(1), "a")
        order.append(name)

    async def run() -> None:
        async with engine.run():
            await ask("", begun)
            await asyncio.gather(
                *(ask(f"new {i}", _prompt(10 + i, 11)) for i in range(10)),
                *(ask(f"begun {i}", begun) for i in range(2)),
            )

    asyncio.run(run())
    assert order[1:7] == ["new 0", "new 1", "new 2", "begun 0", "new 3", "begun 1"]


def test_media_must_fit_their_placeholders() -> None:
    engine = _engine(_model(0))

    async def run() -> Completion:
        async with engine.run():
            with pytest.raises(ValueError, match="3 media placeholders for 2 media tokens"):
                await engine.generate(TokenSequence([65, PAD, PAD, PAD], [_item(1)]), Sampling(4), "a")
            return await engine.generate(_prompt(0, 3), Sampling(4), "a")

    assert len(asyncio.run(run()).ids) == 4


def test_cancelled_requests_free_their_slots() -> None:
    model = _model(0)
    engine = _engine(model, slots=2, max_len=4000)

    async def run() -> Completion:
        async with engine.run():
            jobs = [engine.generate(_prompt(i, 4), Sampling(3000, seed=i), "a") for i in range(5)]
            endless = [asyncio.create_task(job) for job in jobs]
            for _ in range(40):
                await asyncio.sleep(0)
            for task in endless:
                task.cancel()
            # Both slots are needed again; a leaked one would leave the second waiting for ever.
            done = await asyncio.wait_for(
                asyncio.gather(*(engine.generate(_prompt(9, 6), Sampling(5), "a") for _ in range(2))), 60
            )
            assert all(task.cancelled() for task in await _settled(endless))
            return done[1]

    _check(model, _prompt(9, 6), asyncio.run(run()))


def test_a_stream_is_the_completion_and_ends_when_it_is_closed() -> None:
    model = _model(4, stops=1.6)
    engine = _engine(model, slots=1, max_len=4000)
    request = (_prompt(0, 8), Sampling(40))

    async def run() -> list[tuple[int, float]]:
        async with engine.run():
            endless = engine.stream(_prompt(1, 8), Sampling(3000, seed=1), "a")
            async with contextlib.aclosing(endless):
                assert (await anext(endless)).token != STOP
            # The one slot is needed again.
            return [(s.token, s.logprob) async for s in engine.stream(*request, "a")]

    whole = _ask(_engine(model), request)[0]
    assert whole.finish_reason == "stop"
    assert asyncio.run(run()) == list(zip(whole.ids, whole.logprobs, strict=True))


def test_who_waits_outside_is_told_when_the_engine_stops() -> None:
    engine = _engine(_model(0), max_len=4000)

    async def run() -> None:
        async with engine.run():
            task = asyncio.create_task(engine.generate(_prompt(0, 4), Sampling(3000), "a"))
            stream = engine.stream(_prompt(1, 4), Sampling(3000), "a")
            await anext(stream)
        with pytest.raises(RuntimeError, match="stopped"):
            await task
        with pytest.raises(RuntimeError, match="stopped"):
            async for _ in stream:
                pass

    asyncio.run(run())


async def _settled(tasks: list[asyncio.Task[Completion]]) -> list[asyncio.Task[Completion]]:
    await asyncio.wait(tasks)
    return tasks


def test_an_engine_left_in_the_middle_of_requests_can_be_updated_and_run_again() -> None:
    """Every run has an event loop of its own; what an aborted run left unanswered is dropped."""
    model = _model(0)
    engine = _engine(model, slots=2, max_len=4000)

    async def abort() -> None:
        async with engine.run():
            task = asyncio.create_task(engine.generate(_prompt(0, 4), Sampling(3000), "a"))
            for _ in range(40):
                await asyncio.sleep(0)
            task.cancel()

    asyncio.run(abort())
    engine.update("a", model)
    prompt = _prompt(9, 6)
    for completion in _ask(engine, *((prompt, Sampling(5, seed=i)) for i in range(3))):
        _check(model, prompt, completion)


def test_placeholders_are_never_written() -> None:
    """A sampled media placeholder would stand for a picture that does not exist."""
    model = _model(0)
    model.language_model.lm_head.weight[PAD] = model.language_model.lm_head.weight[STOP] * 0
    hidden = model(Batch(torch.tensor([65, 66]), Segments([2]), torch.empty(0, 3, 8, 8), []))[-1]
    model.language_model.lm_head.weight[PAD] = hidden * 10
    prompt = TokenSequence([65, 66])
    assert int(model.logits(hidden).argmax()) == PAD
    for sampling in (Sampling(1, temperature=0.0), Sampling(1, seed=1)):
        completion = _ask(_engine(model), (prompt, sampling))[0]
        assert PAD not in completion.ids
        _check(model, prompt, completion)
