"""Ranges of shapes: as the user writes them, as each input gets them, and refused where they cannot be meant."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support import small_config
from txl_deploy.manifest import BatchRange
from txl_deploy.signature import Signature, step_signature
from txl_deploy.trt.profiles import DEFAULT_BATCH, Profile, check_profiles, parse_batch_range, profiles_for
from txl_train.errors import UsageError

CONFIG = small_config(cutoffs=(5, 9))
SIGNATURE = step_signature(CONFIG, tgt_len=5, memory="kv")


def changed(profiles: list[Profile], name: str, **shapes: tuple[int, ...]) -> list[Profile]:
    """Return the profiles with the shapes of one input changed."""
    return [dataclasses.replace(profile, **shapes) if profile.name == name else profile for profile in profiles]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,8,32", (1, 8, 32)), (" 2, 2 ,4 ", (2, 2, 4)), ("8", (8, 8, 8)), (16, (16, 16, 16)), (None, (1, 8, 32))],
)
def test_a_range_is_three_numbers_or_one(text: str | int | None, expected: tuple[int, int, int]) -> None:
    batch = parse_batch_range(text)
    assert (batch.min, batch.opt, batch.max) == expected


@pytest.mark.parametrize("text", ["", "1,32", "1..32", "a,b,c", "1,8,32,64", "0,1,2", "8,1,32", "1,32,8", "-1", "1.5", 0, "²"])
def test_anything_else_names_the_form(text: str | int) -> None:
    with pytest.raises(UsageError) as caught:
        parse_batch_range(text)
    assert caught.value.exit_code == 2
    assert "--batch-range 1,8,32" in str(caught.value)


def test_every_input_has_the_same_range_of_the_batch() -> None:
    profiles = profiles_for(SIGNATURE, DEFAULT_BATCH, 5)
    check_profiles(SIGNATURE, profiles)
    assert [profile.name for profile in profiles] == [spec.name for spec in SIGNATURE.inputs]
    by_name = {profile.name: profile for profile in profiles}
    assert by_name["input_ids"] == Profile(name="input_ids", min=(1, 5), opt=(8, 5), max=(32, 5))
    assert by_name["memory_length"] == Profile(name="memory_length", min=(1,), opt=(8,), max=(32,))
    assert by_name["past_key_values.1.value"] == Profile(
        name="past_key_values.1.value", min=(1, 2, 7, 3), opt=(8, 2, 7, 3), max=(32, 2, 7, 3)
    )


def test_the_rows_of_a_cluster_go_from_one_to_every_target() -> None:
    (rows,) = [profile for profile in profiles_for(SIGNATURE, DEFAULT_BATCH, 5) if profile.name == "target_rows.2"]
    assert (rows.min, rows.max) == ((1,), (160,))
    assert 1 <= rows.opt[0] <= 40


def test_one_stream_of_one_token_has_a_profile() -> None:
    signature = step_signature(CONFIG, tgt_len=1, memory="hidden")
    profiles = profiles_for(signature, parse_batch_range(1), 1)
    check_profiles(signature, profiles)
    assert {profile.max for profile in profiles if profile.name.startswith("target_rows")} == {(1,)}


@pytest.mark.parametrize("memory", ["kv", "hidden"])
def test_a_fixed_graph_takes_its_own_number_of_streams_alone(memory: str) -> None:
    signature = step_signature(CONFIG, tgt_len=5, memory=memory, batch=4)  # type: ignore[arg-type]
    profiles = profiles_for(signature, parse_batch_range(4), 5)
    check_profiles(signature, profiles)
    assert profiles[0] == Profile(name="input_ids", min=(4, 5), opt=(4, 5), max=(4, 5))
    with pytest.raises(UsageError, match="takes 4 streams") as caught:
        profiles_for(signature, DEFAULT_BATCH, 5)
    assert "--batch-range 4" in str(caught.value)


def test_a_range_without_an_end_is_refused() -> None:
    with pytest.raises(UsageError, match="no end"):
        profiles_for(SIGNATURE, BatchRange(), 5)


def test_without_a_usual_number_of_streams_it_is_tuned_for_the_most() -> None:
    assert profiles_for(SIGNATURE, BatchRange(min=1, max=6), 5)[0].opt == (6, 5)


def refused(profiles: list[Profile], signature: Signature = SIGNATURE) -> str:
    """Return the message with which they are refused."""
    with pytest.raises(UsageError) as caught:
        check_profiles(signature, profiles)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_two_inputs_with_different_ranges_of_the_batch_are_refused() -> None:
    good = profiles_for(SIGNATURE, DEFAULT_BATCH, 5)
    message = refused(changed(good, "memory_length", max=(16,)))
    assert "`memory_length` has another range of batch_size than `input_ids`: 1..16 (usually 8) instead of 1..32 (usually 8)" in message
    assert "fail when it runs" in message


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("input_ids", {"min": (1, 4)}, "axis of `input_ids` is fixed to 5"),
        ("input_ids", {"min": (9, 5)}, "range of `input_ids` must rise"),
        ("target_rows.1", {"max": (2,)}, "range of `target_rows.1` must rise"),
        ("target_rows.1", {"min": (0,)}, "range of `target_rows.1` must rise from 1"),
        ("memory_length", {"min": (1, 1)}, "`memory_length` has 1 axes"),
    ],
)
def test_shapes_that_the_graph_cannot_have_are_refused(name: str, shapes: dict[str, tuple[int, ...]], expected: str) -> None:
    assert expected in refused(changed(profiles_for(SIGNATURE, DEFAULT_BATCH, 5), name, **shapes))


def test_inputs_without_a_profile_and_profiles_without_an_input_are_refused() -> None:
    good = profiles_for(SIGNATURE, DEFAULT_BATCH, 5)
    assert "`input_ids` has no profile" in refused(good[1:])
    assert "`mems.0` has a profile, but is no input" in refused([*good, Profile(name="mems.0", min=(1,), opt=(1,), max=(1,))])


def test_clusters_may_have_different_numbers_of_rows() -> None:
    good = profiles_for(SIGNATURE, DEFAULT_BATCH, 5)
    check_profiles(SIGNATURE, changed(good, "target_rows.1", max=(100,)))


def test_a_manifest_keeps_lists() -> None:
    record = Profile(name="x", min=(1, 2), opt=(3, 2), max=(4, 2)).record()
    assert (record.name, record.min, record.opt, record.max) == ("x", [1, 2], [3, 2], [4, 2])
