"""What CONTRIBUTING.md tells a newcomer to write, written and run as it stands there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, TINY, environment, metrics


def test_a_new_objective_is_one_file_and_one_line(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(
        r"A whole one, `(vlscale/objectives/(\w+)\.py)`.*?```python\n(.*?)```.*?```yaml\n(.*?)```", text, re.S
    )
    assert found is not None
    file, name, source, line = found.groups()
    assert name in line
    for part in ("vlscale", "launchers", "ds_configs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / file).write_text(source)
    command = [
        sys.executable,
        "launchers/pretrain.py",
        "--out",
        "run",
        *TINY,
        "steps=10",
        f"objectives.{name}.weight=0.5",
    ]
    subprocess.run(command, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(tmp_path)}, check=True, timeout=100)
    losses = [line[f"loss/{name}"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 10
    assert 0 < sum(losses[-3:]) / 3 < losses[0] < 1  # ln 2 at the start
