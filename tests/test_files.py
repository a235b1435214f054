from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from nnunet_sauron.files import (
    move_new,
    new_folder,
    remove_leftovers,
    write_atomically,
    write_text_atomically,
    write_texts_atomically,
)

from .full_disk import full_disk


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def full_file() -> None:
    with open("/dev/full", "w") as file:
        file.write("text")


class TestFile:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
    def test_one_that_cannot_be_written_leaves_the_old_one(self, tmp_path, error):
        (tmp_path / "plans.json").write_text("old")

        def half(beside: str) -> None:
            Path(beside).write_text("ne")
            raise error("in the middle")

        with pytest.raises(error):
            write_atomically(tmp_path / "plans.json", half)
        assert names(tmp_path) == ["plans.json"] and (tmp_path / "plans.json").read_text() == "old"

    def test_a_full_disk_is_told_with_what_to_do(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"Could not write .*a\.txt: No space left.*then give the same command again"):
            write_text_atomically(tmp_path / "a.txt", "text")
        assert names(tmp_path) == []

    def test_a_disk_that_is_full_for_pytorch_is_told_as_such(self, tmp_path):
        def full(file: str) -> None:
            torch.save(torch.rand(1000), "/dev/full")

        with pytest.raises(OSError, match=r"Could not write .*a\.pth: .*make room or make the folder writable, then"):
            write_atomically(tmp_path / "a.pth", full)
        assert names(tmp_path) == []

    def test_a_name_with_bytes_that_are_no_text_is_escaped(self, tmp_path):
        write_text_atomically(tmp_path / "a.txt", "Größe of \udcff")
        assert (tmp_path / "a.txt").read_text("utf-8") == "Größe of \\udcff"

    def test_two_writers_do_not_mix(self, tmp_path):
        path = tmp_path / "a.json"

        def slowly(beside: str) -> None:
            with Path(beside).open("w") as file:
                file.write("first, ")
                file.flush()
                write_text_atomically(path, "second")
                file.write("which ends last")

        write_atomically(path, slowly)
        assert names(tmp_path) == ["a.json"] and path.read_text() == "first, which ends last"

    def test_several_are_written_all_or_none(self, tmp_path):
        texts = {"a.csv": "new", "b.html": "new" * 50}
        for room, expected in ((100, "old"), (200, "new")):
            for name in texts:
                (tmp_path / name).write_text("old")
            said = pytest.raises(OSError, match=r"Could not write .*/b\.html: .* before is untouched; make room")
            with full_disk(room), said if expected == "old" else contextlib.nullcontext():
                write_texts_atomically(tmp_path, texts)
            assert names(tmp_path) == list(texts)
            assert all((tmp_path / name).read_text().startswith(expected) for name in texts)

    def test_leftovers_of_killed_processes_go_and_nothing_else(self, tmp_path):
        kept = ["checkpoint_latest.pth", "checkpoint_latest.tmp", "other.pth.1a2b3c4d.tmp"]
        for name in (*kept, "checkpoint_latest.pth.1a2b3c4d.tmp", "checkpoint_best.pth.tmp"):
            (tmp_path / name).touch()
        remove_leftovers(tmp_path, "checkpoint_*.pth")
        assert names(tmp_path) == sorted(kept)


class TestMoving:
    @pytest.mark.parametrize("is_folder", [False, True])
    def test_what_was_made_meanwhile_stays(self, tmp_path, is_folder):
        for name in ("mine", "other"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        source, target = ((tmp_path / name) if is_folder else tmp_path / name / "file" for name in ("mine", "other"))
        with pytest.raises(FileExistsError, match="was made meanwhile"):
            move_new(source, target)
        assert (tmp_path / "mine/file").is_file() and (tmp_path / "other/file").read_text() == "other"
        move_new(source, tmp_path / "free")
        assert not source.exists()
        assert (tmp_path / "free/file" if is_folder else tmp_path / "free").read_text() == "mine"


class TestFolder:
    def test_it_is_there_when_it_is_whole(self, tmp_path):
        with new_folder(tmp_path / "model") as beside:
            (beside / "plans.json").touch()
            assert not (tmp_path / "model").exists()
        assert names(tmp_path) == ["model", "model/plans.json"]

    @pytest.mark.parametrize("full", [lambda: torch.save(torch.rand(1000), "/dev/full"), full_file])
    def test_a_full_disk_is_told_with_what_to_do(self, tmp_path, full):
        with (
            pytest.raises(OSError, match=r"model could not be written: .*make room .*, then give the same"),
            new_folder(tmp_path / "model"),
        ):
            full()
        assert names(tmp_path) == []

    def test_an_error_of_another_kind_stays_what_it_is(self, tmp_path):
        with pytest.raises(RuntimeError, match="^of a network$"), new_folder(tmp_path / "model"):
            raise RuntimeError("of a network")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_an_error_leaves_neither(self, tmp_path, error):
        def interrupted() -> None:
            with new_folder(tmp_path / "model") as beside:
                (beside / "plans.json").touch()
                raise error

        with pytest.raises(error):
            interrupted()
        assert names(tmp_path) == []

    def test_one_that_holds_something_stays_as_it_is(self, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model/thesis.tex").touch()
        with pytest.raises(OSError), new_folder(tmp_path / "model") as beside:
            (beside / "plans.json").touch()
        assert names(tmp_path) == ["model", "model/thesis.tex"]

    def test_one_that_may_be_replaced_is_there_until_the_new_one_is_whole(self, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/old").touch()
        with new_folder(tmp_path / "data", replace=True) as beside:
            (beside / "new").touch()
            assert (tmp_path / "data/old").exists()
        assert names(tmp_path) == ["data", "data/new"]

    def test_what_a_killed_run_had_moved_aside_is_there_again(self, tmp_path):
        (tmp_path / ".data.old").mkdir()
        (tmp_path / ".data.old/thesis.tex").touch()
        with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "data", replace=True):
            raise ZeroDivisionError
        assert names(tmp_path) == ["data", "data/thesis.tex"]

    def test_what_it_had_moved_aside_is_not_written_over_after_all_the_work(self, tmp_path):
        (tmp_path / ".data.old").mkdir()
        (tmp_path / ".data.old/thesis.tex").touch()
        with pytest.raises(FileExistsError, match="data holds files already"), new_folder(tmp_path / "data"):
            pytest.fail("the work was begun")
        assert (tmp_path / "data/thesis.tex").is_file()

    def test_what_a_killed_run_left_beside_is_removed(self, tmp_path):
        (tmp_path / ".model.tmp").mkdir()
        (tmp_path / ".model.tmp/half").touch()
        (tmp_path / ".model.tmp/link").symlink_to(tmp_path)
        with new_folder(tmp_path / "model"):
            pass
        assert names(tmp_path) == ["model"]

    def test_two_processes_do_not_write_the_same_one(self, tmp_path):
        with new_folder(tmp_path / "data") as beside:
            (beside / "of the first").touch()
            with (
                pytest.raises(FileExistsError, match="being written by another process"),
                new_folder(tmp_path / "data"),
            ):
                pass
        assert names(tmp_path) == ["data", "data/of the first"]

    def test_the_next_process_may_begin_before_the_old_folder_is_gone(self, tmp_path, monkeypatch):
        (tmp_path / "data").mkdir()
        (tmp_path / "data/old").touch()
        remove = shutil.rmtree
        second = new_folder(tmp_path / "data", replace=True)

        def slowly(path, **options):
            if (tmp_path / "data/first").exists():
                monkeypatch.setattr(shutil, "rmtree", remove)
                (second.__enter__() / "second").touch()
            remove(path, **options)

        monkeypatch.setattr(shutil, "rmtree", slowly)
        with new_folder(tmp_path / "data", replace=True) as beside:
            (beside / "first").touch()
        second.__exit__(None, None, None)
        assert names(tmp_path) == ["data", "data/second"]
