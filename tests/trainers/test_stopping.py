"""SIGINT and SIGTERM: a run stops after its step with a checkpoint, and the same command resumes from there."""

import multiprocessing
import os
import signal
import threading
from dataclasses import replace

import pytest

from metakern.cli import main
from metakern.methods import METHODS
from metakern.trainers import loop, train
from metakern.trainers.checkpoint import load_checkpoint
from metakern.trainers.compare import grid, run_missing
from metakern.trainers.stopping import Stopped, StopSignals
from tests.trainers.test_resume import same

QUICK = ["--majority", "0.9", "--steps", "6", "--batch-size", "20", "--evaluations", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def handled():
    """Signals have Python's handlers, as in a terminal, and have them again afterwards."""
    own = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for number, handler in own.items():
        signal.signal(number, handler)


def signalled(patch, number: int, step: int, again: bool = False) -> None:
    """Let the process send itself a signal while it takes its `step`-th step."""
    original, taken = loop.require_finite, []

    def sending(outcome):
        taken.append(None)
        if len(taken) == step:
            for _ in range(1 + again):
                os.kill(os.getpid(), number)
        original(outcome)

    patch.setattr(loop, "require_finite", sending)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("again", [False, True])
def test_a_signal_stops_after_the_step(quick, tmp_path, capsys, monkeypatch, number, status, again):
    command = ["train", "uniform", *QUICK, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        signalled(patch, number, 3, again)
        assert main(command) == status
    assert "metakern: stopped at step 3; the same command resumes from there" in capsys.readouterr().err
    stored = load_checkpoint(tmp_path / "run", quick.identity())
    assert stored is not None
    assert stored["step"] == 3
    assert main(command) == 0
    assert "metakern: going on from step 3" in capsys.readouterr().err
    whole = train(quick, tmp_path / "whole", progress=False)
    assert (tmp_path / "run" / "weights.csv").read_bytes() == (whole.folder / "weights.csv").read_bytes()


def test_a_later_signal_ends_at_once(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("metakern.trainers.stopping.time.monotonic", lambda: now[0])
    with StopSignals() as stop:
        assert (stop(), stop.status) == (False, 0)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), stop.status) == (True, 130)
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_leaves_the_handlers_alone():
    found = []

    def ask():
        with StopSignals() as stop:
            found.append((stop(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(False, signal.default_int_handler)]


def test_train_has_no_handlers_of_its_own(quick, tmp_path, monkeypatch):
    found = []
    plain = METHODS["uniform"]

    def begin(setup):
        found.append(signal.getsignal(signal.SIGINT))
        return plain.begin(setup)

    monkeypatch.setitem(METHODS, "uniform", replace(plain, begin=begin))
    train(quick, tmp_path, progress=False)
    assert found == [signal.default_int_handler]


def test_any_function_may_stop_a_run(quick, tmp_path):
    asked = iter([False, True])
    with pytest.raises(Stopped, match="stopped at step 2"):
        train(quick, tmp_path / "run", progress=False, stop=lambda: next(asked))
    same(train(quick, tmp_path / "whole", progress=False), train(quick, tmp_path / "run", progress=False))


def test_a_comparison_stops_and_goes_on(tmp_path, capsys, monkeypatch):
    options = ["--methods", "uniform,random", "--seeds", "0-1", *QUICK]
    command = ["compare", *options, "--out", str(tmp_path / "parts")]
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, 9)
        assert main(command) == 130
    assert "stopped at step 3; the same command resumes from there" in capsys.readouterr().err
    assert len(list((tmp_path / "parts").glob("cells/*/result.json"))) == 1
    assert len(list((tmp_path / "parts").glob("cells/*/checkpoint.pt"))) == 1
    assert main(command) == 0
    assert main(["compare", *options, "--out", str(tmp_path / "whole")]) == 0
    for whole in (tmp_path / "whole").glob("cells/*/weights.csv"):
        parts = tmp_path / "parts" / whole.relative_to(tmp_path / "whole")
        assert parts.read_bytes() == whole.read_bytes()


def test_processes_of_a_comparison_leave_checkpoints(quick, tmp_path):
    configs = grid(replace(quick, steps=100_000), ["uniform", "random"], [0.9], [0, 1])
    begun = tmp_path / "cells" / configs[0].name() / "metrics.csv"
    with pytest.raises(Stopped, match="with a checkpoint of every run in progress"):
        run_missing(tmp_path, configs, jobs=2, progress=False, stop=begun.is_file)
    assert not multiprocessing.active_children()  # each has written its checkpoint: none writes one later
    assert (begun.parent / "checkpoint.pt").is_file()
    assert not list(tmp_path.glob("cells/*/result.json"))


def test_processes_that_are_stopped_before_they_run(quick, tmp_path):
    """The same message, whichever process is asked first."""
    configs = grid(replace(quick, steps=100_000), ["uniform"], [0.9], [0, 1])
    with pytest.raises(Stopped, match="with a checkpoint of every run in progress"):
        run_missing(tmp_path, configs, jobs=2, progress=False, stop=lambda: True)
    assert not list(tmp_path.glob("cells/*/result.json"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_does_not_stop_the_other_runs(tmp_path, capsys, jobs):
    command = ["compare", "--methods", "random,uniform", "--seeds", "0-1", "--out", str(tmp_path), *QUICK]
    occupied = tmp_path / "cells" / "digits-4v9-0.9-random-0"
    occupied.parent.mkdir()
    occupied.touch()
    assert main([*command, "--jobs", str(jobs)]) == 2
    said = capsys.readouterr()
    assert f"1 of 4 runs failed; the same command repeats them\n{occupied.name}: " in said.err
    assert "± " in said.out.split("uniform")[1]
    assert len(list(tmp_path.glob("cells/*/result.json"))) == 3
    occupied.unlink()
    assert main(command) == 0
