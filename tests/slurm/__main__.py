"""A Slurm cluster to try things on: it lasts as long as a command, or a shell, and leaves nothing behind.

    python -m tests.slurm                                  # a shell with SLURM_CONF set
    python -m tests.slurm --nodes 2 -- srun -N2 hostname   # one command

Needs root and the Debian packages slurm-wlm, slurmdbd, munge and mariadb-server. Partitions: normal, and urgent,
whose jobs preempt and requeue those of normal. Every node claims 4 CPUs and 8 GB.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from tests.slurm.cluster import Cluster, ClusterError

TRY = """\
A Slurm cluster of {nodes} nodes, until this shell ends. For example:
  sinfo
  srun -N{nodes} hostname
  python slurm/submit.py --nodes {nodes} --follow -- --ds_config ds_configs/zero2.json --recipe quickstart steps=40
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4, help="how many; default %(default)s")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="default: an interactive shell")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """The command's exit code; 2 if there is no cluster."""
    arguments = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # through Cluster.stop
    command = arguments.command or [os.environ.get("SHELL", "/bin/bash")]
    try:
        with Cluster(arguments.nodes) as cluster:
            if not arguments.command:
                print(TRY.format(nodes=arguments.nodes), flush=True)
            return subprocess.run(command, env=cluster.environment(), check=False).returncode
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
