"""How every command ends: the right code and words, at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.runs import ROOT, environment
from vlscale import console

PROGRAM = """
import os, sys, threading, time
from vlscale import console, errors

def main(argv):
    threading.Thread(target=time.sleep, args=(600,)).start()  # what a normal exit would wait for
    {body}

console.run(main, [])
"""


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("return 75", 75, ""),
        ("raise errors.DataError('no shards')", 3, "-c: no shards\n"),
        ("raise ValueError('our mistake')", 1, "ValueError: our mistake\n"),
        ("raise KeyboardInterrupt", 130, ""),
        (
            "from vlscale import distributed; distributed.shutdown = lambda: time.sleep(600); "
            "console.FAREWELL = 0.1; return 0",
            0,
            "",
        ),
        ("os.mkdir(os.environ['NEW']); return os.stat(os.environ['NEW']).st_mode & 0o7", 0o5, ""),
    ],
)
def test_a_command_ends_at_once(body: str, code: int, says: str, tmp_path: object) -> None:
    command = ["bash", "-c", 'umask 0; exec "$0" -c "$1"', sys.executable, PROGRAM.format(body=body)]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), "NEW": f"{tmp_path}/new"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(says)
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("body", "code", "traceback"),
    [
        ("for n in range(100_000): print(n)", 141, False),
        ("print(0); time.sleep(1); return 0", 141, False),  # noticed at the end
        ("sys.stdout = sys.stderr; raise BrokenPipeError('of a worker')", 1, True),
    ],
)
def test_what_nobody_reads_ends_without_a_word(body: str, code: int, traceback: bool) -> None:
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.close()
        said = program.stderr.read().decode()
    assert program.returncode == code, said
    assert ("Traceback" in said) == traceback
    assert traceback or not said


@pytest.mark.parametrize(
    ("error", "ranks", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), 2, True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), 2, True),
        (RuntimeError("Connection reset by peer"), 1, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, False),
        (ConnectionResetError("Connection reset by peer"), 2, False),  # of a store of shards
    ],
)
def test_the_end_of_another_rank_is_told_from_a_mistake(
    error: Exception, ranks: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert console._is_consequence(error) == expected
