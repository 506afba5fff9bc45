"""text8's filter: any text becomes the letters a-z and single blanks, as Matt Mahoney's wikifil.pl makes them of Wikipedia.

Its rules (mattmahoney.net/dc/textdata.html, in the public domain): what a reader of the page does not see is left out - the XML around
articles, redirects, tags, references, addresses, templates, tables, links to other languages; captions of pictures, the visible words
of links and the names of categories stay. Then capitals become small, digits are spelt out, and anything else is a blank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_LOWER = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz")
_DIGITS = tuple(
    (str(digit).encode(), f" {name} ".encode())
    for digit, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
)
_OTHER = re.compile(rb"[^a-z]+")

_REDIRECT = re.compile(rb"#redirect", re.IGNORECASE)
_MARKUP = (
    (re.compile(rb"&amp;"), b"&"),
    (re.compile(rb"&lt;"), b"<"),
    (re.compile(rb"&gt;"), b">"),
    (re.compile(rb"<ref[^<]*</ref>"), b""),
    (re.compile(rb"<[^>]*>"), b""),
    (re.compile(rb"\[http:[^\] ]*"), b"["),  # an address; the words beside it stay
    (re.compile(rb"\|thumb", re.IGNORECASE), b""),
    (re.compile(rb"\|left", re.IGNORECASE), b""),
    (re.compile(rb"\|right", re.IGNORECASE), b""),
    (re.compile(rb"\|\d+px", re.IGNORECASE), b""),
    (re.compile(rb"\[\[image:[^\[\]]*\|", re.IGNORECASE), b""),  # a picture; its caption stays
    (re.compile(rb"\[\[category:([^|\]]*)[^\]]*\]\]", re.IGNORECASE), rb"[[\1]]"),
    (re.compile(rb"\[\[[a-z\-]*:[^\]]*\]\]"), b""),  # the article in another language
    (re.compile(rb"\[\[[^|\]]*\|"), b"[["),  # where a link leads; its visible words stay
    (re.compile(rb"\{\{[^}]*\}\}"), b""),
    (re.compile(rb"\{[^}]*\}"), b""),
    (re.compile(rb"[\[\]]"), b""),
    (re.compile(rb"&[^;]*;"), b" "),
)
"""What is replaced within an article, in this order."""
_TAG_AT_END = re.compile(rb"<.*>")


def letters(text: bytes) -> bytes:
    """Return a text's letters in lower case, digits spelt out, and one blank for whatever else stands between, before or after them."""
    text = text.translate(_LOWER)
    for digit, name in _DIGITS:
        text = text.replace(digit, name)
    return _OTHER.sub(b" ", text)


def filter_prose(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield text8's form of a plain text, given and returned in portions to be joined."""
    ends_with_blank = True
    for block in blocks:
        piece = letters(block)
        if ends_with_blank:
            piece = piece.removeprefix(b" ")
        if piece:
            ends_with_blank = piece.endswith(b" ")
            yield piece


def filter_xml(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield text8's form of a Wikipedia dump (XML with `<text ...>` elements), given and returned in portions to be joined."""
    within = False
    for record in _up_to_tag_ends(blocks):
        if b"<text " in record:
            within = True
        if _REDIRECT.search(record):
            within = False
        if not within:
            continue
        if b"</text>" in record:
            within = False
        text = _TAG_AT_END.sub(b"", record, count=1)
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        if piece := letters(b" " + text + b" ")[:-1]:
            yield piece


def _up_to_tag_ends(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut a text after every `>`."""
    rest: list[bytes] = []
    for block in blocks:
        *ended, last = block.split(b">")
        for piece in ended:
            yield b"".join([*rest, piece, b">"])
            rest = []
        rest.append(last)
    if any(rest):
        yield b"".join(rest)
