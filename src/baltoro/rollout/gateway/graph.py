"""The calls of one session as a graph: each call goes on from the end of another, or begins anew; every token is kept
once, as the engine saw and drew it (appendix D).

A dialogue whose beginning is on record, up to the end of some answer, goes on from the exact tokens of that answer: the
model's reasoning included, nothing rendered again. Dialogues are told apart by chains of digests, so finding the place
of a request takes one look-up for each message.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from baltoro.agent.engine import Sampled
from baltoro.rollout.gateway.said import Said, Setting, chained


@dataclass(frozen=True, eq=False)
class Prompt:
    """What was said to the model behind the end of call `parent` (None: from the beginning), and its tokens. Calls that
    ask the same again share it."""

    key: bytes
    parent: int | None
    said: tuple[Said, ...]
    ids: "array[int]"


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
    """Where a request stands in the graph: it goes on from call `parent`, and messages from `begin` on are new."""

    key: bytes
    parent: int | None
    begin: int
    broke: str
    prompt: Prompt | None


class Session:
    def __init__(self, id: str) -> None:
        self.id = id
        self.calls: list[Call] = []
        self.call_ids: set[str] = set()
        self._prompts: dict[bytes, Prompt] = {}
        self._ends: dict[bytes, int] = {}
        self._continued: set[int] = set()

    def place(self, setting: Setting, said: Sequence[Said]) -> Place:
        key, parent, begin = setting.digest, None, 0
        for i, one in enumerate(said):
            key = chained(key, one)
            if one.role == "assistant" and key in self._ends:
                parent, begin = self._ends[key], i + 1
        fresh = not self.calls or (parent is not None and parent not in self._continued)
        broke = "" if fresh else self._why(setting, said)
        prompt = self._prompts.get(key)
        if prompt is not None:
            parent = prompt.parent
        return Place(key, parent, begin, broke, prompt)

    def add(
        self,
        place: Place,
        setting: Setting,
        said: Sequence[Said],
        ids: Sequence[int],
        sampled: Sequence[Sampled],
        answer: Said,
        finish: str,
        dialect: str,
        started: float,
        ended: float,
    ) -> Call:
        """`ids`: the tokens of the prompt behind the end of the parent."""
        prompt = self._prompts.get(place.key)
        if prompt is None:
            prompt = Prompt(place.key, place.parent, tuple(said[place.begin :]), array("i", ids))
        call = Call(
            len(self.calls),
            prompt,
            setting,
            array("i", [token.token for token in sampled]),
            array("d", [token.logprob for token in sampled]),
            array("i", [token.weight_version for token in sampled]),
            answer,
            finish,
            place.broke,
            dialect,
            started,
            ended,
        )
        self.restore(call)
        return call

    def restore(self, call: Call) -> None:
        assert call.number == len(self.calls)
        self.calls.append(call)
        self.call_ids.update(one.id for one in call.answer.calls)
        self._prompts[call.prompt.key] = call.prompt
        # Of equal answers to one prompt the last counts: that is what a client goes on from.
        self._ends[chained(call.prompt.key, call.answer)] = call.number
        if call.prompt.parent is not None:
            self._continued.add(call.prompt.parent)

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

    def _why(self, setting: Setting, said: Sequence[Said]) -> str:
        """Against the recorded dialogue with which it has most in common."""
        new = [one.digest for one in said]
        best, best_common, best_old = None, -1, list[bytes]()
        for end in reversed(self.ends()):
            old = [one.digest for one in _dialogue(self.chain(end.number))]
            common = next(
                (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
            )
            if end.setting.digest == setting.digest:
                common += 1
            if common > best_common:
                best, best_common, best_old = end, common, old
        assert best is not None
        if best.setting.thinking != setting.thinking:
            return "the thinking mode changed"
        if best.setting.digest != setting.digest:
            return "the tools changed"
        common = best_common - 1
        if common == len(new):
            return "the same prompt was asked again" if len(best_old) == common + 1 else "the history was cut off"
        if common == len(best_old):
            return "an answer was given before it was asked for"
        if new[common] in best_old[common + 1 :]:
            dropped = best_old.index(new[common], common + 1) - common
            return f"the history was cut: {dropped} messages from message {common} on are missing"
        if said[common].role == "system":
            return "the system prompt changed"
        if common == 0:
            return "a new dialogue began"
        return f"message {common} was edited"


def _dialogue(calls: Sequence[Call]) -> Iterator[Said]:
    for call in calls:
        yield from call.prompt.said
        yield call.answer
