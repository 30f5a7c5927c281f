import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.accuracy import budgets
from logitcache.cache import manifest
from logitcache.errors import CacheBusyError, ShardCorruptError, WriteError
from logitcache.runtime.files import open_regular, publish, publish_json, read_json
from logitcache.runtime.locks import exclusive
from logitcache.student.training import run_settings
from logitcache.student.training.checkpoints import RUN_FILE
from logitcache.student.training.run_record import RunRecord
from tests import tiny


def test_a_published_file_is_whole_and_leaves_no_part(tmp_path: Path) -> None:
    publish(tmp_path / "a", b"12345")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"12345"


def test_a_full_disk_leaves_nothing_and_says_the_way_out(tmp_path: Path, monkeypatch) -> None:
    def full(_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"a: No space left on device.*; free some space, then run the same command"):
        publish(tmp_path / "a", b"x" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_every_changed_byte_of_a_json_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    publish_json(path, {"a": 1, "text": "naïve"})
    assert read_json(path) == {"a": 1, "text": "naïve"}
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x01]) + data[i + 1 :])
        with pytest.raises(ShardCorruptError, match=r"m\.json: does not match its checksum"):
            read_json(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ShardCorruptError):
        read_json(path)


def test_a_second_writer_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    script = (
        "from logitcache.runtime.locks import exclusive; from pathlib import Path\n"
        f"with exclusive(Path({str(lock)!r}), 'c'): print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(CacheBusyError, match=rf"c is being written by another process \(pid {holder.pid} on \S+\)"),
        exclusive(lock, "c"),
    ):
        pass
    holder.kill()
    holder.wait()
    with exclusive(lock, "c"):
        assert lock.read_text().startswith(f"pid {os.getpid()} on ")


RUN = RunRecord(status="running", settings={"seed": 0})
SETTINGS = {"settings": {"model": "m"}, "delimiters": {"open": [1], "close": [2]}}
RECORDS = {  # of a directory that a command makes: its name, what publishes it, what looks for it, and what that finds
    "cache": (
        manifest.FILE_NAME,
        lambda out: manifest.write(out, tiny.identity()),
        lambda out: manifest.match(out, tiny.identity()),
        tiny.identity(),
    ),
    "answers": (
        budgets.SETTINGS,
        lambda out: publish_json(out / budgets.SETTINGS, SETTINGS),
        lambda out: budgets._check_directory(out, SETTINGS["settings"]),
        SETTINGS["delimiters"],
    ),
    "run": (
        RUN_FILE,
        lambda out: run_settings.write(out, RUN),
        lambda out: run_settings.claim(out, {"seed": 0}),
        RUN,
    ),
}
records = pytest.mark.parametrize(("name", "publishes", "look", "found"), RECORDS.values(), ids=RECORDS)


@records
def test_a_record_that_another_process_publishes_meanwhile_is_no_foreign_thing(
    tmp_path: Path, monkeypatch, name, publishes, look, found
) -> None:
    listed = Path.iterdir

    def late(path: Path):
        monkeypatch.undo()
        publishes(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", late)
    assert look(tmp_path) == found
    assert (tmp_path / name).exists()


@records
def test_a_kill_while_the_first_record_is_published_leaves_a_place_to_begin_anew(
    tmp_path: Path, name, publishes, look, found
) -> None:
    script = (
        "import os, signal; from pathlib import Path; from logitcache.runtime.files import publish\n"
        "from logitcache.runtime.locks import exclusive\n"
        "Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"out = Path({str(tmp_path)!r})\n"
        f"with exclusive(out / '.lock', 'out'): publish(out / {name!r}, b'1234')"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert {p.name for p in tmp_path.iterdir()} == {".lock", f".{name}.logitcache-part"}
    assert look(tmp_path) is None
    publishes(tmp_path)
    assert look(tmp_path) == found


def test_only_regular_files_are_opened_and_no_links_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"1234"
    for name in ("link", "fifo", "."):
        with pytest.raises(OSError):  # noqa: PT011
            open_regular(tmp_path / name)
