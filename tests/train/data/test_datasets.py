"""Data sets: names, cutoffs, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txl_train.data.datasets import (
    DATASETS,
    LM1B_VOCAB_SIZE,
    SMALLEST_ADAPTIVE_VOCAB,
    check_folder,
    default_cutoffs,
    default_tie_projections,
    get_dataset,
)
from txl_train.errors import ConfigError, DataError

from .conftest import MakeFolder


@pytest.mark.parametrize("name", ["pydoc", "text", "wt103", "lm1b", "text8", "enwik8"])
def test_every_data_set_is_found_by_its_name(name: str) -> None:
    assert get_dataset(name).name == name
    assert DATASETS[name].description.endswith(".")


def test_a_misspelt_data_set_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean `wt103`") as caught:
        get_dataset("wt130")
    assert "enwik8" in str(caught.value.remedy)


def test_the_full_wikitext_vocabulary_gets_the_specified_cutoffs() -> None:
    assert default_cutoffs(get_dataset("wt103"), 267_735) == (19_997, 39_997, 199_997)


def test_one_billion_word_has_cutoffs_and_untied_projections_of_its_own() -> None:
    spec = get_dataset("lm1b")
    assert default_cutoffs(spec, LM1B_VOCAB_SIZE) == (59_997, 99_997, 639_997)
    assert default_cutoffs(spec, 50_257) == (3_800, 6_333, 40_536)
    assert default_tie_projections(spec, 3) == (False, False, False, False)
    assert default_tie_projections(spec, 0) == (False,)
    assert default_tie_projections(get_dataset("wt103"), 3) is None


def test_a_smaller_vocabulary_gets_cutoffs_in_the_same_proportion() -> None:
    assert default_cutoffs(get_dataset("text"), 33_278) == (2_485, 4_971, 24_858)


def test_a_tiny_vocabulary_and_characters_get_no_cutoffs() -> None:
    assert default_cutoffs(get_dataset("pydoc"), SMALLEST_ADAPTIVE_VOCAB - 1) == ()
    assert default_cutoffs(get_dataset("text8"), 50_000) == ()


@given(st.integers(1, 900_000), st.sampled_from(["wt103", "lm1b"]))
def test_no_cluster_is_ever_empty(vocab_size: int, dataset: str) -> None:
    ends = (0, *default_cutoffs(get_dataset(dataset), vocab_size), vocab_size)
    assert all(start < end for start, end in zip(ends, ends[1:], strict=False))


def test_a_missing_folder_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder") as caught:
        check_folder(tmp_path / "nowhere", get_dataset("text"))
    assert "--data" in str(caught.value.remedy)
    with pytest.raises(DataError) as caught:
        check_folder(tmp_path / "nowhere", get_dataset("lm1b"))
    assert f"`txl data prepare lm1b --out {tmp_path / 'nowhere'}` makes one" in str(caught.value.remedy)


def test_a_file_in_place_of_the_folder_names_its_folder(make_folder: MakeFolder) -> None:
    folder = make_folder(train="a\n")
    with pytest.raises(DataError, match="is a file") as caught:
        check_folder(folder / "train.txt", get_dataset("text"))
    assert str(folder) in str(caught.value.remedy)


def test_a_missing_split_names_file_split_and_what_is_expected(make_folder: MakeFolder) -> None:
    folder = make_folder(train="a\n", test="a\n")
    with pytest.raises(DataError, match=r"no valid split: .*valid\.txt is missing") as caught:
        check_folder(folder, get_dataset("text"))
    assert "train.txt valid.txt test.txt" in str(caught.value.remedy)


def test_a_split_under_another_common_name_is_pointed_at(make_folder: MakeFolder) -> None:
    folder = make_folder(train="a\n", test="a\n")
    (folder / "wiki.valid.tokens").write_text("a\n")
    with pytest.raises(DataError) as caught:
        check_folder(folder, get_dataset("wt103"))
    assert "Rename wiki.valid.tokens to valid.txt" in str(caught.value.remedy)


def test_an_empty_file_is_named(make_folder: MakeFolder) -> None:
    with pytest.raises(DataError, match=r"test split .* is empty: .*test\.txt has 0 bytes"):
        check_folder(make_folder(train="a\n", valid="a\n", test=""), get_dataset("text"))


def test_only_the_splits_asked_for_must_be_there(make_folder: MakeFolder) -> None:
    folder = make_folder(test="a\n")
    assert check_folder(folder, get_dataset("text"), ["test"]) == {"test": folder / "test.txt"}
