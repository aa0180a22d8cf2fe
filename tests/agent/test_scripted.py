"""The engines without a model."""

import asyncio

from baltoro.agent.engine import Sampling
from baltoro.agent.scripted import ChaosEngine, ScriptedEngine, completion_text
from baltoro.chat.messages import TokenSequence, ToolCall
from baltoro.chat.parse import parse_completion
from baltoro.chat.tokenizer import Tokenizer


async def test_a_written_completion_parses_to_what_was_meant(tokenizer: Tokenizer) -> None:
    text = completion_text("ok", reasoning="hm", calls=[("a", {"x": "é"}), ("b", {"y": [1, 2]})], first_index=3)
    completion = await ScriptedEngine(tokenizer, [text]).generate(TokenSequence(), Sampling(400), "agent")
    message = parse_completion(completion.ids, tokenizer).message
    assert (message.reasoning, message.text) == ("hm", "ok")
    assert message.tool_calls == (
        ToolCall("functions.a:3", "a", '{"x": "é"}'),
        ToolCall("functions.b:4", "b", '{"y": [1, 2]}'),
    )
    assert completion.finish_reason == "stop"


async def test_chaos_depends_on_the_call_and_not_on_the_order(tokenizer: Tokenizer) -> None:
    inner = ScriptedEngine(tokenizer, lambda prompt, role: completion_text("x"))

    async def failed(engine: ChaosEngine, seed: int) -> bool:
        try:
            await engine.generate(TokenSequence(), Sampling(9, seed=seed), "agent")
        except ConnectionError:
            return True
        return False

    engine = ChaosEngine(inner, seed=1, max_delay_s=0.002, failure_rate=0.3)
    forward = await asyncio.gather(*(failed(engine, seed) for seed in range(200)))
    backward = await asyncio.gather(*(failed(engine, seed) for seed in reversed(range(200))))
    assert forward == backward[::-1]
    # 200 draws at 0.3: mean 60, standard deviation 6.5.
    assert 40 < sum(forward) < 80
    assert forward != await asyncio.gather(
        *(failed(ChaosEngine(inner, seed=2, failure_rate=0.3), s) for s in range(200))
    )
