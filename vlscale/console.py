"""What every launcher does alike: arguments, one sentence for a user's mistake, the right exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vlscale.cluster import environment
from vlscale.errors import CheckpointError, ConfigError, DataError, VlscaleError, did_you_mean

if TYPE_CHECKING:
    from vlscale.data.storage.stores import StoreOptions

STORE_KEYS = tuple(f"data.{name}" for name in ("cache", "cache_gigabytes", "store_patience", "store_timeout", "pipe"))
CONSEQUENCE = 10.0  # seconds for the launcher to learn which rank ended first
UNHEARD = 141  # as shells say of a closed pipe
FAREWELL = 10.0  # seconds for leaving the process group, which may hang
LOST = re.compile("[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|communicator was aborted")


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
    hidden = [option for each in parser._actions if each.help == argparse.SUPPRESS for option in each.option_strings]
    if not {"-h", "--help"} & set(argv):  # before the parser misses a required option that is only misspelt
        _check_options([word for word in argv if word.startswith("--") and word != "--"], options, hidden)
    arguments, rest = parser.parse_known_args(argv)
    _check_options([word for word in rest if word.startswith("-")], options, hidden)
    for word in rest:
        if "=" not in word:
            raise ConfigError(f"'{word}' is not an override; write key.path=value, e.g. data.batch=64")
    arguments.overrides = rest
    return arguments


def _check_options(words: Iterable[str], options: Sequence[str], hidden: Sequence[str]) -> None:
    for name in (word.split("=")[0] for word in words):
        if name not in options:
            raise ConfigError(f"no option {name}{did_you_mean(name, set(options) - set(hidden))}")


def shards_argument(parser: argparse.ArgumentParser) -> None:
    """SHARDS, for launchers that work on some."""
    text = (
        f"tar files, URLs, globs, or x-{{000..012}}.tar; how stores are asked, as in a recipe: {', '.join(STORE_KEYS)}"
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help=text)


def take_stores(options: argparse.Namespace) -> None:
    """Of SHARDS and overrides, the words that say how stores are asked become `stores`: StoreOptions, or None.

    Raises:
        ConfigError: another word of `data.`, or no shards beside them.
    """
    words = [*options.shards, *options.overrides]
    said = [word for word in words if re.match(r"data\.\w+=", word)]
    options.shards, options.overrides = (
        [word for word in some if word not in said] for some in (options.shards, options.overrides)
    )
    for word in said:
        if (key := word.partition("=")[0]) not in STORE_KEYS:
            raise ConfigError(f"'{word}' is no option here{did_you_mean(key, STORE_KEYS)}")
    if not options.shards:
        raise ConfigError("write which shards, too: tar files, URLs or globs")
    options.stores = _stores(said)


def _stores(said: Iterable[str]) -> StoreOptions | None:
    from vlscale import config
    from vlscale.data.options import DataConfig

    tree: dict[str, Any] = {}
    for word in said:
        config.apply_override(tree, word)
    if not tree:
        return None
    data: DataConfig = config.build(DataConfig, tree["data"], "data")
    return data.stores()


def no_overrides(arguments: argparse.Namespace) -> None:
    """For launchers whose settings come from a run.

    Raises:
        ConfigError: there are `key=value` words all the same.
    """
    if arguments.overrides:
        raise ConfigError(f"'{arguments.overrides[0]}' cannot be changed here; the run's own configuration counts")


def run(main: Callable[[list[str]], int], argv: list[str], *, ranks: bool = False) -> NoReturn:
    """Call `main` and end the process with what it returns. `ranks`: tasks that srun starts are ranks of one run.

    A `VlscaleError` becomes one sentence on stderr and its exit code; any other exception is a mistake of ours, with
    its traceback and exit code 1. A rank that fails because another one has ended lets that one speak first. What
    prints more than somebody wants to read (`| head`) ends without a word.
    """
    os.umask(os.umask(0o077) | 0o002)  # nothing that we write is writable by everybody
    try:
        if ranks:
            environment.adopt()
        code = main(argv)
        sys.stdout.flush()
    except VlscaleError as error:
        _say_once(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130  # as a shell shows it
    except Exception as error:
        code = 1
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = UNHEARD
        elif not (_is_consequence(error) and _others_speak(error)):
            sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(code)


def _nobody_reads() -> bool:
    """Whether what is printed goes nowhere: another pipe may have broken."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # an end that is gone is told anyway
    return bool(output.poll(0))


def _say_once(error: VlscaleError) -> None:
    """All ranks find the same mistake, so one alone says it, before another rank's end ends the job."""
    rank = int(os.environ.get("RANK", "0"))
    first = rank == 0 or not isinstance(error, (ConfigError, DataError, CheckpointError))
    if "torch" in sys.modules:
        from vlscale import distributed

        if distributed.world_size() > 1:
            first = distributed.first_to_say(str(error))
    if first:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)


def check_place(option: str, path: Path | None) -> None:
    """ConfigError for a file that cannot be written, before the work that it is to hold."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConfigError(
            f"{option} {path} cannot be written: there is no folder {path.parent}; make it, or write another"
        )
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        reason = "it is a folder" if path.is_dir() else "its rights forbid it"
        raise ConfigError(f"{option} {path} cannot be written: {reason}; write a path that can")


def write(option: str, path: Path, text: str) -> None:
    """UTF-8, in which half a character of somebody's json or file name becomes a question mark. ConfigError if not."""
    try:
        path.write_bytes(text.encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written ({error.strerror}); write a path that can") from error


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """The figures of `--json FILE`, if it was asked for."""
    if path is not None:
        write("--json", path, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """Print what others have written, which may not write to the terminal as it likes."""
    from vlscale.data.samples import printable

    print(printable(text))


def _is_consequence(error: BaseException) -> bool:
    """Whether another rank has ended, seen by its closed connection."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def _others_speak(error: Exception) -> bool:
    """Whether the launcher has told us to stop, for another rank's end; else it ends us here, or nobody else failed."""
    from vlscale import stop

    rank, found = os.environ.get("RANK", "0"), LOST.search(str(error))
    said = f"rank {rank} ends too: it lost another rank ({found and found.group()})"
    print(said, file=sys.stderr, flush=True)
    until = time.monotonic() + CONSEQUENCE
    while not (told := stop.requested()) and time.monotonic() < until:
        time.sleep(0.1)
    return told


def _leave(code: int) -> NoReturn:
    """End the process with the code, whatever threads or half-made collectives are left behind."""
    if "torch" in sys.modules and code == 0:
        from vlscale import distributed, stop

        stop.within(FAREWELL, distributed.shutdown)
    os._exit(code)
