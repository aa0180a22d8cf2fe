"""Whether recorded episodes are fit to train on (appendix D). Every check recomputes what it judges."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from baltoro.agent.trace import Trace
from baltoro.chat.media import MediaSpec, preprocess_clip, preprocess_image
from baltoro.chat.messages import Clip, Image, MediaItem, Video
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.record import Record, Recording, agents

Rejudge = Callable[[Record], dict[str, float]]
"""The signals of an episode, judged again from its task and trace; only those that can be."""


@dataclass(frozen=True)
class Finding:
    """kind: which rule is broken. where: episode (group and seed), agent, turn or token."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


@dataclass
class Evidence:
    """What the agents of one role left, summed over episodes. A turn that lacks something cannot be trained on as Eq. 1
    has it."""

    agents: int = 0
    trainable: int = 0
    turns: int = 0
    without_ids: int = 0
    without_logprobs: int = 0
    without_version: int = 0
    broken: int = 0


def verify(recording: Recording, rejudge: Rejudge | None = None) -> list[Finding]:
    """Everything wrong, in the order of the file; nothing is what a trainer wants to see."""
    trained = {draw for record in recording.records for _, trace in agents(record.trace) for draw in _trained(trace)}
    seen: dict[bytes, str] = {}
    findings: list[Finding] = []
    for record in recording.records:
        episode = f"{record.group} seed {record.seed}"
        for place, trace in agents(record.trace):
            where = f"{episode}, agent {place} ({trace.role})"
            for check in (_aligned, _extends, _logprobs):
                findings += (Finding(check.__name__[1:], where, what) for what in check(trace))
            findings += (Finding("masked", where, what) for what in _masked(trace, trained))
            findings += (Finding("media", where, what) for what in _media(trace, recording))
            findings += (Finding("leak", where, what) for what in _leaks(trace, recording.tokenizer))
            if trace.trainable:
                findings += (Finding("evidence", where, what) for what in _lacks(trace))
                findings += (Finding("duplicate", where, what) for what in _duplicates(trace, where, seen))
        findings += (Finding("reward", episode, what) for what in _reward(record, rejudge))
    return findings


def evidence(records: Iterable[Record]) -> dict[str, Evidence]:
    """By role."""
    table: dict[str, Evidence] = {}
    for record in records:
        for _, trace in agents(record.trace):
            row = table.setdefault(trace.role, Evidence())
            row.agents += 1
            row.trainable += trace.trainable
            row.broken += bool(trace.broke)
            row.turns += len(trace.turns)
            row.without_ids += sum(not turn.ids for turn in trace.turns)
            row.without_logprobs += sum(len(turn.logprobs) != len(turn.ids) or not turn.ids for turn in trace.turns)
            row.without_version += sum(turn.weight_version < 0 for turn in trace.turns)
    return table


def _spans(trace: Trace) -> Iterator[tuple[int, slice]]:
    """The sampled tokens of each turn that has any."""
    for number, turn in enumerate(trace.turns):
        if turn.ids:
            yield number, slice(turn.prompt_len, turn.prompt_len + len(turn.ids))


def _aligned(trace: Trace) -> Iterator[str]:
    lengths = {len(trace.tokens), len(trace.loss_mask), len(trace.logprobs)}
    if len(lengths) > 1:
        yield f"{len(trace.tokens)} tokens, {len(trace.loss_mask)} masks, {len(trace.logprobs)} log-probabilities"


def _extends(trace: Trace) -> Iterator[str]:
    """Each turn read exactly the tokens before it: what was there before, what it wrote, what came in between."""
    end = 0
    for number, span in _spans(trace):
        turn = trace.turns[number]
        if span.start < end:
            yield f"turn {number} read {span.start} tokens, but {end} stood there"
        if trace.tokens[span] != turn.ids:
            at = next((i for i, (a, b) in enumerate(zip(trace.tokens[span], turn.ids, strict=False)) if a != b), None)
            yield f"turn {number}: the tokens are not those that were sampled, from token {span.start + (at or 0)} on"
        end = span.stop


def _masked(trace: Trace, trained: Set[bytes]) -> Iterator[str]:
    """1 exactly on what the model wrote; 0 on a whole turn that is trained on elsewhere, where a prefix broke."""
    wanted = [0] * len(trace.tokens)
    for number, span in _spans(trace):
        if any(trace.loss_mask[span]) or _draw(trace, number, span) not in trained:
            wanted[span] = [1] * len(wanted[span])
    pairs = enumerate(zip(trace.loss_mask, wanted, strict=False))
    wrong = [(index, mask) for index, (mask, want) in pairs if mask != want]
    for (_, mask), run in groupby(enumerate(wrong), lambda each: (each[1][0] - each[0], each[1][1])):
        places = [index for _, (index, _) in run]
        fault = "not sampled, yet trained on" if mask else "sampled, but not trained on"
        yield f"tokens {places[0]} to {places[-1]} are {fault}"


def _logprobs(trace: Trace) -> Iterator[str]:
    where = [False] * len(trace.logprobs)
    for number, span in _spans(trace):
        where[span] = [True] * len(where[span])
        drawn = trace.turns[number].logprobs
        if not any(trace.loss_mask[span]):
            where[span] = [value != 0 for value in trace.logprobs[span]]
        elif drawn and trace.logprobs[span] != drawn:
            yield f"turn {number}: not the log-probabilities that the engine gave"
    for index, (value, sampled) in enumerate(zip(trace.logprobs, where, strict=True)):
        if sampled and not (math.isfinite(value) and value <= 0):
            yield f"token {index} was sampled with log-probability {value}"
        elif not sampled and value != 0:
            yield f"token {index} was not sampled, yet has log-probability {value}"


def _media(trace: Trace, recording: Recording) -> Iterator[str]:
    """One run of placeholders per item, as long as its grid says; the patches are those of the messages' pixels."""
    pad, spec = recording.tokenizer.media_pad, recording.media_spec
    runs = [len(list(run)) for token, run in groupby(trace.tokens) if token == pad]
    if len(runs) != len(trace.media):
        yield f"{len(runs)} runs of placeholders for {len(trace.media)} media"
    for number, (length, item) in enumerate(zip(runs, trace.media, strict=False)):
        t, h, w = item.grid_thw
        if length != spec.tokens(item.grid_thw):
            yield f"item {number} has {length} placeholders; its grid {t}x{h}x{w} asks for {spec.tokens(item.grid_thw)}"
        if len(item.patches) != t * h * w:
            yield f"item {number} has {len(item.patches)} patches; its grid {t}x{h}x{w} asks for {t * h * w}"
    shown = [part for message in trace.messages for part in message.content if not isinstance(part, str)]
    if any(isinstance(part, Video) for part in shown):
        return  # decoded where it was rendered; its frames are not kept
    items = [item for part in shown for item in _items(part, spec)]
    if len(items) != len(trace.media):
        yield f"the messages show {len(items)} media, the agent read {len(trace.media)}"
    for number, (mine, read) in enumerate(zip(items, trace.media, strict=False)):
        if mine.grid_thw != read.grid_thw or not np.array_equal(mine.patches, read.patches):
            yield f"item {number} is not the picture that the messages show"


def _items(part: Image | Clip | Video, spec: MediaSpec) -> list[MediaItem]:
    assert not isinstance(part, Video)
    if isinstance(part, Image):
        return [preprocess_image(part, spec)]
    return [item for _, item in preprocess_clip(part, spec)]


def _leaks(trace: Trace, tokenizer: Tokenizer) -> Iterator[str]:
    """Outside of what the model wrote, control tokens stand only where the chat format puts them, and there are as many
    turns as messages: text that became a control token would show as one or the other."""
    t = tokenizer
    headers = {t.im_user, t.im_system, t.im_assistant}
    media = {t.media_begin, t.media_content, t.media_pad, t.media_end}
    speaks = {t.think, t.end_think, t.tool_calls_section_begin, t.tool_calls_section_end, t.tool_call_begin}
    speaks |= {t.tool_call_argument_begin, t.tool_call_end} | media
    sampled = [False] * len(trace.tokens)
    for _, span in _spans(trace):
        sampled[span] = [True] * len(sampled[span])
    header, name, in_name, turns = 0, 0, False, 0
    for index, token in enumerate(trace.tokens):
        if sampled[index]:
            header = 0 if token == t.im_end else header
        elif token < t.base_size:
            continue
        elif token in headers and not header:
            header, name, in_name = token, index + 1, True
        elif token == t.im_middle and in_name:
            in_name = False
            turns += header != t.im_assistant and t.decode(trace.tokens[name:index]) != "tool_declare"
        elif token == t.im_end and header and not in_name:
            header = 0
        elif in_name or token not in (speaks if header == t.im_assistant else media if header else ()):
            yield f"token {index} is {t.decode([token])} within text"
    said = sum(message.role != "assistant" for message in trace.messages)
    if turns != said and trace.tokens:
        yield f"the tokens hold {turns} turns of users, tools and system; the messages are {said}"


def _lacks(trace: Trace) -> Iterator[str]:
    for number, turn in enumerate(trace.turns):
        if not turn.ids:
            yield f"turn {number} is trainable, but its token ids were not recorded"
        elif len(turn.logprobs) != len(turn.ids):
            yield f"turn {number} is trainable, but has {len(turn.logprobs)} log-probabilities for {len(turn.ids)} ids"
        if turn.weight_version < 0:
            yield f"turn {number} is trainable, but nobody knows the version of its weights"


def _duplicates(trace: Trace, where: str, seen: dict[bytes, str]) -> Iterator[str]:
    for number, span in _spans(trace):
        if not any(trace.loss_mask[span]):
            continue
        draw = _draw(trace, number, span)
        if draw in seen:
            yield f"turn {number} is trained on twice; it is also {seen[draw]}"
        seen.setdefault(draw, f"{where}, turn {number}")


def _trained(trace: Trace) -> Iterator[bytes]:
    for number, span in _spans(trace):
        if any(trace.loss_mask[span]):
            yield _draw(trace, number, span)


def _draw(trace: Trace, number: int, span: slice) -> bytes:
    """Names one draw of the model: the same tokens behind the same context, with the same log-probabilities, at the
    same time of its episode. Equal answers that were drawn twice differ in their times."""
    turn = trace.turns[number]
    draw = (trace.tokens[: span.stop], turn.logprobs, turn.started, turn.generated)
    return hashlib.blake2b(repr(draw).encode(), digest_size=16).digest()


def _reward(record: Record, rejudge: Rejudge | None) -> Iterator[str]:
    signals = record.trace.signals
    for name, value in signals.items():
        if not math.isfinite(value):
            yield f"the signal {name} is {value}"
    missing = sorted(record.weights.keys() - signals.keys())
    if missing and record.reward is not None:
        yield f"a reward of {record.reward:g}, although there is no signal {', '.join(missing)}"
    elif not missing and record.weights:
        total = sum(weight * signals[name] for name, weight in record.weights.items())
        if record.reward is None or not math.isclose(record.reward, total, rel_tol=1e-6, abs_tol=1e-9):
            yield f"the reward is {record.reward}, its weighted signals sum to {total:g}"
    for name, value in (rejudge(record) if rejudge else {}).items():
        if not math.isclose(signals.get(name, math.nan), value, rel_tol=1e-6, abs_tol=1e-9):
            yield f"the signal {name} is {signals.get(name)}; judged again it is {value:g}"
