import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from logitcache.accuracy import budgets
from logitcache.cache import manifest
from logitcache.errors import CacheBusyError, NotACacheError, ShardCorruptError, WriteError
from logitcache.runtime.files import atomic_directory, create, is_leftover, publish, publish_json, read_json
from logitcache.runtime.locks import exclusive, holder
from logitcache.runtime.regular_files import open_regular
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


@pytest.mark.parametrize(
    "line",
    [
        '"a": 1,\n "a": 2',
        '"a": {"b": 1, "b": 2}',
        '"a": NaN',
        '"a": -Infinity',
        '"a": 1e999',
        '"a": ' + "[" * 100_000,
        '"a": ' + "[" * 100_000 + "]" * 100_000,
        '"a": ' + "9" * 5000,
        '"a": "\xff"',
        '"a": 1\x00',
        '"check": 1',
        "",
        "[",
    ],
)
def test_json_that_readers_disagree_on_is_refused_whatever_its_checksum(tmp_path: Path, line: str) -> None:
    path, body = tmp_path / "m.json", b"{\n " + line.encode("latin-1") + b",\n"
    check = hashlib.sha256(body).hexdigest()
    path.write_bytes(body + f' "check": "{check}"\n}}\n'.encode())
    with pytest.raises(ShardCorruptError, match=r"m\.json: is not plain JSON"):
        read_json(path)


def test_json_without_end_is_not_read(tmp_path: Path, monkeypatch) -> None:
    with (tmp_path / "m.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ShardCorruptError, match=r"m\.json: more than 16,777,216 bytes"):
        read_json(tmp_path / "m.json")
    monkeypatch.setattr("logitcache.runtime.files.MAX_JSON", 100)
    with pytest.raises(WriteError, match=r"bytes, at most 100; make smaller units with `unit_size`"):
        publish_json(tmp_path / "n.json", {"a": "x" * 100})
    assert not (tmp_path / "n.json").exists()


def test_a_file_is_created_by_one_of_several_and_never_replaced(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "f" / "x"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create(path, bytes([i]) * 100), range(8)))
    assert made.count(True) == 1
    assert path.read_bytes() == bytes([made.index(True)]) * 100
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    assert not create(path, b"other")
    assert create(path.with_name("y"), b"new")
    assert path.with_name("y").read_bytes() == b"new"
    assert sorted(p.name for p in path.parent.iterdir()) == ["x", "y"], "nothing else is left"


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


RUN = RunRecord(status="running", settings={"shuffle": "full", "seed": 0})
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
        lambda out: run_settings.claim(out, {"shuffle": "full", "seed": 0}),
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


FOREIGN = {  # what may stand where an unfinished file or directory would
    "directory": lambda path: (path.mkdir(), (path / "mine").write_text("mine")),
    "link": lambda path: path.symlink_to("elsewhere"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "fifo": os.mkfifo,
}


def everything(path: Path) -> dict[str, tuple[int, str]]:
    """Kind of each entry below a directory, and what it contains or links to."""
    found = {}
    for each in sorted(path.rglob("*")):
        mode = each.lstat().st_mode
        kept = os.readlink(each) if each.is_symlink() else each.read_text("latin-1") if stat.S_ISREG(mode) else ""
        found[str(each.relative_to(path))] = stat.S_IFMT(mode), kept
    return found


@pytest.mark.parametrize("stand", FOREIGN.values(), ids=FOREIGN)
def test_what_stands_in_the_way_without_our_mark_is_named_and_left(tmp_path: Path, stand) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    stand(tmp_path / ".out.logitcache-part")
    before = everything(tmp_path)
    for resume in (False, True):
        with (
            pytest.raises(WriteError, match=r"\.out\.logitcache-part.*move it away"),
            atomic_directory(tmp_path / "out", resume=resume) as part,
        ):
            (part / "x").write_text("x")
        assert everything(tmp_path) == before
    with pytest.raises(WriteError, match=r"out: .*move .*\.out\.logitcache-part away"):
        publish(tmp_path / "out", b"x")
    assert everything(tmp_path) == before


def test_a_file_in_place_of_an_unfinished_directory_is_left(tmp_path: Path) -> None:
    (tmp_path / ".out.logitcache-part").write_text("mine")
    with pytest.raises(WriteError, match="move it away"), atomic_directory(tmp_path / "out"):
        pass
    assert everything(tmp_path) == {".out.logitcache-part": (stat.S_IFREG, "mine")}


KILLED = """
import os, shutil, signal, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from logitcache.runtime.files import atomic_directory
left = int(sys.argv[1])
def dying(what):
    def call(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return what(*args, **options)
    return call
for home, names in ((Path, ("mkdir", "touch", "rename", "unlink", "rmdir", "write_text")), (shutil, ("rmtree", "copymode"))):
    for name in names:
        setattr(home, name, dying(getattr(home, name)))
for name in ("mkdir", "rmdir", "unlink"):  # as rmtree calls them
    setattr(os, name, dying(getattr(os, name)))
with atomic_directory(Path("out")) as part:
    (part / "a").mkdir()
    (part / "a" / "b").write_text("b")
"""


def test_a_kill_between_any_two_steps_leaves_the_whole_or_a_place_to_begin_anew(tmp_path: Path) -> None:
    """Every second process finds what the one before it left."""
    (tmp_path / "run.py").write_text(KILLED)
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("mine")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for left in range(1, 40):
        command = [sys.executable, "run.py", str(left)]
        died = subprocess.run(command, cwd=tmp_path, env=environment).returncode
        if not (tmp_path / "out").exists():
            assert died == -signal.SIGKILL
            with atomic_directory(tmp_path / "out") as part:
                (part / "a").mkdir()
                (part / "a" / "b").write_text("b")
        assert (tmp_path / "out" / "a" / "b").read_text() == "b"
        assert (tmp_path / "out.part" / "mine").read_text() == "mine"
        shutil.rmtree(tmp_path / "out")
        if died == 0:
            assert sorted(p.name for p in tmp_path.iterdir()) == ["out.part", "run.py"]
            return
    raise AssertionError("it never ended")


def test_what_a_resumed_directory_holds_is_kept_and_given_again(tmp_path: Path) -> None:

    def fail(name: str, before: int) -> None:
        with atomic_directory(tmp_path / "out", resume=True) as part:
            assert len(list(part.iterdir())) == before
            (part / name).write_text("x")
            raise KeyError

    for number in (1, 2):
        with pytest.raises(KeyError):
            fail(f"{number}", number - 1)
    with atomic_directory(tmp_path / "out", resume=True) as part:
        assert len(list(part.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyError), atomic_directory(tmp_path / "empty", resume=True):
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_is_filled_with_its_permissions_and_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real").chmod(0o700)
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as part:
        (part / "a").write_text("a")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "a"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o700
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link"}


@pytest.mark.parametrize("stand", ["file", "full", "link to full", "link to a file"])
def test_what_is_there_already_is_never_replaced(tmp_path: Path, stand: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    if stand.startswith("link"):
        (tmp_path / stand).symlink_to(stand.split()[-1])
    before = everything(tmp_path)
    with pytest.raises(NotACacheError, match="is not an empty directory"), atomic_directory(tmp_path / stand):
        pass
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "make", "ours"),
    [
        (".lock", lambda p: p.write_text("pid 12 on host"), True),
        (".lock", lambda p: p.write_text(""), True),
        (".lock", lambda p: p.write_text("my notes"), False),
        (".lock", lambda p: p.write_text("pid 12 on host\nand more"), False),
        (".lock-0-of-1", lambda p: p.symlink_to("x"), False),
        (".lock-0-of-1.json", lambda p: publish_json(p, {"teacher": "t"}), True),
        (".lock", os.mkfifo, False),
        ("x.part", lambda p: p.write_text("mine"), False),
        (".x.logitcache-part", lambda p: p.write_text("half"), True),
        (".x.logitcache-part", lambda p: p.mkdir(), False),
        ("logs", lambda p: p.mkdir(), True),
        ("logs", lambda p: (p.mkdir(), (p / "generate-20260101T000000Z-abc123-12.log").touch()), True),
        ("logs", lambda p: (p.mkdir(), (p / "mine.log").touch()), False),
        ("logs", lambda p: p.write_text("mine"), False),
        ("logs", lambda p: p.symlink_to("."), False),
    ],
)
def test_only_what_we_leave_counts_as_a_leftover(tmp_path: Path, name: str, make, ours: bool) -> None:
    make(tmp_path / name)
    assert is_leftover(tmp_path / name) == ours


def test_an_unfinished_file_that_is_completed_meanwhile_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert is_leftover(tmp_path / ".manifest.json.logitcache-part"), "renamed after the directory was listed"
    assert is_leftover(tmp_path / "logs" / ".generate-20260101T000000Z-abc123-12.json.logitcache-part")


@pytest.mark.parametrize("stand", ["text", "link", "link to nothing", "fifo", "directory", "pid 12 on host\nmore"])
def test_what_is_not_our_lock_is_neither_written_nor_waited_for(tmp_path: Path, stand: str) -> None:
    (tmp_path / "other").write_text("")
    made = {
        "link": lambda p: p.symlink_to("other"),
        "link to nothing": lambda p: p.symlink_to("nothing"),
        "fifo": os.mkfifo,
        "directory": lambda p: p.mkdir(),
    }
    made.get(stand, lambda p: p.write_text(stand))(tmp_path / ".lock")
    before = everything(tmp_path)
    with pytest.raises(WriteError, match=r"\.lock .*no"), exclusive(tmp_path / ".lock", "c", wait=True):
        pass
    assert holder(tmp_path / ".lock") is None
    assert everything(tmp_path) == before


@pytest.mark.parametrize("stand", ["link", "fifo", "directory"])
def test_a_record_is_a_regular_file(tmp_path: Path, stand: str) -> None:
    publish_json(tmp_path / "real.json", {"a": 1})
    path = tmp_path / "m.json"
    {"link": lambda: path.symlink_to("real.json"), "fifo": lambda: os.mkfifo(path), "directory": path.mkdir}[stand]()
    with pytest.raises(OSError, match=r"is (a link|not a regular file|a directory): .*m\.json"):
        read_json(path)


@pytest.mark.parametrize(
    "body", [b"{" + b'"a":[' * 100_000, b"{\xff", b"{,", b'{ "a": 1e', b'{\n "a": ' + b"9" * 5000 + b","]
)
def test_a_record_with_a_right_checksum_that_is_not_json_is_one_line(tmp_path: Path, body: bytes) -> None:
    check = hashlib.sha256(body).hexdigest().encode()
    (tmp_path / "m.json").write_bytes(body + b' "check": "' + check + b'"\n}\n')
    with pytest.raises(ShardCorruptError, match=r"m\.json: is not plain JSON"):
        read_json(tmp_path / "m.json")
