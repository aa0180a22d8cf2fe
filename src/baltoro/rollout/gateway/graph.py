"""The calls of one session as a graph: each call goes on from the end of another, or begins anew; every token is kept
once, as the engine saw and drew it (appendix D).

A dialogue whose beginning is on record, up to the end of some answer, goes on from the exact tokens of that answer: the
model's reasoning included, nothing rendered again. Prompts behind the same answer that begin alike share what they have
in common, so forks and histories whose answers are not on record are kept once too. Dialogues are told apart by chains
of digests, so finding the place of a request takes one look-up for each message.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, repeat
from typing import TypeVar

import numpy as np

from baltoro.rollout.gateway.answer import Drawn
from baltoro.rollout.gateway.said import Said, Setting, chained

P = TypeVar("P", tuple[Said, ...], "array[int]")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What was said to the model behind the end of call `parent` (None: from the beginning), and its tokens. Calls that
    ask the same again share it; `first` is the first of them. It begins with the first `same_said` messages and
    `same_ids` tokens of prompt `base`, which has the same parent; new_said, new_ids: what comes behind them."""

    key: bytes
    parent: int | None
    first: int
    base: "Prompt | None"
    same_said: int
    same_ids: int
    new_said: tuple[Said, ...]
    new_ids: "array[int]"

    @property
    def said(self) -> tuple[Said, ...]:
        return tuple(one for part in self._parts(lambda one: (one.same_said, one.new_said)) for one in part)

    @property
    def ids(self) -> "array[int]":
        ids = array("i")
        for part in self._parts(lambda one: (one.same_ids, one.new_ids)):
            ids += part
        return ids

    @property
    def said_count(self) -> int:
        return self.same_said + len(self.new_said)

    def _parts(self, read: "Callable[[Prompt], tuple[int, P]]") -> list[P]:
        """`read`: how much is shared with the base, and what comes behind it."""
        one, (end, new) = self, read(self)
        parts = [new]
        while one.base is not None:
            one = one.base
            same, new = read(one)
            if same < end:
                parts.append(new[: end - same])
                end = same
        return parts[::-1]


def extending(
    base: Prompt | None, key: bytes, parent: int | None, first: int, said: Sequence[Said], ids: "array[int]"
) -> Prompt:
    """A prompt that shares with `base` what it can."""
    same_said = same_ids = 0
    if base is not None:
        same_said = _common(base.said, said)
        same_ids = _common_ids(base.ids, ids)
    # Where all that is shared was shared before, the chain need not grow.
    while base is not None and same_said <= base.same_said and same_ids <= base.same_ids:
        base = base.base
    return Prompt(key, parent, first, base, same_said, same_ids, tuple(said[same_said:]), ids[same_ids:])


@dataclass(frozen=True, eq=False)
class Call:
    """One answer of the model. ids, logprobs, versions: of each token it drew, the stop token included. answer: as the
    client got it. broke: why it does not go on from the call before it; empty where it does. started, ended: seconds
    since 1970."""

    number: int
    prompt: Prompt
    setting: Setting
    ids: "array[int]"
    logprobs: "array[float]"
    versions: "array[int]"
    answer: Said
    finish: str
    broke: str
    dialect: str
    started: float
    ended: float


@dataclass(frozen=True, eq=False)
class Place:
    """Where a request stands in the graph: it goes on from call `parent`, and messages from `begin` on are new.
    keys: of each beginning of the dialogue; key: of the whole."""

    keys: Sequence[bytes]
    key: bytes
    parent: int | None
    begin: int
    broke: str
    prompt: Prompt | None


class Session:
    def __init__(self, id: str) -> None:
        self.id = id
        self.size = 0  # bytes in memory, roughly
        self.calls: list[Call] = []
        self.call_ids: set[str] = set()
        self._prompts: dict[bytes, Prompt] = {}
        self._ends: dict[bytes, int] = {}
        self._end_keys: list[bytes] = []
        self._continued: dict[int, int] = {}  # by the last call that goes on from it
        # Every beginning of a dialogue on record, and the call that spelled it last.
        self._passed: dict[bytes, int] = {}
        self._settings: set[bytes] = set()

    def place(self, setting: Setting, said: Sequence[Said], known: Sequence[bytes] = ()) -> Place:
        """`known`: the keys of the first beginnings, where they have been computed before."""
        keys = list(known)
        key = keys[-1] if keys else setting.digest
        for one in said[len(keys) :]:
            key = chained(key, one)
            keys.append(key)
        parent, begin = None, 0
        for i in reversed(range(len(said))):
            if said[i].role == "assistant" and keys[i] in self._ends:
                parent, begin = self._ends[keys[i]], i + 1
                break
        fresh = not self.calls or (parent is not None and parent not in self._continued)
        broke = "" if fresh else self._why(setting, said, keys)
        prompt = self._prompts.get(key)
        if prompt is not None:
            parent, begin = prompt.parent, len(said) - prompt.said_count
        return Place(keys, key, parent, begin, broke, prompt)

    def fit(self, place: Place, read: "array[int]") -> "tuple[Place, array[int]]":
        """`read`: the whole prompt as the engine read it. Gives the ids that it adds to its parent; a prompt in which
        the recorded tokens do not stand again is put at the beginning, with the reason."""
        at = 0
        for call in self.chain(place.parent):
            for part in (call.prompt.ids, call.ids):
                if read[at : at + len(part)] != part:
                    broke = f"the history was tokenised anew: behind token {at} it differs from what was recorded"
                    return replace(place, parent=None, begin=0, broke=broke, prompt=None), read
                at += len(part)
        return place, read[at:] if at else read

    def add(
        self,
        place: Place,
        setting: Setting,
        said: Sequence[Said],
        added: "array[int]",
        drawn: Drawn,
        answer: Said,
        finish: str,
        dialect: str,
        started: float,
        ended: float,
    ) -> Call:
        """`added`: the tokens of the prompt behind the end of the parent."""
        prompt = self._prompts.get(place.key)
        if prompt is None or (prompt.parent, prompt.ids) != (place.parent, added):
            base, new = self._base(place), said[place.begin :]
            prompt = extending(base, place.key, place.parent, len(self.calls), new, added)
        call = Call(
            len(self.calls),
            prompt,
            setting,
            drawn.ids,
            drawn.logprobs,
            drawn.versions,
            answer,
            finish,
            place.broke,
            dialect,
            started,
            ended,
        )
        self.restore(call, place.keys[len(place.keys) - prompt.said_count :])
        return call

    def restore(self, call: Call, keys: Sequence[bytes] = ()) -> None:
        """`keys`: of the beginnings that the call's prompt adds, where they are known."""
        assert call.number == len(self.calls)
        self.calls.append(call)
        self.call_ids.update(one.id for one in call.answer.calls)
        self._prompts[call.prompt.key] = call.prompt
        # Of equal answers to one prompt the last counts: that is what a client goes on from.
        end = chained(call.prompt.key, call.answer)
        self._ends[end] = call.number
        self._settings.add(call.setting.digest)
        self.size += _size(call)
        parent = call.prompt.parent
        if not keys:
            begin = call.setting.digest if parent is None else self._end_keys[parent]
            keys = list(accumulate(call.prompt.said, chained, initial=begin))[1:]
        self._passed.update(zip(keys, repeat(call.number)))
        self._passed[end] = call.number
        self._end_keys.append(end)
        if call.prompt.parent is not None:
            self._continued[call.prompt.parent] = call.number

    def _base(self, place: Place) -> Prompt | None:
        """The prompt behind the same call on the way to the dialogue with which this one has most in common."""
        keys = (place.keys[i] for i in reversed(range(place.begin, len(place.keys))))
        number = next((self._passed[key] for key in keys if key in self._passed), None)
        while number is not None and self.calls[number].prompt.parent != place.parent:
            number = self.calls[number].prompt.parent
        return None if number is None else self.calls[number].prompt

    def chain(self, number: int | None) -> list[Call]:
        """The calls from the beginning of a dialogue to call `number`."""
        calls: list[Call] = []
        while number is not None:
            calls.append(self.calls[number])
            number = self.calls[number].prompt.parent
        return calls[::-1]

    def ends(self) -> list[Call]:
        """The calls from which no other goes on."""
        return [call for call in self.calls if call.number not in self._continued]

    def _why(self, setting: Setting, said: Sequence[Said], keys: Sequence[bytes]) -> str:
        """Against the recorded dialogue with which it has most in common."""
        if setting.digest not in self._settings:
            last = self.calls[-1].setting
            return "the thinking mode changed" if last.thinking != setting.thinking else "the tools changed"
        common = next((i for i, key in enumerate(keys) if key not in self._passed), len(keys))
        if not common:
            return "the system prompt changed" if said[0].role == "system" else "a new dialogue began"
        if common == len(said):
            return "the same prompt was asked again" if keys[-1] in self._prompts else "the history was cut off"
        number = self._passed[keys[common - 1]]
        while number in self._continued:
            number = self._continued[number]
        old = [one.digest for one in _dialogue(self.chain(number))]
        left = said[common].digest
        if left in old[common + 1 :]:
            missing = old.index(left, common + 1) - common
            return f"the history was cut: {missing} messages from message {common} on are missing"
        return f"message {common} was edited"


def _dialogue(calls: Sequence[Call]) -> Iterator[Said]:
    for call in calls:
        yield from call.prompt.said
        yield call.answer


def _size(call: Call) -> int:
    """Objects and table rows count 500 bytes each."""
    new = call.prompt if call.prompt.first == call.number else None
    said = [call.answer, *(new.new_said if new else ())]
    texts = sum(len(part) for one in said for part in (*one.content, one.reasoning) if isinstance(part, str))
    arguments = sum(len(one.arguments) for turn in said for one in turn.calls)
    return 500 * (2 + len(said)) + texts + arguments + 16 * len(call.ids) + (4 * len(new.new_ids) if new else 0)


def _common(old: Sequence[Said], new: Sequence[Said]) -> int:
    pairs = zip(old, new, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a is not b and a != b), min(len(old), len(new)))


def _common_ids(old: "array[int]", new: "array[int]") -> int:
    length = min(len(old), len(new))
    differ = np.frombuffer(old, np.int32)[:length] != np.frombuffer(new, np.int32)[:length]
    return int(differ.argmax()) if differ.any() else length
