import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baltoro.chat.declare import declare_tools
from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import (
    Clip,
    Image,
    Message,
    TokenSequence,
    ToolCall,
    ToolSpec,
    assistant,
    system,
    tool_result,
    user,
)
from baltoro.chat.render import render, render_tool_results
from baltoro.chat.tokenizer import Tokenizer

K25 = MediaSpec.K25
CONTROL = Tokenizer({bytes([b]): b for b in range(256)}).special
# Any Unicode text, salted with text that spells control tokens.
hostile_text = st.lists(st.one_of(st.text(max_size=9), st.sampled_from(list(CONTROL))), max_size=4).map("".join)
calls = st.lists(hostile_text, max_size=3).map(
    lambda arguments: tuple(ToolCall(f"functions.f:{i}", "f", text) for i, text in enumerate(arguments))
)
assistants = st.builds(lambda t, r, c: assistant(t, reasoning=r, tool_calls=c), hostile_text, hostile_text, calls)
pictures = st.integers(1, 60).map(lambda side: Image(np.full((side, 20, 3), side, np.uint8)))
parts = st.lists(st.one_of(hostile_text, pictures), max_size=3).map(tuple)
answers = st.builds(lambda p: tool_result("functions.f:0", *p), parts)
others = st.one_of(
    st.builds(lambda p: user(*p), parts),
    st.builds(lambda t: system(t), hostile_text),
    st.builds(lambda p, n: Message("user", p, name=n), parts, hostile_text),
    answers,
)
dialogues = st.lists(st.one_of(others, assistants), max_size=5)


def ids_of(tokenizer: Tokenizer, template: str, *texts: str) -> list[int]:
    """The ids of a dialogue written as in model.md section 11. Control tokens in `template` are control tokens;
    each `{}` stands for a text, which is nothing but text."""
    ids: list[int] = []
    remaining = iter(texts)
    for piece in re.split(f"({'|'.join(map(re.escape, CONTROL))})", template):
        if piece in CONTROL:
            ids.append(tokenizer.special[piece])
        else:
            ids += tokenizer.encode(re.sub(r"\{\}", lambda _: next(remaining), piece))
    return ids


def targets(tokenizer: Tokenizer, sequence: TokenSequence) -> str:
    """What the loss sees, with `_` for each id that is no target."""
    marks = [tokenizer.decode([i]) if m else "_" for i, m in zip(sequence.ids, sequence.loss_mask, strict=True)]
    return re.sub("_+", "_", "".join(marks))


def test_a_dialogue_with_tools(tokenizer: Tokenizer) -> None:
    search = ToolSpec("search", "Search.", {"type": "object", "properties": {"q": {"type": "string"}}})
    messages = [
        system("Be brief."),
        Message("user", ("Height of K2", "?"), name="ann"),
        assistant(
            "I look.",
            reasoning="search it",
            tool_calls=(
                ToolCall("functions.search:0", "search", '{"q":"K2"}'),
                ToolCall("functions.search:1", "search", "{}"),
            ),
        ),
        tool_result("functions.search:0", "8611 m"),
        tool_result("functions.search:1"),
        assistant("8611 m.", reasoning="found"),
    ]
    sequence = render(messages, tokenizer, K25, tools=[search])
    assert sequence.ids == ids_of(
        tokenizer,
        "<|im_system|>tool_declare<|im_middle|>{}<|im_end|>"
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        "<|im_user|>ann<|im_middle|>Height of K2?<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>search it</think>I look."
        "<|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{"q":"K2"}<|tool_call_end|>'
        "<|tool_call_begin|>functions.search:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.search:0\n8611 m<|im_end|>"
        "<|im_system|>tool<|im_middle|>## Return of functions.search:1\n<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think>found</think>8611 m.<|im_end|>",
        declare_tools([search]),
        "{}",
    )
    assert targets(tokenizer, sequence) == (
        "_search it</think>I look.<|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{"q":"K2"}<|tool_call_end|>'
        "<|tool_call_begin|>functions.search:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "_found</think>8611 m.<|im_end|>"
    )


@pytest.mark.parametrize(("thinking", "prompt"), [(True, "<think>"), (False, "<think></think>")])
def test_generation_prompts(tokenizer: Tokenizer, thinking: bool, prompt: str) -> None:
    sequence = render([user("hi")], tokenizer, K25, add_generation_prompt=True, thinking=thinking)
    head = "<|im_user|>user<|im_middle|>hi<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert sequence.ids == ids_of(tokenizer, head + prompt)
    assert sequence.loss_mask == [0] * len(sequence.ids)


def test_in_instant_mode_the_closing_of_the_reasoning_is_no_target(tokenizer: Tokenizer) -> None:
    assert targets(tokenizer, render([assistant("yes")], tokenizer, K25)) == "_</think>yes<|im_end|>"
    assert targets(tokenizer, render([assistant("yes")], tokenizer, K25, thinking=False)) == "_yes<|im_end|>"


def test_history_loses_the_reasoning_up_to_the_last_answer_without_calls(tokenizer: Tokenizer) -> None:
    call = (ToolCall("functions.f:0", "f", "{}"),)
    messages = [
        assistant("a", reasoning="r1", tool_calls=call),
        assistant("b", reasoning="r2"),
        user("go on"),
        assistant("c"),
        assistant("d", reasoning="r4"),
        user("now"),
        assistant("e", reasoning="r5", tool_calls=call),
        tool_result("functions.f:0", "ok"),
        assistant("f", reasoning="r6", tool_calls=call),
    ]

    def reasonings(keep_reasoning: bool, thinking: bool = True) -> list[str]:
        sequence = render(messages, tokenizer, K25, keep_reasoning=keep_reasoning, thinking=thinking)
        text = tokenizer.decode(sequence.ids)
        return re.findall("<think>(.*?)</think>", text)

    assert reasonings(keep_reasoning=True) == ["r1", "r2", "", "r4", "r5", "r6"]
    assert reasonings(keep_reasoning=False) == ["", "", "", "", "r5", "r6"]
    assert reasonings(keep_reasoning=False, thinking=False) == [""] * 6
    # A turn without the reasoning it was written with is nothing to learn from.
    trained = targets(tokenizer, render(messages[:5], tokenizer, K25, keep_reasoning=False))
    assert trained == "_</think>c<|im_end|>_"


def test_an_image_stands_as_one_pad_per_media_token(tokenizer: Tokenizer) -> None:
    image = Image(np.zeros((48, 32, 3), np.uint8))  # 56 x 56 padded: 4 tokens
    sequence = render([user("Look: ", image, "what?", image)], tokenizer, K25)
    pads = "<|media_pad|>" * 4
    media = f"<|media_begin|>image<|media_content|>{pads}<|media_end|>\n"
    assert sequence.ids == ids_of(tokenizer, f"<|im_user|>user<|im_middle|>Look: {media}what?{media}<|im_end|>")
    assert [item.grid_thw for item in sequence.media] == [(1, 4, 4), (1, 4, 4)]


def test_a_clip_stands_as_timestamped_chunks(tokenizer: Tokenizer) -> None:
    clip = Clip(np.zeros((6, 28, 56, 3), np.uint8), 2.0)
    sequence = render([user(clip, "what?")], tokenizer, K25)
    media = "<|media_begin|>video<|media_content|><|media_pad|><|media_pad|><|media_end|>"
    expected = f"<|im_user|>user<|im_middle|>00:00:00.000{media}00:00:02.000{media}what?<|im_end|>"
    assert sequence.ids == ids_of(tokenizer, expected)
    assert [item.grid_thw for item in sequence.media] == [(4, 2, 4), (2, 2, 4)]


@given(text=hostile_text)
def test_nothing_that_anyone_says_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    tool = ToolSpec(text, text, {"type": "object", "properties": {text: {"type": "string", "description": text}}})
    messages = [
        Message("system", (text, text), name=text),
        Message("user", (text,), name=text),
        Message("assistant", (text,), text, (ToolCall(text, text, text),), name=text),
        Message("tool", (text,), tool_call_id=text, name=text),
    ]
    ids = render(messages, tokenizer, K25, tools=[tool]).ids
    assert [i for i in ids if i >= tokenizer.base_size] == ids_of(
        tokenizer,
        "<|im_system|><|im_middle|><|im_end|>"
        "<|im_system|><|im_middle|><|im_end|>"
        "<|im_user|><|im_middle|><|im_end|>"
        "<|im_assistant|><|im_middle|><think></think>"
        "<|tool_calls_section_begin|><|tool_call_begin|><|tool_call_argument_begin|><|tool_call_end|>"
        "<|tool_calls_section_end|><|im_end|>"
        "<|im_system|><|im_middle|><|im_end|>",
    )


@given(history=dialogues, turn=assistants, results=st.lists(answers, max_size=3), thinking=st.booleans())
def test_each_turn_extends_the_one_before(
    tokenizer: Tokenizer, history: list[Message], turn: Message, results: list[Message], thinking: bool
) -> None:
    """Appendix D: prompt + completion + tool results is the next prompt, token for token and picture for picture."""
    if not thinking:
        turn = assistant(turn.text, tool_calls=turn.tool_calls)
    template = ("{}</think>" if thinking else "") + "{}"
    if turn.tool_calls:
        one = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
        template += f"<|tool_calls_section_begin|>{one * len(turn.tool_calls)}<|tool_calls_section_end|>"
    texts = [turn.reasoning] if thinking else []
    texts += [turn.text, *(text for call in turn.tool_calls for text in (call.id, call.arguments))]
    completion = ids_of(tokenizer, template + "<|im_end|>", *texts)

    prompt = render(history, tokenizer, K25, add_generation_prompt=True, thinking=thinking)
    after = render_tool_results(results, tokenizer, K25, thinking)
    whole = render([*history, turn, *results], tokenizer, K25, add_generation_prompt=True, thinking=thinking)
    assert whole.ids == prompt.ids + completion + after.ids
    assert whole.loss_mask == prompt.loss_mask + [1] * len(completion) + after.loss_mask
    assert [m.grid_thw for m in whole.media] == [m.grid_thw for m in prompt.media + after.media]


@pytest.mark.skipif("BALTORO_TIKTOKEN" not in os.environ, reason="BALTORO_TIKTOKEN names no released tiktoken.model")
def test_the_golden_prompts_of_the_release() -> None:
    tokenizer = Tokenizer.load(Path(os.environ["BALTORO_TIKTOKEN"]))
    first, second = Image(np.zeros((48, 32, 3), np.uint8)), Image(np.zeros((33, 57, 3), np.uint8))

    def rendered(*content: str | Image) -> list[int]:
        return render([user(*content)], tokenizer, K25, add_generation_prompt=True, thinking=False).ids

    def digest(ids: list[int]) -> str:
        return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()

    one = rendered(first, "请用中文简短描述这张图片。")
    assert len(one) == 26
    assert digest(one) == "67f80d6086475aede2f1f5426cd1f0d4805cf287c954660557dcfef3449f39d8"
    two = rendered(first, second, "请用中文简短比较这两张图片。")
    assert len(two) == 38
    assert digest(two) == "96d31021efe340d28cd61d7894b74ef8d379fcff9d47b6223cfbe9a1e3c6b0f9"
