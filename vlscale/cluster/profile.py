"""Options of the command line over those of a profile, which says what a cluster's jobs have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlscale import config
from vlscale.cluster.options import JobOptions, check
from vlscale.errors import ConfigError, did_you_mean


def resolve(given: Mapping[str, Any], profile: str | None, folder: Path) -> JobOptions:
    """The options: those `given`, over those of a profile (a name in `folder`, or a file).

    Raises:
        ConfigError: no such profile, an unknown key, or a value that cannot be.
    """
    tree: dict[str, Any] = config.read_yaml(find_profile(profile, folder)) if profile is not None else {}
    for each in dataclasses.fields(JobOptions):
        if each.name in tree:
            tree[each.name] = _plain(each.name, each.type, tree[each.name])
    options: JobOptions = config.build(JobOptions, {**tree, **given}, f"--cluster {profile}" if profile else "job")
    check(options)
    return options


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


def _plain(name: str, kind: Any, value: Any) -> Any:
    """As YAML is written: a number may stand for a text, 60 minutes or a version."""
    if isinstance(value, dict) and name == "environment":
        return {str(key): str(text) for key, text in value.items()}
    if isinstance(value, list):
        return [str(each) for each in value]
    is_text = str(kind).startswith("str") and isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_text else value
