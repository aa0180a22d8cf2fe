"""What befalls calls: as often as asked, the same in any order, completions always aligned. Time is simulated."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import pytest

from baltoro.agent.chaos import Chaos, ChaosEngine
from baltoro.agent.engine import Completion, Overloaded, Sampled, Sampling
from baltoro.agent.scripted import ScriptedEngine, completion_text
from baltoro.agent.virtual import run_virtual
from baltoro.chat.messages import TokenSequence
from baltoro.chat.parse import parse_completion
from baltoro.chat.tokenizer import Tokenizer

TEXT = completion_text("ok", reasoning="hm", calls=[("search", {"query": "the capital"}), ("open", {"page": 3})])


def chaotic(tokenizer: Tokenizer, chaos: Chaos, seed: int = 1) -> ChaosEngine:
    return ChaosEngine(ScriptedEngine(tokenizer, lambda prompt, role: TEXT), tokenizer, chaos, seed=seed)


async def ask(engine: ChaosEngine, seed: int) -> Completion | str:
    """The completion, or the name of what went wrong."""
    try:
        async with asyncio.timeout(100):
            return await engine.generate(TokenSequence(), Sampling(400, seed=seed), "agent")
    except (ConnectionError, TimeoutError, Overloaded) as error:
        return type(error).__name__


def run(engine: ChaosEngine, seeds: range | list[int]) -> list[Completion | str]:
    async def main() -> list[Completion | str]:
        return await asyncio.gather(*(ask(engine, seed) for seed in seeds))

    return run_virtual(main())


def test_fates_depend_on_the_call_and_not_on_the_order(tokenizer: Tokenizer) -> None:
    chaos = Chaos(delay_s=2, drops=0.3, hangs=0.2, malformed=0.2)
    forward = run(chaotic(tokenizer, chaos), range(500))
    backward = run(chaotic(tokenizer, chaos), list(reversed(range(500))))
    assert forward == backward[::-1]
    assert forward != run(chaotic(tokenizer, chaos, seed=2), range(500))
    whole = run(chaotic(tokenizer, Chaos()), range(1))[0]
    kinds = Counter(each if isinstance(each, str) else each == whole for each in forward)
    # 500 draws at 0.3: mean 150, standard deviation 10; at 0.2: 100 and 9.
    assert 115 < kinds["ConnectionError"] < 185
    assert 68 < kinds["TimeoutError"] < 132
    assert 68 < kinds[False] < 132


def test_a_call_that_is_repeated_may_do_better(tokenizer: Tokenizer) -> None:
    engine = chaotic(tokenizer, Chaos(drops=0.5))
    failing = set(range(400))
    for _ in range(4):
        seeds = sorted(failing)
        failing = {seed for seed, each in zip(seeds, run(engine, seeds), strict=True) if isinstance(each, str)}
    # 400 / 2^4: mean 25, standard deviation 5.
    assert 5 < len(failing) < 45


def test_damage_keeps_completions_aligned_and_spoils_most_calls(tokenizer: Tokenizer) -> None:
    spoilt = 0
    for each in run(chaotic(tokenizer, Chaos(malformed=1.0)), range(200)):
        assert isinstance(each, Completion)
        assert 0 < len(each.ids) == len(each.logprobs)
        assert all(0 <= token < tokenizer.vocab_size for token in each.ids)
        spoilt += bool(parse_completion(each.ids, tokenizer).errors)
    assert spoilt > 150


def test_in_a_storm_everybody_is_refused_until_it_is_over(tokenizer: Tokenizer) -> None:
    """Storms from 8 to 10, from 18 to 20 and so on; who comes at 8.5 is asked to stay away for 1.5 seconds."""
    engine = chaotic(tokenizer, Chaos(storm_every_s=10, storm_s=2))

    async def main() -> list[float]:
        waits: list[float] = []
        for _ in range(40):
            try:
                await engine.generate(TokenSequence(), Sampling(400), "agent")
                waits.append(0.0)
            except Overloaded as error:
                waits.append(error.retry_after_s)
            await asyncio.sleep(0.5)
        return waits

    assert run_virtual(main()) == ([0.0] * 16 + [2.0, 1.5, 1.0, 0.5]) * 2


async def test_a_stream_drops_after_some_of_its_tokens(tokenizer: Tokenizer) -> None:
    engine = chaotic(tokenizer, Chaos(drops=1.0))
    whole = (await ScriptedEngine(tokenizer, [TEXT]).generate(TokenSequence(), Sampling(400), "agent")).ids

    async def tokens(stream: AsyncGenerator[Sampled]) -> list[int]:
        got: list[int] = []
        with pytest.raises(ConnectionError):
            async for sampled in stream:
                got.append(sampled.token)
        return got

    lengths: set[int] = set()
    for seed in range(8):
        got = await tokens(engine.stream(TokenSequence(), Sampling(400, seed=seed), "agent"))
        assert got == whole[: len(got)]
        lengths.add(len(got))
    assert len(lengths) > 3
