"""A growing file, watched."""

from __future__ import annotations

from pathlib import Path

from vlscale.cluster.follow import Tail


def test_whole_lines_alone_are_shown_once(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text("step 1\nstep")
    assert tail.lines() == ["step 1"]
    assert tail.lines() == []
    with path.open("a") as file:
        file.write(" 2\nstep 3\n")
    assert tail.lines() == ["step 2", "step 3"]


def test_what_was_there_before_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("of an earlier start\n")
    tail = Tail(path)
    with path.open("a") as file:
        file.write("step 5\n")
    assert tail.lines() == ["step 5"]


def test_a_file_that_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("a long line of an earlier start\n")
    tail = Tail(path)
    path.write_text("step 1\n")
    assert tail.lines() == ["step 1"]
    path.unlink()
    assert tail.lines() == []
    path.write_text("")
    assert tail.lines() == []


def test_letters_that_are_cut_in_half(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes("grö".encode()[:-1])
    tail = Tail(tmp_path / "log.txt")
    tail.place = 0
    assert tail.lines() == []
    path.write_bytes("größe\n".encode() + b"\xff\n")
    assert tail.lines() == ["größe", "\ufffd"]
