"""What `verify --repair` and a resumed `generate` do to damaged files: nothing is deleted, and doubt moves nothing."""

import errno
import os
import signal
from pathlib import Path

import pytest

from logitcache.cache import manifest, shard, shard_files, verify
from logitcache.cache.reader import Cache
from logitcache.cache.repair import repair
from logitcache.capture.generate import generate
from logitcache.errors import FormatVersionError, LogitcacheError, NotACacheError, ShardCorruptError, UnreadableError
from logitcache.runtime import regular_files
from logitcache.runtime.files import publish_json, read_json


def unit(path: Path, number: int, suffix: str = ".arrow") -> Path:
    return path / shard.DIRECTORY / f"unit-{number:06d}{suffix}"


def contents(path: Path) -> list[bytes]:
    return sorted(f.read_bytes() for f in path.rglob("*") if f.is_file() and "logs" not in f.parts)


def test_a_damaged_index_is_made_again_from_its_whole_shard(path) -> None:
    before, place = read_json(unit(path, 1, ".json")), unit(path, 1, ".json")
    place.write_bytes(place.read_bytes()[:-40])
    report = repair(path, 1)
    assert (report.restored, [p.name for p in report.moved]) == ([place], ["unit-000001.json"])
    after = read_json(place)
    assert {k for k in before if before[k] != after[k]} <= {"provenance", "tail_mass"}
    assert after["tail_mass"] == pytest.approx(before["tail_mass"], rel=0.01, abs=1e-4)
    assert len(Cache.open(path)) == 9
    assert verify.verify(path, 1) == []


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: b"\0" * len(data)])
def test_a_damaged_manifest_is_restored_from_its_second_copy(path, damage) -> None:
    place = path / manifest.FILE_NAME
    whole = place.read_bytes()
    place.write_bytes(damage(whole))
    with pytest.raises(ShardCorruptError):
        Cache.open(path)
    repair(path, 1)
    assert place.read_bytes() == whole
    assert len(Cache.open(path)) == 9
    (path / manifest.BACKUP).unlink()
    place.write_bytes(damage(whole))
    with pytest.raises(ShardCorruptError, match=r"there is no manifest\.backup\.json: older versions wrote none"):
        repair(path, 1)
    assert place.read_bytes() == damage(whole)


def test_a_missing_manifest_names_its_second_copy(path) -> None:
    (path / manifest.FILE_NAME).unlink()
    with pytest.raises(NotACacheError, match="verify --repair .* restores it"):
        Cache.open(path)
    repair(path, 1)
    assert len(Cache.open(path)) == 9


def test_a_whole_shard_without_an_index_is_adopted(path, options) -> None:
    unit(path, 2, ".json").unlink()
    assert repair(path, 1).restored == [unit(path, 2, ".json")]
    assert len(Cache.open(path)) == 9
    unit(path, 0, ".json").unlink()
    summary = generate(options)
    assert (summary.made, summary.completed, summary.before) == (0, 3, 9)
    assert verify.verify(path, 1) == []


def test_half_a_shard_without_an_index_is_set_aside_by_generate(path, options) -> None:
    half = unit(path, 2).read_bytes()[:-500]
    unit(path, 2).write_bytes(half)
    unit(path, 2, ".json").unlink()
    summary = generate(options)
    assert (summary.made, summary.completed) == (3, 0)
    assert [Path(p).read_bytes() for p in summary.set_aside] == [half]
    assert verify.verify(path, 1) == []


def test_a_shard_of_a_newer_version_stays(path) -> None:
    index = read_json(unit(path, 1, ".json"))
    unit(path, 1, ".json").unlink()
    publish_json(unit(path, 1, ".json"), index | {"format": 99})
    before = contents(path)
    report = repair(path, 1)
    assert "newer" in str(report.problems[0]) or "99" in str(report.problems[0])
    assert (report.moved, contents(path)) == ([], before)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_cannot_be_read_stays(path, monkeypatch, number) -> None:
    def failing(place: Path, real=regular_files.open_regular):
        if place.name == "unit-000001.arrow":
            raise OSError(number, os.strerror(number), str(place))
        return real(place)

    before = contents(path)
    for module in (shard, shard_files):
        monkeypatch.setattr(module, "open_regular", failing)
    report = repair(path, 1)
    assert [p.damaged for p in report.problems] == [False]
    assert "could not be read" in str(report.problems[0])
    assert (report.moved, contents(path)) == ([], before)
    with pytest.raises(UnreadableError):
        Cache.open(path)[3]


@pytest.mark.parametrize("index", ["damaged", "missing"])
@pytest.mark.parametrize("newer", [False, True])
def test_a_shard_of_which_nothing_is_proven_stays(path, options, monkeypatch, index, newer) -> None:
    def refused(directory, name, *more, real=shard.read_alone):
        if name == "unit-000001":
            kind = FormatVersionError if newer else UnreadableError
            raise kind("it needs an upgrade" if newer else "could not be read")
        return real(directory, name, *more)

    for number in (1, 2):
        unit(path, number, ".json").write_bytes(b"{}") if index == "damaged" else unit(path, number, ".json").unlink()
    monkeypatch.setattr(shard, "read_alone", refused)
    before, there = contents(path), sorted((path / shard.DIRECTORY).iterdir())
    report = repair(path, 1)
    assert report.restored == [unit(path, 2, ".json")], "the others are repaired"
    assert [str(p) for p in report.problems if not p.damaged] == [
        f"unit-000001: {'it needs an upgrade' if newer else 'could not be read'}"
    ]
    assert set(there) <= set((path / shard.DIRECTORY).iterdir())
    assert all(data in contents(path) for data in before)
    if index == "missing":
        with pytest.raises(FormatVersionError if newer else UnreadableError):
            generate(options)  # which would use the number of the shard again
        assert all(data in contents(path) for data in before)


@pytest.mark.parametrize("name", ["manifest.json", "shards/unit-000001.json", "shards/unit-000001.arrow"])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_is_no_file_is_one_line_and_waits_for_nothing(path, tmp_path, name, kind) -> None:
    place, target = path / name, tmp_path / "target"
    target.write_bytes(place.read_bytes())
    before = target.read_bytes()
    place.unlink()
    {"link": lambda: place.symlink_to(target), "pipe": lambda: os.mkfifo(place), "directory": place.mkdir}[kind]()
    with pytest.raises(LogitcacheError) as error:  # noqa: PT012
        if problems := verify.verify(path, 1):
            raise ShardCorruptError(str(problems[0]))
        [trace.text for trace in Cache.open(path)]
    assert "\n" not in str(error.value)
    assert place.name.partition(".")[0] in str(error.value)
    assert target.read_bytes() == before


def _dies(place: Path, **_) -> tuple[list, list]:
    if place.stem == "unit-000001":
        os.kill(os.getpid(), signal.SIGKILL)
    return [], []


@pytest.mark.slow
def test_a_process_that_dies_is_the_problem_of_its_shard(path, monkeypatch) -> None:
    monkeypatch.setattr(verify, "_verify_shard", _dies)
    problems = verify.verify(path, 2)
    assert {p.shard for p in problems} == {"unit-000001"}


def test_nothing_is_deleted(path) -> None:
    unit(path, 0).write_bytes(b"x")
    unit(path, 1, ".json").write_bytes(b"y")
    (path / "set-aside").mkdir()
    (path / "set-aside" / "unit-000000.arrow").write_bytes(b"mine")
    (path / "shards" / "notes.txt").write_bytes(b"mine too")
    before = contents(path)
    repair(path, 1)
    after = contents(path)
    for each in before:
        assert each in after
