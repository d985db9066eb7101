"""What every launcher does alike: arguments, one sentence for a user's mistake, the right exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from vlscale.errors import CheckpointError, ConfigError, DataError, VlscaleError, did_you_mean


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `--help` lists what there is")


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser that takes `key=value` overrides and what launchers add (`--local_rank=N`)."""
    out = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    out.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # given by `deepspeed`
    return out


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parsed options; `overrides` is the list of `key=value` words.

    Raises:
        ConfigError: an unknown option or a word that is no override.
    """
    options = [option for action in parser._actions for option in action.option_strings]
    if not {"-h", "--help"} & set(argv):  # before the parser misses a required option that is only misspelt
        _check_options([word for word in argv if word.startswith("--") and word != "--"], options)
    arguments, rest = parser.parse_known_args(argv)
    _check_options([word for word in rest if word.startswith("-")], options)
    for word in rest:
        if "=" not in word:
            raise ConfigError(f"'{word}' is not an override; write key.path=value, e.g. data.batch=64")
    arguments.overrides = rest
    return arguments


def _check_options(words: Iterable[str], options: Sequence[str]) -> None:
    for name in (word.split("=")[0] for word in words):
        if name not in options:
            raise ConfigError(f"no option {name}{did_you_mean(name, options)}")


def no_overrides(arguments: argparse.Namespace) -> None:
    """For launchers whose settings come from a run.

    Raises:
        ConfigError: there are `key=value` words all the same.
    """
    if arguments.overrides:
        raise ConfigError(f"'{arguments.overrides[0]}' cannot be changed here; the run's own configuration counts")


def run(main: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Call `main`; a `VlscaleError` becomes one sentence on stderr and its exit code."""
    try:
        code = main(argv)
    except VlscaleError as error:
        _say_once(error)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(code)


def _say_once(error: VlscaleError) -> None:
    """Every rank finds a wrong command line, so rank 0 alone says it, before another rank's end ends the job."""
    rank = int(os.environ.get("RANK", "0"))
    found_by_all = isinstance(error, (ConfigError, DataError, CheckpointError))
    if rank and found_by_all:
        time.sleep(3)
        return
    print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """End the process with the code, whatever threads or half-made collectives are left behind."""
    if "torch" in sys.modules:
        from vlscale import distributed

        if code == 0:
            distributed.shutdown()
    os._exit(code)
