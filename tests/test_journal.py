"""The journal of a run with real devices: what was appended is there, whatever happened to the file's end."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgmr_plugin.errors import RunLogError
from fedgmr_plugin.protocol.journal import Entry, Journal, read

heads = st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3)
entries = st.lists(st.builds(Entry, heads, st.binary(max_size=40)), max_size=6)


def written(folder: Path, batches: list[list[Entry]]) -> Path:
    path = folder / "journal"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for batch in batches:
            journal.append(batch)
    return path


@given(st.lists(entries, max_size=3))
def test_what_was_appended_is_read(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Entry]]
) -> None:
    path = written(tmp_path_factory.mktemp("j"), batches)
    assert list(read(path)) == [entry for batch in batches for entry in batch]


def test_a_journal_that_was_never_begun_is_empty(tmp_path: Path) -> None:
    assert list(read(tmp_path / "none")) == []


def test_a_torn_end_is_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = [Entry({"n": n}, bytes([n]) * 9) for n in range(3)]
    content = written(tmp_path, [whole]).read_bytes()
    ends = [len(written(tmp_path, [whole[:n]]).read_bytes()) for n in range(4)]
    path = tmp_path / "torn"
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        kept = max(n for n in range(4) if ends[n] <= length)
        assert list(read(path)) == whole[:kept]
        with Journal(path) as journal:
            journal.append([Entry({"new": 1})])
        assert list(read(path)) == [*whole[:kept], Entry({"new": 1})]


def test_an_end_of_zeros_is_torn(tmp_path: Path) -> None:
    path = written(tmp_path, [[Entry({"n": 1}, b"x")]])
    with path.open("ab") as file:
        file.write(bytes(500))
    assert list(read(path)) == [Entry({"n": 1}, b"x")]


def test_damage_before_the_last_entry_is_an_error_whatever_byte_it_hits(tmp_path: Path) -> None:
    content = written(tmp_path, [[Entry({"n": 1}, b"first"), Entry({"n": 2}, b"second")]]).read_bytes()
    first = len(written(tmp_path, [[Entry({"n": 1}, b"first")]]).read_bytes())
    path = tmp_path / "damaged"
    for at in range(first):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :])
        with pytest.raises(RunLogError, match="GMR-607"):
            list(read(path))
        with pytest.raises(RunLogError, match="GMR-607"):
            Journal(path)


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    real = os.write
    room = [100_000]

    def write(descriptor: int, data: Any) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(descriptor, bytes(data)[: min(room[0], 7)])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", write)
    with Journal(path) as journal:
        journal.append([Entry({"n": 1}, b"x" * 50)])
        for left in (0, 3, 60, 99):
            room[0] = left
            with pytest.raises(OSError):
                journal.append([Entry({"n": 2}, b"y" * 50)])
            assert list(read(path)) == [Entry({"n": 1}, b"x" * 50)]
        room[0] = 100_000
        journal.append([Entry({"n": 2}, b"y" * 50)])
    assert [entry.head["n"] for entry in read(path)] == [1, 2]


def test_a_failed_fsync_is_a_failed_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "journal") as journal:
        journal.append([Entry({"n": 1})])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
            with pytest.raises(OSError):
                journal.append([Entry({"n": 2})])
        journal.append([Entry({"n": 3})])
    assert [entry.head["n"] for entry in read(tmp_path / "journal")] == [1, 3]


def test_a_new_journals_name_is_on_the_disk_before_its_first_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a folder has the names that it had when it was synchronised last."""
    names: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place == tmp_path:
            names[:] = [path.name for path in place.iterdir()]
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with Journal(tmp_path / "journal"):
        assert names == ["journal"]
