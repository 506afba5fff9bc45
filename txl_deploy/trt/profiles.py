"""Which shapes an engine takes: the least, the usual and the largest of each input, checked before a build.

TensorRT's parser and builder do not notice that two inputs are given different ranges of the batch; the engine then fails when it
runs. So ranges are made here from the signature, and whatever comes from elsewhere is checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from txl_deploy.manifest import BatchRange, ProfileRecord
from txl_deploy.signature import BATCH, Signature, TensorSpec
from txl_train.errors import UsageError

DEFAULT_BATCH = BatchRange(min=1, opt=8, max=32)
"""Numbers of streams that an engine takes unless it is told otherwise."""

_ROWS_SHARE = 8
"""A tail cluster is tuned for one in so many targets; the words of WikiText-103 outside the shortlist are about that many."""

_FORM = "Write three numbers, such as `--batch-range 1,8,32`, or one for a fixed number of streams."


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes of one input: at least, usually (tuned for), at most."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    def record(self) -> ProfileRecord:
        """Return it as a manifest keeps it."""
        return ProfileRecord(name=self.name, min=list(self.min), opt=list(self.opt), max=list(self.max))


MAX_BATCH = 65536
"""Streams at most: beyond it the memory of the smallest model fills a GPU, and a builder ends for want of memory."""


def parse_batch_range(value: str | int | None) -> BatchRange:
    """Return the numbers of streams meant by `1,8,32` (least, usual, most), by one number (a fixed one) or by None (`DEFAULT_BATCH`).

    Raises `UsageError` for anything else, and where they are not in order.
    """
    if value is None:
        return DEFAULT_BATCH
    parts = [part.strip() for part in str(value).split(",")]
    if len(parts) not in (1, 3) or not all(part.isascii() and part.isdecimal() for part in parts):
        raise UsageError(f"`{value}` is no range of batch sizes.", remedy=_FORM)
    low, middle, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not 1 <= low <= middle <= high:
        raise UsageError(f"A range of batch sizes must rise from 1 or more, but is {low}, {middle}, {high} instead.", remedy=_FORM)
    if high > MAX_BATCH:
        raise UsageError(f"An engine for {high} streams is more than any GPU holds; {MAX_BATCH} is the most here.", remedy=_FORM)
    return BatchRange(min=low, opt=middle, max=high)


def profiles_for(signature: Signature, batch: BatchRange, tgt_len: int) -> list[Profile]:
    """Return the profile of each input, in the order of the call.

    All inputs get the same range of the batch. The rows of a tail cluster go from one (an empty cluster is padded to one) to every
    target of the largest batch.

    Args:
        signature: of the graph; where it fixes the number of streams, `batch` must be that number.
        batch: its `max` must be set; without `opt` the engine is tuned for the largest.
        tgt_len: targets per stream.

    Raises:
        UsageError: the graph takes another number of streams, or the range has no end.
    """
    if batch.max is None:
        raise UsageError("An engine takes a bounded number of streams, but the range of batch sizes has no end.", remedy=_FORM)
    low, middle, high = batch.min, batch.max if batch.opt is None else batch.opt, batch.max
    fixed = signature.inputs[0].axes[0]
    if isinstance(fixed, int) and (low, middle, high) != (fixed, fixed, fixed):
        raise UsageError(
            f"The graph takes {fixed} streams, so an engine for {low} to {high} cannot be built from it.",
            remedy=f"Use `--batch-range {fixed}`, or export the graph without `--batch-size`.",
        )
    most_rows = high * tgt_len
    usual_rows = -(-middle * tgt_len // _ROWS_SHARE)

    def shapes(axis: int | str) -> tuple[int, int, int]:
        if isinstance(axis, int):
            return (axis, axis, axis)
        return (low, middle, high) if axis == BATCH else (1, usual_rows, most_rows)

    found = []
    for spec in signature.inputs:
        axes = [shapes(axis) for axis in spec.axes]
        least, usual, most = (tuple(axis[i] for axis in axes) for i in range(3))
        found.append(Profile(name=spec.name, min=least, opt=usual, max=most))
    return found


def check_profiles(signature: Signature, profiles: Sequence[Profile]) -> None:
    """Make sure that `profiles` are shapes which the graph's inputs can all have at once.

    Raises `UsageError` where an input has none, a fixed axis is given another length, a range does not rise, or two inputs have
    different ranges for the axis they share.
    """
    by_name = {profile.name: profile for profile in profiles}
    expected = {spec.name for spec in signature.inputs}
    for what, names in (("no profile", expected - by_name.keys()), ("a profile, but is no input", by_name.keys() - expected)):
        if names:
            raise UsageError(f"`{min(names)}` has {what}.", remedy="Give the shapes of every input, and of nothing else.")
    shared: dict[str, tuple[str, tuple[int, int, int]]] = {}
    for spec in signature.inputs:
        for axis, bounds in zip(spec.axes, _bounds(spec, by_name[spec.name])):
            if isinstance(axis, int):
                if bounds != (axis, axis, axis):
                    raise UsageError(f"An axis of `{spec.name}` is fixed to {axis}, but its profile says {_text(bounds)}.")
                continue
            other, theirs = shared.setdefault(axis, (spec.name, bounds))
            if theirs != bounds:
                raise UsageError(
                    f"`{spec.name}` has another range of {axis} than `{other}`: {_text(bounds)} instead of {_text(theirs)}.",
                    remedy="Give every input the same range; TensorRT would build the engine and fail when it runs.",
                )


def _bounds(spec: TensorSpec, profile: Profile) -> list[tuple[int, int, int]]:
    if {len(profile.min), len(profile.opt), len(profile.max)} != {len(spec.axes)}:
        raise UsageError(f"`{spec.name}` has {len(spec.axes)} axes, but its profile has {len(profile.min)}.")
    bounds = list(zip(profile.min, profile.opt, profile.max))
    for low, middle, high in bounds:
        if not 0 < low <= middle <= high:
            raise UsageError(f"A range of `{spec.name}` must rise from 1 or more, but is {_text((low, middle, high))} instead.")
    return bounds


def _text(bounds: tuple[int, int, int]) -> str:
    return f"{bounds[0]}..{bounds[2]} (usually {bounds[1]})"
