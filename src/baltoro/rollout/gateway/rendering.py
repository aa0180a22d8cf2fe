"""From a recorded history and what is new behind it to the tokens and media that the engine reads."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from baltoro.chat.media import MediaSpec
from baltoro.chat.messages import MediaItem, TokenSequence
from baltoro.chat.render import TooLong, render
from baltoro.chat.tokenizer import Tokenizer
from baltoro.rollout.gateway.graph import Call, Prompt
from baltoro.rollout.gateway.said import Media, Said, Setting, to_messages

_CACHE_BYTES = 2**29


class Rendering:
    """Its methods may run in threads. The patches of the media that were seen last are kept, within 512 MB: a dialogue
    shows the same screenshots again in every turn."""

    def __init__(self, tokenizer: Tokenizer, spec: MediaSpec) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._items: OrderedDict[Media, tuple[MediaItem, ...]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def begin(
        self, said: Sequence[Said], setting: Setting, files: Mapping[str, bytes], keep_reasoning: bool, limit: int
    ) -> TokenSequence:
        """Raises TooLong for more than `limit` tokens, BrokenMedia, and ValueError for what cannot be rendered."""
        return self._render(said, setting, files, keep_reasoning, limit, declare=True)

    def go_on(
        self, chain: Sequence[Call], said: Sequence[Said], setting: Setting, files: Mapping[str, bytes], limit: int
    ) -> TokenSequence:
        """The exact tokens of `chain`, then `said` and the generation prompt. Raises as `begin`."""
        ids, media = self._recorded(chain, files)
        if ids[-1] != self._tokenizer.im_end:
            ids.append(self._tokenizer.im_end)  # not drawn by the model, whose answer was cut off
        more = self._render(said, setting, files, True, limit - len(ids), declare=False)
        return TokenSequence(ids + more.ids, media + more.media)

    def again(self, chain: Sequence[Call], prompt: Prompt, files: Mapping[str, bytes]) -> TokenSequence:
        """The same prompt as before."""
        ids, media = self._recorded(chain, files)
        return TokenSequence([*ids, *prompt.ids], media + self.items(prompt.said, files))

    def _recorded(self, chain: Sequence[Call], files: Mapping[str, bytes]) -> tuple[list[int], list[MediaItem]]:
        ids: list[int] = []
        media: list[MediaItem] = []
        for call in chain:
            ids += call.prompt.ids
            ids += call.ids
            media += self.items(call.prompt.said, files)
        return ids, media

    def _render(
        self,
        said: Sequence[Said],
        setting: Setting,
        files: Mapping[str, bytes],
        keep_reasoning: bool,
        limit: int,
        declare: bool,
    ) -> TokenSequence:
        if limit < 0:
            raise TooLong("the recorded dialogue is too long already")
        sequence = render(
            to_messages(said, files),
            self._tokenizer,
            self._spec,
            setting.tools if declare else (),
            add_generation_prompt=True,
            keep_reasoning=keep_reasoning,
            thinking=setting.thinking,
            max_tokens=limit,
        )
        shown = [media for one in said for media in one.media]
        if all(media.kind == "image" for media in shown):  # one item each; a video has many
            for media, item in zip(shown, sequence.media, strict=True):
                self._keep(media, (item,))
        return sequence

    def items(self, said: Sequence[Said], files: Mapping[str, bytes]) -> list[MediaItem]:
        return [item for one in said for media in one.media for item in self._item(media, files)]

    def _item(self, media: Media, files: Mapping[str, bytes]) -> tuple[MediaItem, ...]:
        with self._lock:
            if media in self._items:
                self._items.move_to_end(media)
                return self._items[media]
        alone = to_messages([Said("user", (media,))], files)
        items = tuple(render(alone, self._tokenizer, self._spec).media)
        self._keep(media, items)
        return items

    def _keep(self, media: Media, items: tuple[MediaItem, ...]) -> None:
        with self._lock:
            if media not in self._items:
                self._items[media] = items
                self._bytes += _size(items)
            while self._bytes > _CACHE_BYTES and len(self._items) > 1:
                self._bytes -= _size(self._items.popitem(last=False)[1])


def _size(items: tuple[MediaItem, ...]) -> int:
    return sum(item.patches.nbytes for item in items)
