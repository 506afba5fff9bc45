"""The text of one sample while it is generated: what may be shown already, and whether a text at which to stop has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from txl_train.data.detokenizers import Detokenizer
from txl_train.data.vocabulary import Vocabulary


class TextStream:
    """Takes tokens one by one. The text is the continuation alone, without the prompt."""

    def __init__(self, detokenizer: Detokenizer, prompt_ids: Sequence[int], *, stops: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._prompt_ids = [int(i) for i in prompt_ids]
        self._stops = [stop for stop in stops if stop]
        self.ids: list[int] = []
        """Those taken."""
        self.text = ""
        """The continuation, up to a stop."""
        self.stopped_by: str | None = None
        """The text at which it ended, which is not part of it."""
        self._shown = 0

    def take(self, token: int) -> str | None:
        """Add a token; return the text at which the sample stops now, None where it goes on."""
        self.ids.append(token)
        text = self._continuation(self._detokenizer.text)
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            text = text[:at]
        self.text = text
        return self.stopped_by

    def fresh(self, *, ended: bool) -> str:
        """Return what may be shown and was not returned before: all where the sample `ended`, else what no further token changes."""
        text = self.text
        if not ended:
            stable = self._continuation(self._detokenizer.stable)
            text = _common(stable, text)
            held = max((_overlap(text, stop) for stop in self._stops), default=0)
            text = text[: len(text) - held]
        if len(text) <= self._shown:
            return ""
        part, self._shown = text[self._shown :], len(text)
        return part

    def _continuation(self, detokenize: Callable[[list[int]], str]) -> str:
        """Return what the tokens add to the text of the prompt: all from the first character at which they differ."""
        before = self._detokenizer.text(self._prompt_ids)
        whole = detokenize([*self._prompt_ids, *self.ids])
        return whole[len(_common(before, whole)) :]


class RawTokens:
    """In place of a `Detokenizer`: the tokens as they are, with blanks between."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def text(self, ids: Sequence[int]) -> str:
        """Return the tokens of `ids`, each followed by a blank."""
        return "".join(f"{token} " for token in self._vocabulary.decode(ids))

    stable = text


def _common(one: str, other: str) -> str:
    """Return what both texts begin with."""
    n = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:n]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` a stop may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
