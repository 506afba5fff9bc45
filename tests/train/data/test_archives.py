"""Archives of every kind give their files, and nothing but contents and base names comes out of them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from txl_train.data.archives import members, translated
from txl_train.errors import DataError, EnvironmentUnfitError

FILES = {"wikitext/wiki.train.tokens": b"a b\n" * 100, "wikitext/wiki.test.tokens": b"c\n"}


def as_zip(path: Path, files: dict[str, bytes] = FILES) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_tar(path: Path, mode: str = "w:gz", files: dict[str, bytes] = FILES) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_folder(path: Path) -> Path:
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def contents(source: Path, limit: int = 10_000) -> dict[str, bytes]:
    return {member.name: b"".join(member.blocks(limit)) for member in members(source)}


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: as_zip(folder / "a.zip"),
        lambda folder: as_tar(folder / "a.tar.gz"),
        lambda folder: as_tar(folder / "a.tgz"),
        lambda folder: as_tar(folder / "a.tar", "w"),
        lambda folder: as_tar(folder / "a.tar.bz2", "w:bz2"),
        lambda folder: as_tar(folder / "a.tar.xz", "w:xz"),
        lambda folder: as_zip(folder / "named.wrongly.tar.gz"),
        lambda folder: as_folder(folder / "data"),
    ],
)
def test_every_kind_of_archive_is_seen_from_what_is_in_it(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert contents(make(tmp_path)) == {"wiki.train.tokens": b"a b\n" * 100, "wiki.test.tokens": b"c\n"}


@pytest.mark.parametrize(
    ("name", "compress", "inner"),
    [
        ("text8.gz", gzip.compress, "text8"),
        ("text8.bz2", bz2.compress, "text8"),
        ("text8.xz", lzma.compress, "text8"),
        ("text8", bytes, "text8"),
    ],
)
def test_a_single_file_is_what_it_holds(tmp_path: Path, name: str, compress: Callable[[bytes], bytes], inner: str) -> None:
    (tmp_path / name).write_bytes(compress(b"the text " * 1000))
    assert contents(tmp_path / name) == {inner: b"the text " * 1000}


def test_paths_and_links_in_an_archive_do_no_harm(tmp_path: Path) -> None:
    archive = tmp_path / "work" / "evil.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in ("../../outside.txt", "/tmp/absolute.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"special{kind.decode()}")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    assert contents(archive) == {"outside.txt": b"x", "absolute.txt": b"x"}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_by_lzma_which_chooses_how_much_memory_it_gets_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("train.txt", b"words\n")
    with pytest.raises(DataError, match=r"train\.txt compressed by LZMA"):
        list(members(tmp_path / "a.zip"))


def test_too_little_memory_for_an_archive_is_told_as_that_and_not_as_damage(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"Memory ran out when .*a\.xz was unpacked"), translated(tmp_path / "a.xz"):
        raise MemoryError


def test_links_in_a_zip_are_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("train.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("..\\valid.txt", "x")
    assert contents(tmp_path / "a.zip") == {"valid.txt": b"x"}


def test_a_small_archive_cannot_fill_the_disk(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "bomb.zip", {"train.txt": bytes(5_000_000)})
    assert archive.stat().st_size < 10_000
    with pytest.raises(DataError, match=r"train\.txt in .* is larger than 1,000 bytes"):
        contents(archive, limit=1_000)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-30],
        lambda content: content[:60] + bytes(20) + content[80:],
    ],
)
@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_a_damaged_archive_is_named(tmp_path: Path, make: Callable[[Path], Path], damage: Callable[[bytes], bytes]) -> None:
    archive = make(tmp_path / "archive")
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(DataError, match="archive is damaged or incomplete") as caught:
        contents(archive)
    assert "again" in str(caught.value.remedy)


def test_an_encrypted_zip_is_no_bug(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "a.zip", {"train.txt": b"abc"})
    content = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(signature) + at] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        contents(archive)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>Not found", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'])
def test_an_error_page_saved_as_an_archive_is_recognised(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "wikitext-103-v1.zip").write_bytes(page)
    with pytest.raises(DataError, match="is a web page or an error message") as caught:
        contents(tmp_path / "wikitext-103-v1.zip")
    assert "download it from another" in str(caught.value.remedy)


@pytest.mark.parametrize("head", [b"<mediawiki xmlns=", b'<?xml version="1.0"?>\n<mediawiki xmlns='])
def test_wikipedias_xml_is_no_error_page(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "enwik8").write_bytes(head)
    assert contents(tmp_path / "enwik8") == {"enwik8": head}


def test_a_missing_source_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no") as caught:
        contents(tmp_path / "nowhere.zip")
    assert "--source" in str(caught.value.remedy)


def test_folders_are_searched_to_a_depth(tmp_path: Path) -> None:
    for depth in range(6):
        folder = tmp_path.joinpath(*"abcdef"[:depth])
        folder.mkdir(exist_ok=True)
        (folder / f"{depth}.txt").write_text("x")
    assert set(contents(tmp_path)) == {"0.txt", "1.txt", "2.txt", "3.txt"}
