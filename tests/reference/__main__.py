"""`python -m tests.reference DIR [--json FILE]`: run our code on a folder of reference tensors.

Exit code 0: every tensor within tolerance; 1: some is not; 2: no such system or folder.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch

from tests.reference.compare import Folder, Report, judge
from vlscale.errors import ConfigError, VlscaleError, did_you_mean

SYSTEMS = (
    "albef",
    "albef_retrieval",
    "cbt",
    "clip",
    "cvlp",
    "hero",
    "howto100m",
    "lxmert",
    "milnce",
    "moco",
    "oscar",
    "oscar_plus",
    "soho",
    "tcl",
    "tcl_retrieval",
    "uniter",
    "univl",
    "videobert",
    "vilbert",
    "vlp",
)  # one module of this package each, with `run(folder) -> {outputs file: {name: tensor}}`


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("dir", help="folder of reference tensors; its name is the system's")
    parser.add_argument("--json", help="write the comparison to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are tiny
    try:
        report = run(Path(os.path.abspath(options.dir)))
    except VlscaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    show(report)
    if options.json:
        Path(options.json).write_text(report.as_json() + "\n")
    return 0 if report.ok else 1


def run(path: Path) -> Report:
    """Compute with our code, then compare.

    Raises:
        ConfigError: the folder's name is no system that we have, or it is no folder of reference tensors.
    """
    system = path.name
    if system not in SYSTEMS:
        raise ConfigError(f"no reference runner for system '{system}'{did_you_mean(system, SYSTEMS)}")
    folder = Folder.open(path)
    computed = importlib.import_module(f"tests.reference.{system}").run(folder)
    return judge(folder, system, computed)


def show(report: Report) -> None:
    """One line per tensor, then a summary."""
    width = max((len(row.name) for row in report.compared), default=0)
    for row in report.compared:
        word = "ok" if row.ok else "FAILS"
        print(f"{row.name:{width}}  max abs {row.max_abs:.2e}  rel {row.rel:.2e}  {word}")
    for left in report.not_compared:
        print(f"{left['name']:{width}}  not compared: {left['why']}")
    failed = sum(not row.ok for row in report.compared)
    worst = max((row.max_abs for row in report.compared), default=0.0)
    print(
        f"{report.system}: {len(report.compared)} compared, {failed} outside tolerance, "
        f"{len(report.not_compared)} not compared, largest absolute difference {worst:.2e}: "
        f"{'ok' if report.ok else 'FAILED'}"
    )


if __name__ == "__main__":
    sys.exit(main())
