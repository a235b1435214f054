"""Under `--json`, standard output holds one JSON document and nothing else. One verb stands in for all of them."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nnunet_sauron_runtime
import numpy as np
import pytest

from nnunet_sauron.cli import main
from nnunet_sauron.console.json_output import print_json
from nnunet_sauron.plugin import trainer_folder

STRAY = ("by Python", "by sys.__stdout__", "to the descriptor", "by a process", "by a library in C")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    """Let the verb `demo` do something else."""
    monkeypatch.delenv("nnunet_sauron_debug", raising=False)

    def stands_for(run) -> None:
        monkeypatch.setitem(sys.modules, "nnunet_sauron.demo.steps", SimpleNamespace(run_demo=run))

    return stands_for


def talk() -> None:
    """Print in every way that readers, trainers and their workers do."""
    python, dunder, descriptor, process, library = STRAY
    print(python)
    print(dunder, file=sys.__stdout__)
    os.write(1, f"{descriptor}\n".encode())
    subprocess.run([sys.executable, "-c", f"print({process!r})"], check=True)
    ctypes.CDLL(None).printf(f"{library}\n".encode())  # kept back until the library's buffer is written


def test_only_the_document_reaches_standard_output(demo, capfd):
    def run(folder, json_output):
        talk()
        print_json({"a": 1})
        talk()

    demo(run)
    assert main(["demo", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert all(captured.err.count(words) == 2 for words in STRAY)


def test_without_json_everything_stays_where_it_was(demo, capfd):
    demo(lambda folder, json_output: talk())
    assert main(["demo"]) == 0
    sys.__stdout__.flush()
    ctypes.CDLL(None).fflush(None)
    captured = capfd.readouterr()
    assert captured.err == "" and all(words in captured.out for words in STRAY)


def test_after_an_error_there_is_no_document(demo, capfd):
    def run(folder, json_output):
        print_json({"a": 1})
        raise ValueError("no")

    demo(run)
    assert main(["demo", "--json"]) == 2
    assert capfd.readouterr() == ("", "nnUNetv2_sauron demo: no\n")
    print("again")
    assert capfd.readouterr().out == "again\n"


def test_a_document_is_strict_json(capsys):
    print_json({
        "nan": math.nan, "inf": [-math.inf],
        "NumPy": (np.float32(0.5), np.int64(3), np.bool_(True), np.array([1.0, math.nan])),
        "path": Path("a"), "Läsion [红] \"x\"": 1, 2: None, "undecodable": os.fsdecode(b"\xff"),
    })  # fmt: skip

    def refuse(constant: str):
        raise AssertionError(constant)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "nan": None, "inf": [None], "NumPy": [0.5, 3, True, [1.0, None]],
        "path": "a", "Läsion [红] \"x\"": 1, "2": None, "undecodable": "\udcff",
    }  # fmt: skip


def program(then: str, *words: str, **options) -> subprocess.Popen:
    """The command in a process of its own, with a verb `demo` that does `then`."""
    code = (
        "import atexit, ctypes, sys, types\n"
        "from nnunet_sauron.cli import main\n"
        "from nnunet_sauron.console.json_output import print_json\n"
        f"def run(folder, json_output): {then}\n"
        "sys.modules['nnunet_sauron.demo.steps'] = types.SimpleNamespace(run_demo=run)\n"
        "sys.exit(main())"
    )
    packages = trainer_folder().parents[2], Path(nnunet_sauron_runtime.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))}
    environment.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-c", code, "demo", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(("then", "words"), [("print({})", []), ("print_json({})", ["--json"])])
def test_a_reader_that_stops_reading_gets_no_traceback(then, words, long):
    reading, writing = os.pipe()
    os.close(reading)
    process = program(then.format("'x' * 1000000" if long else "'x'"), *words, stdout=writing)
    os.close(writing)
    assert process.communicate() == (None, "")
    assert process.returncode == 1


@pytest.mark.parametrize("stray", ["ctypes.CDLL(None).printf(b'stray\\n')", "print('stray', file=sys.__stdout__)"])
def test_what_is_still_in_a_buffer_is_not_in_the_document(stray):
    process = program(f"{stray}; print_json([1])", "--json", stdout=subprocess.PIPE)
    assert [json.loads(process.stdout.read()), process.stderr.read()] == [[1], "stray\n"]
    process.communicate()


def test_what_is_printed_while_the_process_ends_is_not_in_the_document():
    process = program("atexit.register(print, 'bye'); print_json([1])", "--json", stdout=subprocess.PIPE)
    assert [json.loads(process.stdout.read()), process.stderr.read()] == [[1], "bye\n"]
    process.communicate()


def test_a_closed_standard_output_is_said_before_any_work():
    process = program("print('working', file=sys.stderr)", "--json", preexec_fn=lambda: os.close(1))
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.startswith("nnUNetv2_sauron demo: Standard output is closed") and "working" not in said


def test_a_full_disk_is_an_error():
    with open("/dev/full", "w") as full:
        process = program("print_json([1])", "--json", stdout=full)
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.startswith("nnUNetv2_sauron demo: ") and said.count("\n") == 1 and "No space" in said
