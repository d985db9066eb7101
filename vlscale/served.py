"""Which family, objectives and tasks go together: checked when a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlscale.errors import ConfigError

if TYPE_CHECKING:
    from vlscale.families.base import Family
    from vlscale.model import Task
    from vlscale.objectives.base import Objective


def check_served(name: str, needs: frozenset[str], family: Family) -> None:
    """ConfigError if an objective needs something that the family does not offer."""
    missing = needs - family.offers
    if missing:
        raise ConfigError(
            f"objective '{name}' needs {sorted(needs)}, but family "
            f"'{type(family).__name__}' offers {sorted(family.offers)}; "
            f"take it out of objectives or choose a family that offers {sorted(missing)}"
        )


def check_tasks(tasks: Mapping[str, Task], objectives: Mapping[str, Objective], family: Family) -> None:
    """ConfigError if a task names an objective that there is not, or reads one modality where both are needed."""
    for task_name, task in tasks.items():
        for name in task.objectives:
            if name not in objectives:
                raise ConfigError(
                    f"tasks.{task_name}.objectives names '{name}', which is not under objectives "
                    f"({', '.join(objectives)})"
                )
        _check_alone(task_name, task, objectives, family)


def _check_alone(name: str, task: Task, objectives: Mapping[str, Objective], family: Family) -> None:
    """ConfigError if a task reads one modality, and the family or an objective cannot do without the other."""
    if task.modality == "both":
        return
    if "alone" not in family.offers:
        raise ConfigError(
            f"tasks.{name}.modality is {task.modality}, but family '{type(family).__name__}' reads texts and pictures "
            f"together; leave it out"
        )
    for objective in task.objectives:
        if objectives[objective].alone != task.modality:
            raise ConfigError(
                f"tasks.{name} reads the modality {task.modality} alone, but objectives.{objective} needs the other; "
                f"move it to another task"
            )
