"""Files are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from txl_train.errors import EnvironmentUnfitError
from txl_train.files import file_sha256, whole_or_absent, write_json


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with whole_or_absent(path) as file:
        file.write(b"old")

    def write_half() -> None:
        with whole_or_absent(path) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_that_cannot_be_written_is_an_unfit_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentUnfitError, match="cannot be written"), whole_or_absent(tmp_path / "file" / "below.txt") as file:
        file.write(b"never")


def test_the_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_json_with_a_number_that_json_lacks_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1.5, "ä": None})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5, "ä": None}
