"""Token to id and back: the vocabulary of a corpus, ordered by frequency, kept as plain JSON.

Knows nothing of files of text or of data sets' rules: whoever counts tokens hands the counts over. The order matters: ids follow
descending counts, which the adaptive softmax relies on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from txl_train.data.datasets import EOS, LM1B_UNK, SENTENCE, UNK, Unit
from txl_train.errors import DataError
from txl_train.files import whole_or_absent

FORMAT = "txl-vocabulary"
VERSION = 1

MISSING = -1
"""What `Vocabulary.find` gives for a token that has no id."""

_SUBWORD_NEWLINE = "\u010a"
"""The line break as GPT-2's files write it."""


class Vocabulary:
    """A list of different tokens; a token's id is its place in it. Immutable.

    `unit` says what one token is: a word, a character, a byte (written as its decimal value), or a subword (as GPT-2's files write it).
    `eos_id` is the id of the token that ends a line, `unk_id` of the one for unknown words, None where the vocabulary has none. Equal
    vocabularies have equal `sha256`.
    """

    def __init__(self, symbols: Iterable[str], *, unit: Unit) -> None:
        self._symbols = tuple(symbols)
        self._unit: Unit = unit
        self._ids = _numbered(self._symbols, unit)
        self._sha256: str | None = None

    @classmethod
    def from_counts(
        cls,
        counts: Counter[str],
        *,
        unit: Unit,
        specials: Sequence[str] = (),
        min_count: int = 1,
        maps_unknown: bool = False,
        unk: str = UNK,
    ) -> Vocabulary:
        """Order tokens by descending count, ties by first appearance (the order of `counts`), after the `specials`.

        With `maps_unknown`, tokens counted fewer than `min_count` times give their counts to `unk`, which takes the place its
        count earns; it is present even when its count is 0 (then last).
        """
        merged: Counter[str] = Counter()
        n_rare = 0
        for symbol, count in counts.items():
            if maps_unknown and count < min_count:
                n_rare += count
            elif symbol not in specials:
                merged[symbol] = count
        if maps_unknown:
            merged[unk] += n_rare
        return cls([*specials, *(symbol for symbol, _ in merged.most_common())], unit=unit)

    @property
    def symbols(self) -> tuple[str, ...]:
        """All tokens in order of their ids."""
        return self._symbols

    @property
    def unit(self) -> Unit:
        """What one token is: "word", "char", "byte" or "subword"."""
        return self._unit

    @property
    def counts_characters(self) -> bool:
        """True where a token is a character or a byte: scores are then given in bits per character, otherwise as perplexity."""
        return self._unit in ("char", "byte")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a line: `<eos>`, `<S>` or GPT-2's line break; None where there is none."""
        return self._first_id({"word": (EOS, SENTENCE), "subword": (_SUBWORD_NEWLINE,)})

    @property
    def unk_id(self) -> int | None:
        """Id of `<unk>` or `<UNK>`; None where there is none."""
        return self._first_id({"word": (UNK, LM1B_UNK)})

    def _first_id(self, names: Mapping[str, Sequence[str]]) -> int | None:
        return next((self._ids[name] for name in names.get(self._unit, ()) if name in self._ids), None)

    def __len__(self) -> int:
        return len(self._symbols)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return self._unit == other._unit and self._symbols == other._symbols

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} {self._unit}s, sha256 {self.sha256[:12]})"

    def find(self, tokens: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the ids of `tokens`, int64 [N], with `MISSING` for those that have none."""
        return np.fromiter(map(self._ids.get, tokens, itertools.repeat(MISSING)), dtype=np.int64, count=len(tokens))

    def encode(self, tokens: Iterable[str]) -> npt.NDArray[np.int64]:
        """Return the ids of `tokens`, int64 [N]; an unknown one gets the id of `<unk>`, or is a `DataError` where there is none."""
        listed = tokens if isinstance(tokens, (list, tuple)) else list(tokens)
        ids = self.find(listed)
        missing = ids == MISSING
        if missing.any():
            if self.unk_id is None:
                raise DataError(
                    f"The {self._unit} `{listed[int(missing.argmax())]}` is not among the {len(self)} {self._unit}s of the vocabulary, "
                    "and it has no `<unk>` to stand for it.",
                    remedy="Score text made of the vocabulary's own tokens, or train with `--dataset text`, which keeps a place for <unk>.",
                )
            ids[missing] = self.unk_id
        return ids

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Return the tokens of `ids`; an id outside 0..len-1 is a `DataError`."""
        tokens = []
        for i in ids:
            if not 0 <= i < len(self._symbols):
                raise DataError(f"There is no token with id {i}: the vocabulary has ids 0 to {len(self) - 1}.")
            tokens.append(self._symbols[i])
        return tokens

    @property
    def sha256(self) -> str:
        """Hash of unit and tokens in order, hexadecimal; it does not depend on how a file of it is laid out."""
        if self._sha256 is None:
            content = json.dumps([self._unit, *self._symbols], ensure_ascii=True, separators=(",", ":"))
            self._sha256 = hashlib.sha256(content.encode("ascii")).hexdigest()
        return self._sha256

    def to_dict(self) -> dict[str, Any]:
        """Return the vocabulary as plain values that JSON can hold; `from_dict` is the inverse."""
        return {"format": FORMAT, "version": VERSION, "unit": self._unit, "sha256": self.sha256, "symbols": list(self._symbols)}

    @classmethod
    def from_dict(cls, values: Any) -> Vocabulary:
        """Rebuild a vocabulary from `to_dict`; anything missing, of the wrong type, doubled or changed is a `DataError`."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"This is no vocabulary: the entry `format` is not `{FORMAT}`.")
        if values.get("version") != VERSION:
            raise DataError(
                f"The vocabulary has version {values.get('version')!r}, but this toolkit reads version {VERSION}.",
                remedy="Use the version of txl that wrote it.",
            )
        symbols = values.get("symbols")
        if not isinstance(symbols, list):
            raise DataError("The vocabulary has no list `symbols`.")
        vocabulary = cls(symbols, unit=values.get("unit", "missing"))
        if values.get("sha256") != vocabulary.sha256:
            raise DataError("The vocabulary was changed after it was written: its `sha256` does not belong to its symbols.")
        return vocabulary

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON, one token a line; the file is whole or absent. `EnvironmentUnfitError` where it cannot be."""
        with whole_or_absent(path) as file:
            file.write((json.dumps(self.to_dict(), ensure_ascii=False, indent=0) + "\n").encode("utf-8", "surrogatepass"))

    def to_json(self) -> str:
        """Return `to_dict` as JSON in ASCII, which a pickle reads at once."""
        return json.dumps(self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote; a `DataError` names the file and what is wrong with it."""
        remedy = "Delete it and let it be built again, or copy it again from where it came."
        try:
            return cls.from_dict(json.loads(path.read_bytes().decode("utf-8", "surrogatepass")))
        except OSError as error:
            raise DataError(f"The vocabulary {path} cannot be read: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"The vocabulary {path} is damaged: it is not JSON ({error}).", remedy=remedy) from error
        except DataError as error:
            raise DataError(f"The vocabulary {path} cannot be used. {error.message}", remedy=error.remedy or remedy) from error


def _numbered(symbols: tuple[object, ...], unit: object) -> dict[str, int]:
    """Return token to id; a `DataError` unless this is a vocabulary: known unit, at least one token, strings only, none twice."""
    if unit not in get_args(Unit):
        raise DataError(f"The unit of a vocabulary is one of {', '.join(get_args(Unit))}, but here it is {unit!r}.")
    if not symbols:
        raise DataError("The vocabulary has no tokens.")
    ids: dict[str, int] = {}
    for i, symbol in enumerate(symbols):
        if not isinstance(symbol, str):
            raise DataError(f"Token {i} of the vocabulary must be a string, but is {symbol!r}.")
        if ids.setdefault(symbol, i) != i:
            raise DataError(f"The vocabulary holds `{symbol}` twice, as ids {ids[symbol]} and {i}.")
    return ids
