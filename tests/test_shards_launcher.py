"""`launchers/shards.py` as a user types it: what it prints, what it leaves, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launchers import shards as launcher
from tests.runs import ROOT, launch
from tests.shard_files import png, sample, write_samples, write_tar
from tests.store_servers import files, serving
from tests.test_formats import picture_arrays, write_pictures
from tests.unlucky import Unlucky, Unreadable
from vlscale.data import samples
from vlscale.data.formats import FORMATS
from vlscale.data.making.write import Layout, make
from vlscale.data.shards import Shards
from vlscale.errors import DONE, ConfigError, DataError
from vlscale.types import Inputs

Printed = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Printed:
    """Runs a command that is to succeed; gives what it printed."""
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))

    def run(*argv: object) -> str:
        assert launcher.main([str(word) for word in argv]) == DONE
        return capsys.readouterr().out

    return run


def test_from_a_folder_to_shards_that_training_reads(tmp_path: Path, printed: Printed) -> None:
    source = write_pictures(tmp_path / "in", 5)
    np.savez(source / "p0.npz", **picture_arrays(1))
    (source / "p1.png").write_bytes(b"no picture")
    said = printed("make", "--from", "folder", "--source", source, "--to", tmp_path / "out", "--samples_per_shard", 3)
    assert said.splitlines()[0].startswith("4 samples in 2 shard(s)")
    assert said.splitlines()[1:] == [
        f"1 broken and left out, listed in {tmp_path}/out/data.broken.jsonl, such as",
        "  p1: it is not a JPEG, PNG or WebP picture",
    ]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2
    out = tmp_path / "out" / "*.tar"
    assert [line.split()[0] for line in printed("index", out).splitlines()] == ["3", "1", "4"]
    said = printed("verify", out)
    assert "2 shard(s) with the checksum that SHA256SUMS tells" in said
    assert "no problem found" in said
    files = ("--json", tmp_path / "d.json", "--html", tmp_path / "d.html")
    assert "samples                  4" in printed("describe", out, *files)
    assert json.loads((tmp_path / "d.json").read_text())["captions"] == 4
    assert "picture number 0" in (tmp_path / "d.html").read_text()
    assert "described                2" in printed("describe", out, "--limit", 2)
    shards = Shards(str(out))
    assert samples.picture(shards, 0).shape == (24, 24, 3)
    assert samples.sentences(shards, 0)[0].text == "picture number 0"


def test_regions_that_training_reads(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "in").mkdir()
    np.savez(tmp_path / "in" / "a.npz", **picture_arrays(1))
    (tmp_path / "in" / "a.json").write_text('{"qa": [{"q": "what?", "a": "red"}]}')
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n")
    printed(
        *("make", "--from", "npz", "--source", tmp_path / "in", "--to", tmp_path / "out", "--prefix", "train"),
        *("--dtype", "float32", "--class_names", tmp_path / "names.txt"),
    )
    shards = Shards(tmp_path / "out" / "train-000000.tar")
    wanted = frozenset({"classes", "attribute_confidence"})
    reads = Inputs(0, 20, True, regions=3, feats=6, boxes=4, classes=1600, geometry="corners")
    found = samples.regions(shards, 0, reads, wanted)
    np.testing.assert_array_equal(found.feats, picture_arrays(1)["features"][:3])
    np.testing.assert_array_equal(found.fields["classes"], picture_arrays(1)["objects_id"][:3])
    assert samples.sentences(shards, 0, questions=True)[0].answer == "red"
    assert len(samples.tags(shards, 0).split()) == 4


def test_shards_on_a_web_server(tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    local = write_samples(tmp_path / "s", 6, 3, {})
    printed("verify", local, "--write_checksums")
    with serving(files(tmp_path)) as store:
        shards = f"{store.url}/s/part-{{000..001}}.tar?signature=secret"
        assert "6  samples; indexes: 0 were there, 2 new, 0 stale" in printed("index", shards)
        said = printed("verify", shards)
        assert "2 shard(s) with the checksum" in said
        assert "no problem found" in said
        assert "captions                 6" in printed("describe", shards, "--html", tmp_path / "d.html")
        assert "secret" not in (tmp_path / "d.html").read_text()
        (tmp_path / "s" / "SHA256SUMS").write_text(f"{'0' * 64}  part-000.tar\n")
        with pytest.raises(DataError, match="1 of checksum"):
            launcher.main(["verify", shards])


def test_what_a_recipe_says_of_stores_may_be_said_here(tmp_path: Path, printed: Printed) -> None:
    write_samples(tmp_path / "s", 3, 3, {})
    command = f"pipe:cat {tmp_path}/s/part-000.tar"
    with pytest.raises(ConfigError, match=r"write data\.pipe=true if you trust it"):
        launcher.main(["verify", command])
    for name, says in (
        ("verify", "no problem found"),
        ("describe", "captions                 3"),
        ("index", "         3"),
    ):
        assert says in printed(name, command, "data.pipe=true", f"data.cache={tmp_path}/c")
    assert "no problem found" in printed("verify", command, "--quick", "data.pipe=true")
    with pytest.raises(ConfigError, match=r"data\.pipe"):
        launcher.main(["verify", command, "data.pipe=perhaps"])
    with pytest.raises(ConfigError, match=r"'data\.batch=3' is no option here"):
        launcher.main(["verify", command, "--quick", "data.batch=3"])


def test_index_says_what_was_stale_and_goes_on_after_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "cache"))
    pattern = write_samples(tmp_path, 6, 2, {})
    for wanted in ("0 were there, 3 new, 0 stale", "3 were there, 0 new, 0 stale"):
        assert launcher.main(["index", pattern]) == DONE
        assert f"         6  samples; indexes: {wanted}\n" in capsys.readouterr().out
    write_tar(tmp_path / "part-001.tar", sample(2))
    (tmp_path / "part-002.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="1 of 3 shards cannot be read; they are named above"):
        launcher.main(["index", pattern])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"         1  {tmp_path}/part-001.tar  (its index was stale)"
    assert f"shard {tmp_path}/part-002.tar is not a readable tar file" in lines[2]
    assert lines[3] == "         3  samples; indexes: 1 were there, 0 new, 1 stale"


@pytest.mark.parametrize("command", launcher.COMMANDS)
def test_help_needs_no_torch(command: str) -> None:
    """What takes long to import is imported when it is needed."""
    code = (
        "import sys\nfrom launchers import shards\n"
        f"try: shards.main(['{command}', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 3


def test_verify_ends_with_3_and_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_samples(tmp_path, 3, 2, {1: sample(1, caption=""), 2: sample(2, picture=png(2)[:90])})
    with pytest.raises(DataError, match=r"2 problem\(s\) in the shards: 1 of caption, 1 of picture") as raised:
        launcher.main(["verify", shards, "--json", str(tmp_path / "v.json")])
    assert raised.value.exit_code == 3
    assert "part-001.tar: s002: png:" in capsys.readouterr().out
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["counts"] == {"caption": 1, "picture": 1}
    assert [problem["key"] for problem in report["problems"]] == ["s001", "s002"]
    assert report["problems"][0]["reason"].startswith("a caption in 'json' is empty")


def test_shards_cannot_write_to_the_terminal_as_they_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.dumps({"caption": "red \ud800", "objects": 1, "tags": ["\x1b[2J", "\u202e", "été"]}).encode()
    path = write_tar(tmp_path / "a.tar", [("k\x1b]0;title\x07.png", png(1)), ("k\x1b]0;title\x07.json", record)])
    with pytest.raises(DataError):
        launcher.main(["verify", str(path)])
    assert launcher.main(["describe", str(path), "--json", str(tmp_path / "d.json")]) == DONE
    said = capsys.readouterr().out
    assert "été" in said
    assert said.replace("\n", "").isprintable()
    assert json.loads((tmp_path / "d.json").read_text())["samples"] == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["mak"], "no command 'mak'; did you mean 'make'?"),
        (["make", "--from", "folders", "--source", "a", "--to", "b"], "no format 'folders'; did you mean 'folder'?"),
        (["make", "--from", "folder", "--to", "b"], "the following arguments are required: --source"),
        (["make", "--from", "folder", "--source", ".", "--to", "b", "--dtpye=x"], "did you mean '--dtype'?"),
        (["make", "--from", "folder", "--source", ".", "--to", "b", "--dtype", "int8"], "write float16 or float32"),
        (["make", "--from", "folder", "--source", ".", "--to", "b", "--prefix", "a/b"], "--prefix 'a/b' cannot start"),
        (["verify", "x.tar", "--json"], "argument --json: expected one argument"),
        (["verify", "x.tar", "data.cach=foo"], "'data.cach=foo' is no option here; did you mean 'data.cache'?"),
        (["verify", "data.cache=foo"], "write which shards, too"),
        (["verify", "x.tar", "--json", "/nope/x"], "--json /nope/x cannot be written: there is no folder /nope"),
        (["describe", "x.tar", "--html", "/nope/x"], "--html /nope/x cannot be written: there is no folder /nope"),
        (["describe", "x.tar", "--html", "tests"], "--html tests cannot be written: it is a folder"),
        (["describe", "x.tar", "--seed", "-4"], "--seed is -4; write 0 or more"),
        (["make", "--from", "folder", "--source", ".", "--too", "b"], "no option --too; did you mean '--to'?"),
        ([], "write a command: make, index, verify, describe, regions"),
    ],
)
def test_mistakes_in_words(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        launcher.main(argv)
    assert says in str(raised.value)


def test_problems_that_are_shown_are_of_every_kind_and_tell_the_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    special = {i: sample(i, caption="") for i in range(20)}
    shards = write_samples(tmp_path, 24, 24, {**special, 20: sample(20, picture=b"x"), 21: [("s021.txt", b"\xff")]})
    missing = tmp_path / "absent.tar"
    missing.write_bytes(b"no tar at all")
    with pytest.raises(DataError, match=r"24 problem\(s\)"):
        launcher.main(["verify", str(missing), shards])
    shown = capsys.readouterr().out.splitlines()[1:]
    assert len(shown) == launcher.SHOWN + 1
    assert shown[0].count("absent.tar") == 1
    assert "s000: a caption in 'json' is empty; " in shown[1]
    assert shown[1].endswith(" (byte 3072)")
    assert sum("s021: txt: " in line for line in shown) == 1
    assert any("s020: png: " in line for line in shown)
    assert "... and 14 more" in shown[-1]


def test_the_program_itself(tmp_path: Path) -> None:
    for argv, code, says in (
        (["index", "nothing.tar"], 3, "shards.py: no shard matches 'nothing.tar'"),
        (["make", "--from", "npz", "--source", str(tmp_path), "--to", "b"], 3, "holds no npz file"),
    ):
        done = launch("shards", *argv)
        assert (done.returncode, done.stdout) == (code, "")
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_has_enough_hears_no_complaint(tmp_path: Path) -> None:
    shards = write_samples(tmp_path, 3, 3, {})
    argv = [sys.executable, "launchers/shards.py", "describe", shards]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_lists_the_formats() -> None:
    done = launch("shards", "make", "--help")
    assert done.returncode == DONE
    assert all(name in done.stdout for name in FORMATS)


@pytest.mark.parametrize(
    ("source", "processes", "says"),
    [(Unlucky(), 2, "write fewer --processes"), (Unreadable(), 1, "Permission denied")],
)
def test_what_ends_the_work_leaves_nothing_behind(tmp_path: Path, source: Any, processes: int, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=says):
        make(source, Layout(tmp_path, "data", processes=processes))
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - began < 30
