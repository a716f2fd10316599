import json
import resource
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import MagicMock

import matplotlib
import pytest

from grpo.config import TrackingSection
from pipelines.tracking import Tracker, tracking_uri

matplotlib.use("Agg")
SECTION = TrackingSection(experiment="test")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store whose tables are made: copying it is quicker than MLflow's migrations."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def store(empty_store, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store, tmp_path / "mlflow.db")


@pytest.fixture
def client(tmp_path):
    from mlflow import MlflowClient

    return lambda: MlflowClient(tracking_uri=tracking_uri(SECTION, tmp_path))


def track(tmp_path, name="run", **options):
    options.setdefault("flush_s", 0.05)
    return Tracker(options.pop("section", SECTION), tmp_path / name, name, **options)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def four_at_once(work):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def history(client, run_id, key):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_uri_is_absolute_unless_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(SECTION, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking_uri(SECTION, "runs") == "http://server"
    assert tracking_uri(TrackingSection(uri="http://other"), "runs") == "http://other"


def test_a_run_holds_everything_that_was_logged(tmp_path, client):
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w")
    config = {"grpo": {"group_size": 8, "kl": 0.04}, "note": "y" * 9000}
    with track(tmp_path, config=config) as tracker:
        for step in range(300):
            tracker.log({f"m{k}": step * k for k in range(5)}, step)
        tracker.artifact(tmp_path / "model", "model")
        tracker.table("samples", [["a \u2588", 1.5]], ["text", "reward"])
        tracker.figure("rewards", figure)
        tracker.dataset(tmp_path / ("docs-" + "ab" * 32), "/data/docs", {"tokens": 5})
        run_id = tracker.run_id
    run = client().get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["grpo.group_size"] == "8" and len(run.data.params["note"]) == 500
    assert history(client(), run_id, "m3") == [(step, step * 3.0) for step in range(300)]
    assert "tables/samples.json" in run.data.tags["mlflow.loggedArtifacts"]
    names = {f.path for folder in ("", "model", "tables", "figures") for f in client().list_artifacts(run_id, folder)}
    assert {"config.yaml", "model/weights", "tables/samples.json", "figures/rewards.png"} <= names
    noted = run.inputs.dataset_inputs[0].dataset
    assert (noted.name, noted.digest) == ("docs-" + "ab" * 32, ("docs-" + "ab" * 32)[:36])
    assert (tmp_path / "run" / "figures" / "rewards.png").exists()
    assert not list((tmp_path / "run").glob("unsent*"))


def test_a_resumed_run_continues_without_a_duplicate_or_a_gap(tmp_path, client):
    first = track(tmp_path, config={"a": 1})
    for step in range(10):
        first.log({"loss": 100 - step}, step)
    run_id = first.run_id
    first.finish("FAILED")
    with track(tmp_path, config={"a": 2, "b": 3}, start_step=6) as second:
        assert second.run_id == run_id
        assert client().get_run(run_id).info.status == "RUNNING"
        for step in range(6, 15):
            second.log({"loss": -step, "new": 1.0}, step)
    assert [step for step, _ in history(client(), run_id, "loss")] == list(range(15))
    assert history(client(), run_id, "loss")[9:11] == [(9, 91.0), (10, -10.0)]
    assert [step for step, _ in history(client(), run_id, "new")] == list(range(6, 15))
    run = client().get_run(run_id)
    assert run.data.params == {"a": "1", "b": "3"} and run.data.tags["resumed_with.a"] == "2"
    assert run.info.status == "FINISHED"


def test_figures_that_are_measured_again_are_shown_as_they_are_now_and_stored_once(tmp_path, client, monkeypatch):
    def end(gain):
        with track(tmp_path, start_step=67) as tracker:
            tracker.log({"gain": gain, "natural": 1.5}, 66, measured_again=True)
        return tracker.run_id

    with monkeypatch.context() as away:
        away.setattr(Tracker, "_connect", MagicMock(side_effect=OSError("away")))
        end(0.285)  # waits in the run's folder
    assert end(0.285) == end(0.285) == (run_id := end(0.111))
    assert client().get_run(run_id).data.metrics == {"gain": 0.111, "natural": 1.5}
    assert [history(client(), run_id, key) for key in ("gain", "natural")] == [[(66, 0.285), (66, 0.111)], [(66, 1.5)]]


def test_a_run_of_the_same_name_in_a_new_folder_is_a_new_run(tmp_path, client):
    """The folder was deleted to start again, or belongs to somebody else who uses the same store."""
    section = TrackingSection(uri=tracking_uri(SECTION, tmp_path), experiment="test")
    with track(tmp_path, section=section, config={"a": 1}) as first:
        first.log({"loss": 1.0}, 0)
        ids = [first.run_id]
    shutil.rmtree(tmp_path / "run")
    for number, home in enumerate((tmp_path, tmp_path / "theirs"), start=2):
        with track(home, section=section, config={"a": number}) as tracker:
            tracker.log({"loss": float(number)}, 0)
            ids.append(tracker.run_id)
    assert len(set(ids)) == 3
    for number, run_id in enumerate(ids, start=1):
        run = client().get_run(run_id)
        assert history(client(), run_id, "loss") == [(0, float(number))] and run.data.params == {"a": str(number)}
        assert run.info.run_name == "run"


@pytest.mark.parametrize("what", ["deleted", "gone with its store", "in another store", "of a copied folder"])
def test_a_run_that_cannot_be_continued_is_followed_by_a_new_one(tmp_path, client, empty_store, what):
    with track(tmp_path) as first:
        first.log({"loss": 1.0}, 0)
        old = first.run_id
    name, section = "run", SECTION
    if what == "deleted":
        client().delete_run(old)
    elif what == "gone with its store":
        shutil.copy(empty_store, tmp_path / "mlflow.db")
    elif what == "in another store":
        section = TrackingSection(uri=f"sqlite:///{shutil.copy(empty_store, tmp_path / 'other.db')}", experiment="test")
    else:
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        name = "copy"
    ids = []
    for step in range(2):
        with track(tmp_path, name, section=section) as tracker:
            tracker.log({"loss": 2.0}, step)
            ids.append(tracker.run_id)
    assert ids[0] == ids[1] != old
    from mlflow import MlflowClient

    assert history(MlflowClient(tracking_uri=tracker.uri), ids[0], "loss") == [(0, 2.0), (1, 2.0)]


def test_what_is_made_all_over_again_gets_a_new_run_each_time(tmp_path, client):
    ids = []
    for value in (1.0, 2.0):
        with track(tmp_path, resumes=False) as tracker:
            tracker.log({"loss": value}, 0)
            ids.append(tracker.run_id)
    assert [history(client(), run_id, "loss") for run_id in ids] == [[(0, 1.0)], [(0, 2.0)]]


def test_a_password_in_the_uri_is_not_shown_to_others(tmp_path, monkeypatch, capsys):
    secret = TrackingSection(uri="http://me:secret@server/path", experiment="test")
    run = SimpleNamespace(info=SimpleNamespace(run_id="7", status="RUNNING", lifecycle_stage="active"),
                          data=SimpleNamespace(metrics={}, params={}))
    calls = []
    experiment = SimpleNamespace(experiment_id="0", lifecycle_stage="active")
    made = SimpleNamespace(create_run=lambda *_, **__: calls.append("create") or run,
                           get_run=lambda run_id: calls.append(run_id) or run,
                           get_experiment_by_name=lambda _: experiment)
    monkeypatch.setattr("mlflow.MlflowClient", lambda tracking_uri: made)
    for _ in range(2):
        tracker = track(tmp_path, section=secret)
        assert tracker.run_id == "7"
        tracker.finish(timeout_s=0)
    assert "secret" not in capsys.readouterr().err
    known = json.loads((tmp_path / "run" / "mlflow.json").read_text())
    assert known == {"uri": "http://server/path", "name": "run", "parent": None, "run_id": "7"}
    assert calls[:1] == ["create"] and "create" not in calls[1:]


def test_processes_that_come_to_one_folder_at_once_share_its_run(tmp_path, client):
    gate, ids = threading.Barrier(4), []

    def work(index):
        gate.wait()
        with track(tmp_path, writer=f"writer{index}") as tracker:
            tracker.log({f"x{index}": index}, 0)
            while (run_id := tracker.run_id) is None:
                pass
            ids.append(run_id)

    four_at_once(work)
    assert len(ids) == 4 and len(set(ids)) == 1
    assert client().get_run(ids[0]).data.metrics == {f"x{index}": float(index) for index in range(4)}


def test_a_deleted_experiment_is_said_and_its_records_are_sent_when_it_is_restored(tmp_path, client):
    with track(tmp_path, "first"):
        pass
    identity, warnings = client().get_experiment_by_name("test").experiment_id, []
    client().delete_experiment(identity)
    with track(tmp_path, "second", warn=warnings.append) as tracker:
        tracker.log({"loss": 1.0}, 0)
        assert not tracker.flush(5)
        assert len(warnings) == 1 and "experiment test is deleted there: restore it, or give another" in warnings[0]
        client().restore_experiment(identity)
        assert tracker.flush() and history(client(), tracker.run_id, "loss") == [(0, 1.0)]


def test_artifacts_lie_beside_the_store_wherever_the_first_run_is(tmp_path, client):
    section = TrackingSection(uri=tracking_uri(SECTION, tmp_path), experiment="test")
    with track(tmp_path / "cache", "base", section=section) as tracker:  # a base model, where it is kept
        tracker.artifact(tmp_path / "mlflow.db")
    (experiment,) = (each for each in client().search_experiments() if each.name == "test")
    assert experiment.artifact_location == (tmp_path / "mlflow-artifacts").as_uri()
    assert not (tmp_path / "cache" / "mlflow-artifacts").exists()


def test_rank_zero_attaches_by_run_id_and_leaves_the_run_open(tmp_path, client):
    with track(tmp_path) as driver:
        with track(tmp_path, run_id=driver.run_id, writer="rank0") as rank:
            rank.log({"x": 1}, 0)
            assert rank.run_id == driver.run_id
        assert history(client(), driver.run_id, "x") == [(0, 1.0)]
        assert client().get_run(driver.run_id).info.status == "RUNNING"
    assert client().get_run(driver.run_id).info.status == "FINISHED"


def test_trials_are_nested_and_found_again_under_their_own_parent(tmp_path, client):
    with track(tmp_path, "sweep") as sweep, track(tmp_path, "other") as other:
        with track(tmp_path, "trial", parent_run_id=sweep.run_id) as trial:
            first = trial.run_id
        with track(tmp_path, "trial", parent_run_id=sweep.run_id) as trial:
            assert trial.run_id == first
        with track(tmp_path, "trial", parent_run_id=other.run_id) as trial:
            assert trial.run_id != first
        with track(tmp_path, "trial") as alone:
            assert alone.run_id != first
        assert client().get_run(first).data.tags["mlflow.parentRunId"] == sweep.run_id


@pytest.mark.parametrize("error, status", [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_sets_the_status_and_passes_through(tmp_path, client, error, status):
    with pytest.raises(error), track(tmp_path) as tracker:
        run_id = tracker.run_id
        raise error
    assert client().get_run(run_id).info.status == status


def test_an_unreachable_server_warns_once_and_its_records_are_sent_on_resume(tmp_path, client):
    warnings = []
    section = TrackingSection(uri=f"http://127.0.0.1:{closed_port()}", experiment="test")
    tracker = track(tmp_path, section=section, warn=warnings.append)
    for step in range(50):
        tracker.log({"loss": float(step)}, step)
    assert tracker.run_id is None and not tracker.flush(10)
    tracker.finish()
    assert len(warnings) == 2 and "does not answer" in warnings[0] and "could not be sent" in warnings[1]
    with open(tmp_path / "run" / "unsent-driver.jsonl", "a") as file:
        file.write('{"do": "metr')  # cut off by a crash
    with track(tmp_path, start_step=40) as later:
        later.log({"loss": -40.0}, 40)
        run_id = later.run_id
    assert history(client(), run_id, "loss") == [*((s, float(s)) for s in range(40)), (40, -40.0)]
    assert not (tmp_path / "run" / "unsent-driver.jsonl").exists()


def test_a_store_that_comes_back_gets_what_waited(tmp_path):
    from mlflow import MlflowClient

    warnings, blocked = [], tmp_path / "store"
    blocked.write_text("a file where the folder of the database belongs")
    section = TrackingSection(uri=f"sqlite:///{blocked}/mlflow.db", experiment="test")
    with track(tmp_path, section=section, warn=warnings.append) as tracker:
        tracker.log({"x": 0.0}, 0)
        assert not tracker.flush(60)
        saved = (tmp_path / "run" / "unsent-driver.jsonl").read_text().splitlines()
        assert json.loads(saved[0])["rows"][0][0] == "x"
        blocked.unlink()
        blocked.mkdir()
        tracker.log({"x": 1.0}, 1)
        while not tracker.flush(60):  # the try under way may have begun before the folder was there
            pass
        run_id = tracker.run_id
    assert history(MlflowClient(tracking_uri=section.uri), run_id, "x") == [(0, 0.0), (1, 1.0)]
    assert ["does not answer" in warnings[0], "is back" in warnings[1], len(warnings)] == [True, True, 2]


def test_a_server_that_never_answers_holds_up_nothing(tmp_path):
    warnings = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        section = TrackingSection(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", experiment="test")
        tracker = track(tmp_path, section=section, warn=warnings.append)
        connection, _ = silent.accept()  # the request hangs from here on, as long as the connection is held
        for step in range(1000):
            tracker.log({"x": 1.0}, step)
        tracker.finish(timeout_s=0.1)
        connection.close()
    assert len((tmp_path / "run" / "unsent-driver.jsonl").read_text().splitlines()) == 1001  # and the status
    assert len(warnings) == 1 and "could not be sent" in warnings[0]


def test_the_wait_for_a_store_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.tracking.MAX_PENDING", 10)
    warnings = []
    section = TrackingSection(uri=f"http://127.0.0.1:{closed_port()}", experiment="test")
    tracker = track(tmp_path, section=section, warn=warnings.append)
    for step in range(25):
        tracker.log({"x": 1.0}, step)
    tracker.finish()
    assert "16 records were given up" in warnings[-1]  # 15 steps and the status
    assert len((tmp_path / "run" / "unsent-driver.jsonl").read_text().splitlines()) == 10


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    warnings = []
    (tmp_path / "run").write_text("a file where the run's folder belongs")
    section = TrackingSection(uri=f"http://127.0.0.1:{closed_port()}", experiment="test")
    tracker = track(tmp_path, section=section, warn=warnings.append)
    tracker.log({"x": 1.0}, 0)
    tracker.table("samples", [[1]], ["a"])
    tracker.finish()
    assert "was not written" in " ".join(warnings) and "are lost" in warnings[-1]


def test_a_refused_record_does_not_block_those_behind_it(tmp_path, client):
    warnings = []
    with track(tmp_path, warn=warnings.append) as tracker:
        tracker.artifact(tmp_path / "gone.txt")
        tracker.artifact(tmp_path / "mlflow.db", "../outside")
        tracker.log({"x": 1.0}, 0)
        run_id = tracker.run_id
    assert history(client(), run_id, "x") == [(0, 1.0)]
    assert len(warnings) == 2 and "gone" in warnings[0] and "was refused" in warnings[1]


def test_processes_that_start_at_once_share_one_experiment(tmp_path, client):
    gate, ids = threading.Barrier(4), []
    (tmp_path / "mlflow.db").unlink()  # they make the tables, too

    def work(index):
        gate.wait()
        with track(tmp_path, f"run{index}") as tracker:
            tracker.log({"x": index}, 0)
            while (run_id := tracker.run_id) is None:
                pass
            ids.append(run_id)

    four_at_once(work)
    runs = [client().get_run(run_id) for run_id in ids]
    assert len(set(ids)) == 4 and len({run.info.experiment_id for run in runs}) == 1
    assert all(run.data.metrics == {"x": float(run.info.run_name[-1])} for run in runs)


def test_a_full_disk_stops_nothing_and_what_waited_is_stored_when_there_is_space(tmp_path, client):
    """Every write beyond a few kilobytes fails, as on a full disk: the store's, and after them the buffer's."""
    warnings = []
    with track(tmp_path, warn=warnings.append) as tracker:
        tracker.log({"x": 0.0}, 0)
        assert tracker.flush(60)
        run_id, (_, hard) = tracker.run_id, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            for step in range(1, 500):
                tracker.log({"x": float(step)}, step)
            assert not tracker.flush(60) and (tmp_path / "run" / "unsent-driver.jsonl").read_text() == ""
            tracker.table("texts", [["long" * 1000]], ["text"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        while not tracker.flush(60):
            pass
    assert history(client(), run_id, "x") == [(step, float(step)) for step in range(500)]
    said = " ".join(warnings)
    assert len(warnings) == 3 and all(words in said for words in ("does not answer", "was not written", "is back"))
    assert not (tmp_path / "run" / "unsent-driver.jsonl").exists()
