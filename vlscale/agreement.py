"""What all ranks must hold alike, or learn from one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from vlscale import distributed
from vlscale.errors import CheckpointError, TrainingError, VlscaleError, differences

T = TypeVar("T")


def by_rank_0(make: Callable[[], str]) -> str:
    """What rank 0 makes, on every rank; its mistake is every rank's, so that all end with the same code."""
    text, failure = "", None
    if distributed.rank() == 0:
        try:
            text = make()
        except VlscaleError as error:
            failure = error
    code, message = distributed.from_rank_0(f"{failure.exit_code} {failure}" if failure else "0 ").split(" ", 1)
    if code != "0":
        kinds = {str(kind.exit_code): kind for kind in VlscaleError.__subclasses__()}
        raise failure or kinds[code](message)
    return distributed.from_rank_0(text)


def same_settings(name: str, settings: Mapping[str, str]) -> None:
    """Check that every rank was started with the same settings.

    Raises:
        TrainingError: they differ; names the ranks and the settings.
    """
    everyone: list[Any] = distributed.gather_objects(dict(settings))
    if any(other != everyone[0] for other in everyone):
        raise TrainingError(f"{name} differs: {differences(everyone)}; start every rank the same way")


def together(work: Callable[[], T]) -> T:
    """What `work` gives, if it fails on no rank; else the CheckpointError of the lowest rank that failed."""
    made, failure = None, None
    try:
        made = work()
    except CheckpointError as error:
        failure = type(error), str(error)
    everyone: list[Any] = distributed.gather_objects(failure)
    for kind, message in filter(None, everyone):
        raise kind(message)
    return cast(T, made)
