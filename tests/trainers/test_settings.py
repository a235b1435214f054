"""Where a training's settings come from: class attributes, the variable, and files that the variable names."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, make_dataclass
from typing import Optional

import pytest

from nnunet_sauron.methods.sauron_settings import SauronSettings
from nnunet_sauron.methods.shrink import ShrinkSettings
from nnunet_sauron.methods.targets import TargetSettings
from nnunet_sauron.trainers import settings
from nnunet_sauron.trainers.settings import Given, TrainingSettings, write_settings
from nnunet_sauron.trainers.shrink import StartSettings


class Trainer:
    """Stands for a trainer: its name is in the errors."""


def given(monkeypatch, text: str | None, trainer: type = Trainer) -> Given:
    monkeypatch.delenv("nnunet_sauron", raising=False)
    if text is not None:
        monkeypatch.setenv("nnunet_sauron", text)
    return Given(trainer, TrainingSettings, SauronSettings)


@pytest.fixture
def file(tmp_path):
    """A file in a folder whose name holds what separates settings."""
    folder = tmp_path / "a, b c,k=3, Jörg"
    folder.mkdir()
    path = folder / "settings.json"
    path.write_text(json.dumps({"num_epochs": 7, "lambda_": 0.25, "target_macs": None, "merge": False}))
    return path


@pytest.mark.parametrize(
    "text", ["@{}", " @ {} ", "@{},num_epochs=7", "num_epochs=7,@{}", "num_epochs=7 , @{},lambda_=0.25"]
)
def test_a_file_gives_settings_whatever_its_path(monkeypatch, file, text):
    found = given(monkeypatch, text.format(file))
    assert found.values == {"num_epochs": 7, "lambda_": 0.25, "target_macs": None, "merge": False}
    assert found.by_variable == set(found.values)


@pytest.mark.parametrize("text", ["@{},num_epochs=9,target_macs=0.5", "num_epochs=9,target_macs=0.5,@{}"])
def test_what_stands_beside_a_file_goes_before_it(monkeypatch, file, text):
    training, sauron = given(monkeypatch, text.format(file)).settings()
    assert (training.num_epochs, sauron.target_macs, sauron.lambda_) == (9, 0.5, 0.25)


def test_a_file_goes_before_class_attributes(monkeypatch, file):
    found = given(monkeypatch, f"@{file}", type("T", (Trainer,), {"num_epochs": 3, "kappa": 4}))
    assert (found.values["num_epochs"], found.values["kappa"]) == (7, 4)


def test_home_is_known(monkeypatch, file):
    monkeypatch.setenv("HOME", str(file.parent))
    assert given(monkeypatch, "@~/settings.json").values["num_epochs"] == 7


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no JSON"),
        ('{"num_epochs": 7,', "is no JSON"),
        ("num_epochs=7", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"num_epochs": 1e999}', "num_epochs must be a whole number"),
        ("[1]", "holds a JSON list, expected an object"),
        ("7", "holds a JSON int, expected an object"),
        ("null", "holds a JSON NoneType, expected an object"),
        (
            '{"num_epoch": 7}',
            r"'num_epoch' in .*settings.json is not a setting of Trainer \(did you mean num_epochs\?\)",
        ),
        ('{"num_epochs": "7"}', "settings.json: num_epochs must be a whole number or None; got '7'"),
        ('{"num_epochs": 7.5}', "num_epochs must be a whole number"),
        ('{"num_epochs": true}', "num_epochs must be a whole number"),
        ('{"num_epochs": [7]}', "num_epochs must be a whole number"),
        ('{"merge": 1}', "merge must be True or False"),
        ('{"lambda_": NaN}', "lambda_ must be a number"),
        ('{"lambda_": null}', "lambda_ must be a number"),
        ('{"lambda_": -1}', "lambda_ must be 0 or more"),
        ('{"num_epochs": 7, "num_epochs": 8}', "given twice: num_epochs"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(monkeypatch, file, content, said):
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        given(monkeypatch, f"@{file}").settings()
    assert "\n    lambda_=0.5\n" in str(error.value)


def test_a_missing_file_and_a_folder_are_named(monkeypatch, file):
    with pytest.raises(FileNotFoundError, match="'/no/such, thing.json', which is not there"):
        given(monkeypatch, "@/no/such, thing.json,num_epochs=3")
    with pytest.raises(FileNotFoundError, match=f"'{file.parent.parent}', which is a folder"):
        given(monkeypatch, f"@{file.parent.parent}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(monkeypatch, file):
    file.chmod(0)
    with pytest.raises(OSError, match="cannot be read: Permission denied"):
        given(monkeypatch, f"@{file}")


def test_a_file_begins_with_a_byte_order_mark_or_not(monkeypatch, file):
    file.write_text('{"num_epochs": 5}', encoding="utf-8-sig")
    assert given(monkeypatch, f"@{file}").values == {"num_epochs": 5}


def test_what_is_written_is_read(monkeypatch, tmp_path):
    settings = {"num_epochs": 12, "normalisation": "none", "target_macs": None, "lambda_": 1e-3, "merge": True}
    write_settings(settings, tmp_path)
    assert given(monkeypatch, f"@{tmp_path / 'settings.json'}").values == settings
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(monkeypatch, tmp_path):
    write_settings({"num_epochs": 1}, tmp_path)

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=r"Could not write .*settings.json.*No space left"):
        write_settings({"num_epochs": 2}, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"num_epochs": 1}


# Annotations as types, as they are without `from __future__ import annotations`.
Own = make_dataclass(
    "Own",
    [("strength", float, 0.5), ("often", int | None, None), ("name", Optional[str], "x"), ("on", bool, False)],  # noqa: UP045
    frozen=True,
    kw_only=True,
)


def test_settings_of_ones_own_need_no_future_import(monkeypatch):
    monkeypatch.setenv("nnunet_sauron", "strength=2,often=None,name=1.5,on=True")
    (own,) = Given(Trainer, Own).settings()
    assert own == Own(strength=2, often=None, name="1.5", on=True)
    monkeypatch.setenv("nnunet_sauron", "often=1.5")
    with pytest.raises(ValueError, match="often must be a whole number or None; got '1.5'"):
        Given(Trainer, Own)


def test_a_setting_of_another_type_is_refused_where_it_is_defined(monkeypatch):
    monkeypatch.delenv("nnunet_sauron", raising=False)
    with pytest.raises(TypeError, match=r"setting widths is annotated list\[int\]"):
        Given(Trainer, make_dataclass("Other", [("widths", list[int], None)], frozen=True, kw_only=True))


def test_a_value_with_a_comma_is_told_of_files(monkeypatch):
    with pytest.raises(ValueError, match=r"'b' is not a setting of Trainer.*given by a file, nnunet_sauron=@FILE"):
        given(monkeypatch, "normalisation=a, b")


def test_a_number_is_quoted_as_it_was_written(monkeypatch):
    with pytest.raises(ValueError, match="num_epochs must be a whole number or None; got '1e2'"):
        given(monkeypatch, "num_epochs=1e2")


def test_a_setting_that_is_given_twice_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="num_epochs is given twice in nnunet_sauron"):
        given(monkeypatch, "num_epochs=5,lambda_=1,num_epochs=50")


def test_windows_knows_one_spelling_of_a_variable(monkeypatch):
    monkeypatch.setenv("NNUNET_SAURON", "num_epochs=5")
    with pytest.raises(ValueError, match="NNUNET_SAURON is not read"):
        given(monkeypatch, None)
    monkeypatch.setattr(settings.sys, "platform", "win32")
    given(monkeypatch, None)


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    start_from: str | None = None
    teacher: str | None = "source"


def test_paths_hold_wherever_a_training_is_continued(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnunet_sauron", "start_from=a/b.pth,teacher=source")
    given = Given(Trainer, PathSettings)
    assert given.settings() == (PathSettings(start_from=str(tmp_path / "a/b.pth")),)
    assert given.continued({"start_from": "a/b.pth"}, []) == given.settings()
    monkeypatch.setenv("nnunet_sauron", "teacher=c")
    assert Given(Trainer, PathSettings).settings() == (PathSettings(teacher=str(tmp_path / "c")),)
    monkeypatch.delenv("nnunet_sauron")
    of_class = type("T", (Trainer,), {"start_from": "a/b.pth"})
    assert Given(of_class, PathSettings).settings() == (PathSettings(start_from=str(tmp_path / "a/b.pth")),)


class TestClassAttributes:
    """A subclass may have methods and numbers of its own; some names are also settings'."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        k: int | None = None
        eps: float = 0.1
        merge: bool = False
        weight: float = 1.0

    def test_methods_and_properties_are_no_settings(self, monkeypatch):
        monkeypatch.delenv("nnunet_sauron", raising=False)

        class Own(Trainer):
            eps = 0.2

            def merge(self):
                return "of its own"

            @property
            def weight(self):
                return "of its own"

            @staticmethod
            def k():
                return "of its own"

        found = Given(Own, self.Settings)
        assert found.values == {"eps": 0.2} and found.by_class == {"eps"}
        assert found.settings() == (self.Settings(eps=0.2),)

    def test_a_value_that_cannot_be_a_setting_says_why_it_was_read(self, monkeypatch):
        monkeypatch.delenv("nnunet_sauron", raising=False)
        with pytest.raises(
            ValueError, match=r"weight must be a number; got '\[1, 2\]'. It is a class attribute of Own"
        ):
            Given(type("Own", (Trainer,), {"weight": [1, 2]}), self.Settings)


BEFORE = {"num_epochs": 5, "save_every": 1, "lambda_": 0.5}


class TestContinued:
    def test_class_attributes_do_not_replace_what_was(self, monkeypatch):
        found = given(monkeypatch, None, type("T", (Trainer,), {"num_epochs": 9, "save_every": 9, "kappa": 3}))
        training, sauron = found.continued(BEFORE, ["save_every"])
        assert (training.num_epochs, training.save_every, sauron.kappa) == (5, 1, 3)
        assert found.by_class == {"kappa"} and found.changed == {}

    @pytest.mark.parametrize("as_file", [False, True])
    def test_what_the_variable_changes_is_known(self, monkeypatch, tmp_path, as_file):
        write_settings({"save_every": 9, "num_epochs": 5}, tmp_path)
        found = given(monkeypatch, f"@{tmp_path / 'settings.json'}" if as_file else "save_every=9,num_epochs=5")
        training, _ = found.continued(BEFORE, ["save_every"])
        assert training.save_every == 9 and found.changed == {"save_every": (1, 9)}

    def test_what_cannot_change_is_refused_from_a_file_too(self, monkeypatch, tmp_path):
        write_settings({"num_epochs": 8, "lambda_": 0.1}, tmp_path)
        found = given(monkeypatch, f"@{tmp_path / 'settings.json'}")
        with pytest.raises(
            ValueError, match=r"lambda_=0.5 \(now 0.1\), num_epochs=5 \(now 8\).*Another one is begun without --c"
        ):
            found.continued(BEFORE, ["save_every"])

    @pytest.mark.parametrize(
        ("text", "method"),
        [("num_epochs=None,save_every=None", SauronSettings), ("target_macs=None", ShrinkSettings),
         ("widths_from=/w.pth,min_channels=3", TargetSettings)],
    )  # fmt: skip
    def test_the_variable_that_a_training_was_begun_with_is_no_change(self, monkeypatch, text, method):
        monkeypatch.setenv("nnunet_sauron", text)
        found = Given(Trainer, TrainingSettings, method)
        _, begun = found.settings()
        training, now = found.continued({**BEFORE, **asdict(begun)}, ["save_every"])
        assert now == begun and found.changed == {} and (training.num_epochs, training.save_every) == (5, 1)


def test_a_target_beside_a_file_replaces_the_files(monkeypatch, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"target_macs": 0.1, "target_parameters": None, "cuts": 3}))
    monkeypatch.setenv("nnunet_sauron", f"@{path},target_parameters=0.3")
    (shrink,) = Given(Trainer, ShrinkSettings).settings()
    assert (shrink.target_macs, shrink.target_parameters, shrink.cuts) == (None, 0.3, 3)


@pytest.mark.parametrize("now", [True, False])
def test_published_beside_a_file_of_the_other_mode_is_refused(monkeypatch, file, now):
    file.write_text(json.dumps({**asdict(SauronSettings.from_given(published=not now))}))
    with pytest.raises(ValueError, match=f"published={now} decides other settings' defaults"):
        given(monkeypatch, f"@{file},published={now}")
    assert given(monkeypatch, f"@{file},published={not now}").values["published"] is not now


@pytest.mark.parametrize("name", ["start_from", "teacher"])
def test_a_path_that_is_empty_or_no_text_is_named(monkeypatch, name):
    monkeypatch.setenv("nnunet_sauron", f"{name}=")
    with pytest.raises(ValueError, match=f"{name} is empty, expected the path of a model"):
        Given(Trainer, StartSettings)
    monkeypatch.setenv("nnunet_sauron", f"{name}=/data/mod\udce9l")
    with pytest.raises(ValueError, match=f"{name}='/data/mod\\\\udce9l' has a name that is no UTF-8"):
        Given(Trainer, StartSettings)
