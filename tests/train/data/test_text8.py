"""text8's filter: what wikifil.pl makes of Wikipedia's XML, and of plain text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from txl_train.data.text8 import filter_prose, filter_xml, letters


def xml(text: str) -> str:
    """Filter an article."""
    return b"".join(filter_xml([f'<text xml:space="preserve">{text}</text>'.encode()])).decode()


@pytest.mark.parametrize(
    ("text", "filtered"),
    [
        ("The Cat, in 1999.", "the cat in one nine nine nine"),
        ("a [[link]] and [[Where it leads|another]]", "a link and another"),
        ("see [http://example.org/x y z] here", "see y z here"),
        ("[[Image:Cat.jpg|thumb|200px|left|A cat on a [[mat]]]] sat", "a cat on a mat sat"),
        ("[[Category:Living cats|Cat]]", "living cats"),
        ("[[category:Cats]]", "cats"),
        ("word[[de:Wort]][[zh-min-nan:x]] end", "word end"),
        ("{{stub|cats}} a {| table |} b", "a b"),
        ("said &lt;ref name=x&gt;Smith 1990&lt;/ref&gt; he", "said he"),
        ("a&lt;br /&gt;b &amp;nbsp; &quot;c&quot;", "ab c"),
        ("na\u00efve caf\u00e9", "na ve caf"),
    ],
)
def test_markup_goes_and_what_a_reader_sees_stays(text: str, filtered: str) -> None:
    assert xml(text).strip() == filtered


def test_only_articles_are_kept() -> None:
    page = b"<page><title>No</title>%s<username>Nobody</username></page>\n"
    dump = (
        b"<mediawiki>"
        + page % b'<text xml:space="preserve">One</text>'
        + page % b"<text x>#REDIRECT [[One]]</text>"
        + page % b"<text x>Two</text>"
    )
    assert b"".join(filter_xml([dump])) == b" one two"


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_real_wikipedia_becomes_what_the_perl_script_makes_of_it(shared_dir: Path, size: int) -> None:
    dump = (shared_dir / "data" / "enwik8" / "enwik5.txt").read_bytes()
    filtered = b"".join(filter_xml(dump[i : i + size] for i in range(0, len(dump), size)))
    assert filtered.startswith(b" anarchism originated as a term of abuse first used against early working class radicals")
    # Of the output of wikifil.pl itself on this file.
    assert hashlib.sha256(filtered).hexdigest() == "72f1da98a0f70a3f4b80de482fbaba44fad8ce88324958326e8313e7bc94b52f"


def test_plain_text_keeps_its_letters() -> None:
    assert letters(b"It's 2!") == b"it s two "


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_portions_of_plain_text_make_no_difference(size: int) -> None:
    text = "  The 1st caf\u00e9, 20 km!\n\nEnd. ".encode()
    filtered = b"".join(filter_prose(text[i : i + size] for i in range(0, len(text), size)))
    assert filtered == b"the one st caf two zero km end "
