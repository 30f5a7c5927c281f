"""Damage to a checkpoint: what a power cut leaves of its files, with and without their hashes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from logitcache.errors import StudentError, TrainingError
from logitcache.student.evaluation.evaluate_run import _weights
from logitcache.student.training.checkpoint_files import (
    RECORD,
    STATE_FILE,
    checkpoint_damage,
    seal,
    weights_damage,
)
from logitcache.student.training.checkpoints import (
    WORK,
    checkpoint_to_resume,
    checkpoints,
    clear_work,
    newest_checkpoint,
    publish_checkpoint,
    publish_model,
    rotate,
    set_aside,
)


def write(folder: Path, step: int = 2) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.arange(1000.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.arange(500.0)}, folder / name)
    (folder / "spent.json").write_text("{}")
    (folder / STATE_FILE).write_text(f'{{"global_step": {step}}}')
    return folder


def checkpoint(run: Path, step: int) -> Path:
    return publish_checkpoint(run, write(run / WORK / f"checkpoint-{step}", step))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zero_the_end(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = [
    "model.safetensors",
    "config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    STATE_FILE,
]
DAMAGES = [empty, zero, zero_the_end, cut, flip, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*FILES, "spent.json"])
def test_damage_to_any_file_is_found_and_named(tmp_path, file, damage):
    seal(write(tmp_path / "c"))
    assert checkpoint_damage(tmp_path / "c") is None
    damage(tmp_path / "c" / file)
    assert (checkpoint_damage(tmp_path / "c") or "").startswith(file)


@pytest.mark.parametrize("damage", [empty, zero, zero_the_end, cut, flip])
def test_damage_to_the_record_itself_is_found(tmp_path, damage):
    seal(write(tmp_path / "c"))
    damage(tmp_path / "c" / RECORD)
    assert checkpoint_damage(tmp_path / "c") == f"{RECORD} is damaged"


@pytest.mark.parametrize("damage", [empty, zero, cut])
@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_without_a_record_is_used_if_it_looks_whole(tmp_path, file, damage: Callable):
    write(tmp_path / "c")
    assert checkpoint_damage(tmp_path / "c") is None
    damage(tmp_path / "c" / file)
    assert (checkpoint_damage(tmp_path / "c") or "").startswith(file)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", STATE_FILE])
def test_a_checkpoint_without_a_record_needs_its_model_and_states(tmp_path, file):
    (write(tmp_path / "c") / file).unlink()
    assert "is missing" in (checkpoint_damage(tmp_path / "c") or "")


def test_a_damaged_newest_checkpoint_means_the_one_before(tmp_path):
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    assert checkpoint_to_resume(tmp_path) == (tmp_path / "checkpoint-10", {})
    zero(tmp_path / "checkpoint-10" / "optimizer.pt")
    chosen, damaged = checkpoint_to_resume(tmp_path)
    assert chosen == tmp_path / "checkpoint-4"
    assert damaged == {tmp_path / "checkpoint-10": "optimizer.pt does not match its checksum"}
    assert set_aside(tmp_path / "checkpoint-10").name == "checkpoint-10.aside"
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]


def test_without_a_usable_checkpoint_nothing_starts_again_silently(tmp_path):
    for step in (2, 4):
        empty(checkpoint(tmp_path, step) / "model.safetensors")
    with pytest.raises(
        TrainingError, match=r"no checkpoint can be used: checkpoint-4 \(model.*empty\), checkpoint-2.*remove"
    ):
        checkpoint_to_resume(tmp_path)
    assert len(checkpoints(tmp_path)) == 2


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "there")

    monkeypatch.setattr("logitcache.student.training.checkpoints.checkpoint_damage", refuse)
    with pytest.raises(TrainingError, match="there: Permission denied"):
        checkpoint_to_resume(tmp_path)


def test_an_empty_folder_is_a_damaged_checkpoint_and_a_users_folder_is_none(tmp_path):
    (tmp_path / "checkpoint-6").mkdir()
    with pytest.raises(TrainingError, match="checkpoint-6"):
        checkpoint_to_resume(tmp_path)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-2-best").mkdir()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-6"]
    checkpoint(tmp_path, 9)
    rotate(tmp_path, 1, None)
    assert (tmp_path / "checkpoint-9.aside" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-2-best").exists()


def test_rotation_counts_whole_checkpoints_and_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8):
        checkpoint(tmp_path, step)
    cut(tmp_path / "checkpoint-6" / "optimizer.pt")
    rotate(tmp_path, None, None)
    rotate(tmp_path, 3, None)
    assert len(checkpoints(tmp_path)) == 4
    rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6", "checkpoint-2"]
    rotate(tmp_path, 1, None)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6"]
    clear_work(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-8"]


def test_a_step_saved_twice_is_the_second(tmp_path):
    checkpoint(tmp_path, 2)
    again = write(tmp_path / WORK / "checkpoint-2", 2)
    (again / "config.json").write_text("{}")
    publish_checkpoint(tmp_path, again)
    clear_work(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "config.json").read_text() == "{}"


def test_weights_of_a_run_are_compared_with_their_hashes_before_they_are_evaluated(tmp_path):
    publish_model(tmp_path, write(tmp_path / WORK / "model"))
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    (tmp_path / "config.json").write_text('{"a": 2}')  # what a user may edit
    assert _weights(str(tmp_path))[0] == str(tmp_path)
    zero_the_end(tmp_path / "model.safetensors")
    with pytest.raises(StudentError, match=r"model\.safetensors does not match its checksum"):
        _weights(str(tmp_path))


def test_a_run_that_lasts_is_evaluated_by_its_newest_whole_weights(tmp_path):
    for step in (2, 4):
        checkpoint(tmp_path, step)
    (tmp_path / "run.json").write_text('{"status": "running"}')
    flip(tmp_path / "checkpoint-4" / "model.safetensors")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-4"
    assert _weights(str(tmp_path))[0] == str(tmp_path / "checkpoint-2")
    with pytest.raises(StudentError, match="does not match"):
        _weights(str(tmp_path / "checkpoint-4"))


def test_a_model_is_replaced_file_by_file_with_its_record_last(tmp_path):
    publish_model(tmp_path, write(tmp_path / WORK / "model"))
    second = write(tmp_path / WORK / "model2", 7)
    (second / "templates").mkdir()
    (second / "templates" / "a.jinja").write_text("x")
    publish_model(tmp_path, second)
    assert weights_damage(tmp_path) is checkpoint_damage(tmp_path) is None
    assert (tmp_path / "templates" / "a.jinja").exists()
