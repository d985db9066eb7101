"""Options of the command line over those of a profile, which says what a cluster's jobs have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vlscale import config
from vlscale.cluster.options import JobOptions, check
from vlscale.errors import ConfigError, did_you_mean


def resolve(given: Mapping[str, Any], profile: str | None, folder: Path) -> JobOptions:
    """The options: those `given`, over those of a profile (a name in `folder`, or a file); lists of both are joined.

    Raises:
        ConfigError: no such profile, an unknown key, or a value that cannot be.
    """
    options = JobOptions()
    if profile is not None:
        options = config.build(JobOptions, _typed(_read(find_profile(profile, folder))), f"--cluster {profile}")
    given = _typed(given)
    try:
        asked: JobOptions = config.build(JobOptions, given, "job")
    except ConfigError as error:
        raise ConfigError(str(error).replace("job.", "--", 1)) from None
    values = {name: getattr(asked, name) for name in given}
    joined = {name: getattr(options, name) + value for name, value in values.items() if isinstance(value, tuple)}
    options = replace(options, **{**values, **joined})
    check(options)
    return options


def _typed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """With the type of GPUs apart from their number: `a100:4` is four of type a100, and `4` are any."""
    text = tree.get("gpus_per_node")
    if text is None:
        return dict(tree)
    kind, _, number = str(text).rpartition(":")
    return {**tree, "gpus_per_node": number, "gpu_type": kind or None}


def find_profile(profile: str, folder: Path) -> Path:
    """The file of a profile given by name or path."""
    if profile.endswith((".yaml", ".yml")) or "/" in profile:
        if not Path(profile).is_file():
            raise ConfigError(f"--cluster {profile}: no such file")
        return Path(profile)
    path = folder / f"{profile}.yaml"
    if not path.is_file():
        known = [each.stem for each in folder.glob("*.yaml")]
        raise ConfigError(f"--cluster {profile}: no such profile in {folder}{did_you_mean(profile, known)}")
    return path


def _read(path: Path) -> dict[str, Any]:
    """Its keys, with every value a text as it is written: YAML would take 24:00:00 for the number 86400."""
    try:
        tree = yaml.BaseLoader(path.read_text()).get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} should hold 'key: value' lines (got {type(tree).__name__})")
    return {key: value for key, value in tree.items() if value not in ("", "null")}
