"""The engine without a model."""

from baltoro.agent.engine import Sampling
from baltoro.agent.scripted import ScriptedEngine, completion_text
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
