"""Where the data sets are to be had, and by what each is recognised: sizes, checksums, counts. Facts only.

Sizes and checksums are those that several independent users have recorded; of the counts, those of WikiText are the specification's and the
data set's own, that of One Billion Word is of its training shards. A checksum that nobody has recorded is not made up: then size and counts
decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from txl_train.data.download import Source


@dataclass(frozen=True)
class Published:
    """Where a data set is to be had, and by what it is recognised."""

    archive: str
    """Name of the file that is downloaded."""
    sources: tuple[Source, ...]
    """Addresses, in the order in which they are tried."""
    editions: Mapping[str, Mapping[str, int | str]] = field(default_factory=dict)
    """Name of an edition to what it has: tokens of splits, lines of train, or the sha256 of the text before it is cut."""


_WT103_ZIP = "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
_ENWIK8_ZIP = "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
_TEXT8_ZIP = "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
_LM1B_TAR = "sha256:01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"
_LM1B_NAME = "1-billion-word-language-modeling-benchmark-r13output.tar.gz"

PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "wt103": Published(
            archive="wikitext-103-v1.zip",
            sources=(
                Source("https://wikitext.smerity.com/wikitext-103-v1.zip", 190_229_076, _WT103_ZIP),
                # The same three files as a tar; its publisher gave a sha512.
                Source(
                    "https://dax-cdn.cdn.appdomain.cloud/dax-wikitext-103/1.0.1/wikitext-103.tar.gz",
                    None,
                    "sha512:c8186919aa1840af6b734ea41abc580574ea8efe2fafda220f5d01002464d17566d84be5199b875136c9593f0e0678fb5d7c84bb2231de8b"
                    "4151cb9c83fa2109",
                ),
                # The original address, which was found dead (pytorch/text#2255).
                Source("https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip", 190_229_076, _WT103_ZIP),
            ),
            editions={
                "WikiText-103": {"train": 103_227_021, "valid": 217_646, "test": 245_569},
                "WikiText-2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
            },
        ),
        "enwik8": Published(
            archive="enwik8.zip",
            sources=(
                Source("https://mattmahoney.net/dc/enwik8.zip", 36_445_475, _ENWIK8_ZIP),
                Source("http://mattmahoney.net/dc/enwik8.zip", 36_445_475, _ENWIK8_ZIP),
                Source("https://data.deepai.org/enwik8.zip", 36_445_475, _ENWIK8_ZIP),
            ),
            editions={"enwik8": {"text_sha256": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"}},
        ),
        "text8": Published(
            archive="text8.zip",
            sources=(
                Source("https://mattmahoney.net/dc/text8.zip", 31_344_016, _TEXT8_ZIP),
                Source("http://mattmahoney.net/dc/text8.zip", 31_344_016, _TEXT8_ZIP),
                Source("https://data.deepai.org/text8.zip", 31_344_016, _TEXT8_ZIP),
            ),
            editions={"text8": {"text_sha256": "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7"}},
        ),
        "lm1b": Published(
            archive=_LM1B_NAME,
            sources=(
                Source(f"https://www.statmt.org/lm-benchmark/{_LM1B_NAME}", 1_792_209_805, _LM1B_TAR),
                Source(f"http://www.statmt.org/lm-benchmark/{_LM1B_NAME}", 1_792_209_805, _LM1B_TAR),
            ),
            editions={"One Billion Word": {"train_lines": 30_301_028}},
        ),
    }
)
"""By data set."""

LM1B_VOCABULARY = (
    Source(
        "https://github.com/rafaljozefowicz/lm/raw/master/1b_word_vocab.txt",
        None,
        "sha256:c758fee313a5c952995f391a659fe31cde50f2b11f5fae6c0e75a0a6e79fa34d",
    ),
)
"""The vocabulary the authors train with; where it cannot be had, words are counted instead."""
