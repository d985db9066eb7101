"""Break runs, resume them, and hold them to the bit to undisturbed ones.

    python -m tests.faults --trials 200 --seed 0
    python -m tests.faults --only 137              # one trial again, by its seed

Everything about a trial follows from its seed (and from --zero, --ranks and --recipes, where they are given):
the recipe, the ZeRO stage, the number of ranks, what goes wrong and when. Kills at a point of time are as exact
as the machine's clock; those at a step or at a file operation hit the same place again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.spawn import CPU_ONLY

os.environ.update(CPU_ONLY)  # before any library looks: those of several threads cannot be forked

from tests.faults import ranks, setting, trial
from tests.faults.trial import Bench, Outcome


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="how many; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; default %(default)s")
    parser.add_argument("--only", type=int, default=None, metavar="SEED", help="one trial")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(setting.RECIPES), choices=list(setting.RECIPES))
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; default %(default)s")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="one line for each trial")
    parser.add_argument("--keep", type=Path, default=None, metavar="DIR", help="where failed trials stay")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the trials; 0 if every one ended identical to the bit."""
    arguments = parse(argv)
    ranks.warm()
    seeds = [arguments.only] if arguments.only is not None else range(arguments.seed, arguments.seed + arguments.trials)
    trials = [trial.draw(seed, arguments.recipes, arguments.zero, arguments.ranks) for seed in seeds]
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=arguments.keep))
    parts = dealt(trials, max(1, arguments.jobs))
    records: list[dict[str, object]] = []
    try:
        records = perform(parts[0], folder / "0") if len(parts) == 1 else together(parts, folder)
    finally:
        if not any(record["reason"] for record in records) and len(records) == len(trials):
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    return summary(records, len(trials), argv, folder)


def dealt(trials: Sequence[trial.Trial], jobs: int) -> list[list[trial.Trial]]:
    """Trials of one setting stay together, for they share the undisturbed run."""
    parts: list[list[trial.Trial]] = [[] for _ in range(min(jobs, len(trials)))]
    places: dict[setting.Setting, int] = {}
    for each in trials:
        place = places.setdefault(each.setting, len(places) % len(parts))
        parts[place].append(each)
    return [part for part in parts if part]


def together(parts: Sequence[Sequence[trial.Trial]], folder: Path) -> list[dict[str, object]]:
    """Each part in a process of its own."""
    folders = [folder / str(number) for number in range(len(parts))]
    children = []
    for part, where in zip(parts, folders, strict=True):
        pid = os.fork()
        if not pid:
            perform(part, where)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    files = [where / "outcomes.jsonl" for where in folders]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda record: record["seed"])


def perform(trials: Sequence[trial.Trial], folder: Path) -> list[dict[str, object]]:
    """One after the other, each told when it is over."""
    folder.mkdir()
    bench = Bench(folder)
    records = []
    with (folder / "outcomes.jsonl").open("w", buffering=1) as file:
        for each in trials:
            outcome = bench.perform(each)
            print(line(outcome), flush=True)
            records.append(record(outcome))
            file.write(json.dumps(records[-1]) + "\n")
    return records


def line(outcome: Outcome) -> str:
    """A trial in a line, or as many as its failure takes."""
    result = f"FAILED: {outcome.reason}" if outcome.reason else "identical"
    skipped = f" ({outcome.skipped})" if outcome.skipped else ""
    ends = ", ".join(outcome.ends)
    return f"seed {outcome.trial.seed}  {outcome.trial}  ->  {ends}: {result}{skipped}  {outcome.seconds:.1f} s"


def record(outcome: Outcome) -> dict[str, object]:
    """A trial for the JSON file."""
    drawn = outcome.trial
    return {
        "seed": drawn.seed,
        "setting": str(drawn.setting),
        "starts": [[fault.record() for fault in start] for start in drawn.starts],
        "ends": outcome.ends,
        "kills": outcome.kills,
        "reason": outcome.reason,
        "skipped": outcome.skipped,
        "seconds": round(outcome.seconds, 2),
    }


def summary(records: Sequence[dict[str, object]], wanted: int, argv: Sequence[str], folder: Path) -> int:
    """Say how many were identical; the exit code."""
    failed = [record["seed"] for record in records if record["reason"]]
    kinds = Counter(fault["kind"] for record in records for start in record["starts"] for fault in start)  # type: ignore[attr-defined]
    kills = sum(int(str(record["kills"])) for record in records)
    settings = {str(record["setting"]) for record in records}
    seeds = f"{records[0]['seed']} to {records[-1]['seed']}" if records else "none"
    print(
        f"\n{len(records)} of {wanted} trials (seeds {seeds}), {len(settings)} settings, {kills} kills that hit; drawn:"
    )
    print("  " + ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()))
    for reason, number in Counter(str(record["skipped"]) for record in records if record["skipped"]).items():
        print(f"  not tried in {number}: {reason}")
    if failed or len(records) < wanted:
        again = " ".join(word for word in argv if word != "--only")
        print(
            f"FAILED: {len(failed)}, seeds {failed}; in {folder}; again: python -m tests.faults --only SEED [{again}]"
        )
        return 1
    print("all bit-identical to their undisturbed runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
