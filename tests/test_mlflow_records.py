import threading
from types import SimpleNamespace

import pytest

from grpo.config import TrackingSection
from pipelines.mlflow_records import upload_bytes
from pipelines.tracking import Tracker


@pytest.fixture
def slow(monkeypatch):
    """A store whose uploads take until `release` is set."""
    sent, release = [], threading.Event()
    run = SimpleNamespace(info=SimpleNamespace(run_id="7", status="RUNNING"),
                          data=SimpleNamespace(metrics={}, params={}))
    client = SimpleNamespace(
        create_run=lambda *_, **__: run,
        get_run=lambda _: run,
        get_experiment_by_name=lambda _: SimpleNamespace(experiment_id="0", lifecycle_stage="active"),
        log_artifact=lambda run_id, path, folder: release.wait(60) and sent.append(path),
        set_terminated=lambda run_id, status: sent.append(status),
    )
    monkeypatch.setattr("mlflow.MlflowClient", lambda tracking_uri: client)
    return SimpleNamespace(sent=sent, release=release, uri="http://server")


def track(slow, folder, warn):
    (folder / "weights").write_bytes(bytes(3000))
    tracker = Tracker(TrackingSection(uri=slow.uri), folder / "run", "run", flush_s=0.05, warn=warn)
    tracker.artifact(folder / "weights")
    return tracker


def test_the_end_waits_for_an_upload_as_long_as_its_size_asks_for(slow, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.tracking.SLOWEST", 100)
    warnings = []

    def warn(text):
        warnings.append(text)
        slow.release.set()

    track(slow, tmp_path, warn).finish(timeout_s=0.1)
    assert slow.sent == [str(tmp_path / "weights"), "FINISHED"]
    assert len(warnings) == 1 and "0.003 MB are on their way" in warnings[0] and "up to 30 s" in warnings[0]


def test_an_upload_that_is_given_up_is_named(slow, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.tracking.SLOWEST", 30_000)
    warnings = []
    track(slow, tmp_path, warnings.append).finish(timeout_s=0.1)
    slow.release.set()
    assert len(warnings) == 2
    assert f"2 records could not be sent to {slow.uri}, {tmp_path / 'weights'} among them" in warnings[1]


def test_only_what_is_uploaded_has_a_size(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / "folder" / name).write_bytes(bytes(5))
    assert upload_bytes({"do": "model", "path": str(tmp_path / "folder")}) == 10
    assert upload_bytes({"do": "artifact", "path": str(tmp_path / "folder" / "a"), "folder": ""}) == 5
    assert upload_bytes({"do": "artifact", "path": str(tmp_path / "gone"), "folder": ""}) == 0
    assert upload_bytes({"do": "status", "status": "FINISHED"}) == 0
