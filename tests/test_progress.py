import io
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from grpo.config import Config, TrackingSection
from pipelines import pretrain_loop, rounds
from pipelines.progress import Display, Message, ProgressBoard, follow, overdue, stop_on_signals, summary_table
from pipelines.ranks import Ranks


def plain():
    return Console(file=io.StringIO(), width=120)


def lines(console):
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_board_keeps_the_latest_of_each_phase_and_every_note():
    board = ProgressBoard()
    board.note("first")
    for step in range(5):
        assert board.report("rollout", step, 4, {"reward": step / 4}) is False
    board.report("generator", 1, 2)
    board.note("second")
    assert board.drain() == [Message(note="first"), Message(note="second"),
                             Message(phase="rollout", done=4, total=4, figures={"reward": 1.0}),
                             Message(phase="generator", done=1, total=2)]
    assert board.drain() == []


def test_a_stop_is_told_by_the_next_report():
    board = ProgressBoard()
    assert not board.report("x", 0, 1)
    board.stop()
    assert board.report("x", 1, 1)


def test_a_failure_stays_on_the_board():
    board = ProgressBoard()
    assert board.failure() == ""
    board.fail("reward function m:f raised")
    board.drain()
    assert board.failure() == "reward function m:f raised" and not board.report("x", 0, 1)


def test_plain_lines_are_rate_limited_but_first_and_last_are_printed():
    console = plain()
    with Display(console, every_s=3600) as display:
        for step in range(1, 101):
            display.phase("pretrain", step, 100, {"loss": 1 / step, "tokens/s": 12345.678})
        display.phase("pretrain", 100, 100)
        display.phase("grpo", 0, 60)
        display.note("[not] markup")
    assert lines(console) == ["pretrain 1/100  loss 1  tokens/s 1.235e+04",
                              "pretrain 100/100  loss 0.01  tokens/s 1.235e+04", "grpo 0/60", "[not] markup"]


def test_without_a_limit_every_change_is_a_line():
    console = plain()
    with Display(console, every_s=0) as display:
        for step in (1, 1, 2, 3):
            display.phase("a", step, 9)
    assert lines(console) == ["a 1/9", "a 2/9", "a 3/9"]


def test_a_terminal_shows_bars_and_the_live_line():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with Display(console) as display:
        display.phase("rollout", 3, 12, {"reward": 0.5})
        display.note("checkpoint written")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "rollout" in text and "3/12" in text and "reward 0.5" in text and "checkpoint written" in text


def test_following_a_board_shows_what_was_written_last():
    board, console = ProgressBoard(), plain()
    with Display(console, every_s=0) as display, follow(board.drain, display, every_s=3600):
        board.report("a", 1, 3)
        board.report("a", 3, 3, {"kl": 0.25})
        board.note("best round 2")
    assert lines(console) == ["best round 2", "a 3/3  kl 0.25"]


def test_a_failing_board_is_reported_once_and_asked_again():
    console, calls = plain(), []

    def poll():
        calls.append(1)
        if len(calls) < 4:
            raise TimeoutError
        return [Message(phase="back", done=1, total=1)] if len(calls) == 4 else []

    with Display(console) as display, follow(poll, display, every_s=0.01):
        deadline = time.monotonic() + 10
        while len(calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines(console) == ["progress is not visible for now (TimeoutError); the run goes on", "back 1/1"]


def test_what_is_late_is_said_once_and_what_has_begun_is_not(monkeypatch):
    monkeypatch.setattr("pipelines.progress.free_resources", lambda: "0 CPUs and 0 GPUs are free")
    monkeypatch.setattr("pipelines.progress.OVERDUE_S", 3600.0)
    polls = [overdue("workers", lambda begun=begun: begun) for begun in (False, True)]
    assert [poll() for poll in polls] == [[], []]
    monkeypatch.setattr("pipelines.progress.OVERDUE_S", -1.0)
    assert [poll() for poll in polls] == [[Message(note="waiting for workers: 0 CPUs and 0 GPUs are free")], []]
    assert [poll() for poll in polls] == [[], []]


def test_an_error_in_the_body_passes_through_follow():
    with pytest.raises(KeyError), Display(plain()) as display, follow(list, display):
        raise KeyError


def test_sigterm_and_the_first_interrupt_stop_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        board, called = ProgressBoard(), threading.Event()
        with stop_on_signals(lambda board=board, called=called: (board.stop(), called.set())):
            os.kill(os.getpid(), number)
            assert called.wait(10) and board.report("x", 0, 1)
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_summary_table_holds_every_cell():
    console = plain()
    summary_table("Quality", [["base", 3.41723, 12, None], ["GRPO [a]", 3.2, 9, 0.81]],
                  ["model", "judge", "steps", "c2st"], console)
    text = console.file.getvalue()
    for cell in ("Quality", "base", "3.417", "12", "-", "GRPO [a]", "3.2", "0.81", "judge"):
        assert cell in text


@pytest.mark.ray
def test_board_works_as_a_zero_cpu_actor(ray_session):
    import ray

    board = ray.remote(ProgressBoard).options(num_cpus=0).remote()
    console = plain()
    with Display(console) as display, follow(lambda: ray.get(board.drain.remote(), timeout=30), display, every_s=0.05):
        assert ray.get(board.report.remote("round", 1, 1, {"reward": 0.5}), timeout=30) is False
        board.stop.remote()
        assert ray.get(board.report.remote("round", 1, 1, {"reward": 0.5}), timeout=30) is True
    assert lines(console) == ["round 1/1  reward 0.5"]
    ray.kill(board)


@pytest.mark.parametrize("loop", [pretrain_loop, rounds])
def test_what_ails_the_store_of_rank_0_is_noted_on_the_board(loop, tmp_path, monkeypatch):
    notes, blocked = [], tmp_path / "store"
    blocked.write_text("a file where the folder of the database belongs")
    board = SimpleNamespace(note=SimpleNamespace(remote=notes.append), failure=SimpleNamespace(remote=lambda: ""))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    settings = {"job": SimpleNamespace(config=Config(), folder=tmp_path / "run"), "board": board, "mlflow_run": None,
                "tracking": TrackingSection(uri=f"sqlite:///{blocked}/mlflow.db")}
    monkeypatch.setattr(loop, "worker_ranks", lambda threads: Ranks())
    monkeypatch.setattr(rounds, "fetch", lambda reference, *_: reference)
    monkeypatch.setattr(loop, "train", lambda job, ranks, *_: {})
    loop.worker_loop(settings)
    assert notes and str(blocked) in notes[0]
