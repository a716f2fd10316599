"""MLflow beside a run that never waits for it: `log` appends to a queue, a background thread sends batches.

A dead, slow or full tracking store cannot stop or slow training: the tracker says so once on stderr, keeps what it
could not send in `unsent-<writer>.jsonl` in the run's folder (bounded), tries again, and goes on; what is left when the
process ends is sent by the next one of the same run and writer.

1. `mlflow.json` in a run's folder names its MLflow run, so the command that resumes training continues it. Another
   folder, one that was deleted and made anew, or another store gets a new run, whatever its name, and so does a folder
   whose run was deleted. Steps that the store already holds, because they came after the checkpoint that is resumed
   from, are not stored twice: a replayed metric is dropped where its name and step are there.
2. MLflow has no transaction over a lost answer; a retried batch keeps its timestamps, which makes it the same rows.
3. Names are checked by `metric_names.py` and not by the server, whose refusal would come too late.
4. The default store is SQLite in the output folder, by absolute path, because under `ray job submit` the current folder
   is temporary. It is for one machine; a cluster sets MLFLOW_TRACKING_URI to a server.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections import ChainMap, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.config import TrackingSection
from grpo.files import write_json
from pipelines.metric_names import MetricNames, params
from pipelines.mlflow_records import send, upload_bytes

MAX_PENDING = 20_000  # records (a step each, mostly) kept while the store is away: some 30 MB
BATCH = 1000  # metrics per request, MLflow's limit
SLOWEST = 1_000_000  # bytes per second of an upload that `finish` waits for
IDENTITY = "mlflow.json"  # in a run's folder: of which MLflow run it is
_ENVIRONMENT = {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
                "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


def tracking_uri(section: TrackingSection, output: str | Path) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else a SQLite store in `output`."""
    uri = section.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri or f"sqlite:///{Path(output).expanduser().resolve() / 'mlflow.db'}"


def mlflow_variables() -> dict[str, str]:
    """Variables that tell MLflow's client its server and who asks, for processes that track elsewhere."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_TRACKING_")}


class Tracker:
    """One MLflow run, seen from one process. Use as a context manager, or end with `finish`.

    The driver makes one with the run's name and config; rank 0 of a Train worker may make its own with the driver's
    `run_id`. No method but `run_id`, `flush` and `finish` ever waits for the store, and these wait for a bounded time.

    Args:
        section: URI and experiment.
        folder: the run's folder; its parent holds the default store.
        name: of the MLflow run.
        config: resolved config, logged as params and as `config.yaml`; on a resume a changed value becomes a tag.
        inputs: what is logged as params beside it: checkpoints by the names of their parts.
        start_step: first step that this process logs; unsent records from there on are made again, so they are dropped.
        run_id: attach to this run instead of the folder's; `finish` then leaves the run open for its owner.
        parent_run_id: of the sweep that this run is a trial of.
        resumes: continue the folder's run; False, for what is made all over again each time: a new one.
        writer: distinguishes processes that log to one run, in the name of the file of unsent records.
        flush_s: seconds between sends.
        warn: how to tell the user, once per failure of the store and once per recovery.
    """

    def __init__(self, section: TrackingSection, folder: str | Path, name: str, *,
                 config: Mapping[str, Any] | None = None, inputs: Mapping[str, Any] | None = None, start_step: int = 0,
                 run_id: str | None = None, parent_run_id: str | None = None, resumes: bool = True,
                 writer: str = "driver", flush_s: float = 1.0,
                 warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self.uri = tracking_uri(section, self.folder.parent)
        self._place = re.sub("//[^/@]*@", "//", self.uri)  # for others to read: without a password
        self._experiment, self._name, self._config, self._parent = section.experiment, name, config, parent_run_id
        self._attached, self._run_id, self._flush_s, self._warn = run_id is not None, run_id, flush_s, warn
        self._resumes, self._inputs = resumes, inputs or {}
        self._names = MetricNames()
        self._file = self.folder / f"unsent-{writer}.jsonl"
        self._pending: deque[dict[str, Any]] = deque(_unsent(self._file, start_step))
        self._written = len(self._pending)  # leading records that the file holds as well
        self._seen: dict[tuple[str, int], float] = {}  # what the store holds by (name, step)
        self._client: Any = None
        self._failures = self._dropped = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.finish("KILLED" if stopped else "FAILED" if kind else "FINISHED")

    @property
    def run_id(self) -> str | None:
        """The run's id, for rank 0 or for trials; None when the store cannot be reached now. Waits up to 60 s."""
        self._wait(lambda failures: self._client is not None or self._failures > failures, 60)
        return self._run_id

    def log(self, metrics: Mapping[str, float], step: int, *, measured_again: bool = False) -> None:
        """Log figures of one step; those that the store holds for this step are taken for the same.

        Args:
            measured_again: they may differ from those of an earlier process: a new value goes beside the old one, and
                is the one that MLflow shows.

        Raises:
            ValueError: a name is another one's folder, or becomes the same as another's.
        """
        now = time.time_ns() // 1_000_000
        self._add({"do": "metrics", "again": measured_again,
                   "rows": [[self._names(name), float(value), now, step] for name, value in metrics.items()]})

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file or folder, as it is when its turn comes."""
        self._add({"do": "artifact", "path": str(Path(path).resolve()), "folder": folder})

    def model(self, checkpoint: str | Path) -> None:
        """Log a generator's checkpoint as the model `model`, a `TextGenerator` for `mlflow.pytorch.load_model`."""
        self._add({"do": "model", "path": str(Path(checkpoint).resolve())})

    def table(self, name: str, rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> None:
        """Keep a table as `tables/<name>.json` in the run's folder and in MLflow, which shows it as a table."""
        text = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, default=str)
        if self._keep(self.folder / "tables" / f"{name}.json", lambda path: path.write_text(text)):
            self.artifact(self.folder / "tables" / f"{name}.json", "tables")
            self._add({"do": "table", "name": f"tables/{name}.json"})

    def figure(self, name: str, figure: Any) -> None:
        """Keep a matplotlib figure as `figures/<name>.png` in the run's folder and in MLflow."""
        if self._keep(self.folder / "figures" / f"{name}.png", lambda path: figure.savefig(path, dpi=150)):
            self.artifact(self.folder / "figures" / f"{name}.png", "figures")

    def dataset(self, folder: Path, source: str, profile: Mapping[str, Any]) -> None:
        """Note the training data: its folder, which is named by what decides it, where it came from, and its counts."""
        self._add({"do": "dataset", "name": folder.name, "source": source,
                   "profile": json.dumps(dict(profile), default=str)})

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until all is stored, a try fails, or the time is over; True if all is stored."""
        self._wait(lambda failures: self._stored() or self._failures > failures, timeout_s)
        return self._stored()

    def finish(self, status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        """Send what is left, set the run's status (FINISHED, FAILED, KILLED) unless attached, and end the thread.

        Uploads that are under way after `timeout_s` may take as long again as their size asks for (`SLOWEST`).
        """
        if self._closing:
            return
        if not self._attached:
            self._add({"do": "status", "status": status})
        stored = self.flush(timeout_s)
        left = sum(map(upload_bytes, list(self._pending)))
        if left and not stored and not self._failures:
            self._warn(f"tracking: {left / 1e6:.3g} MB are on their way to {self._place}; waiting for them up to "
                       f"{left / SLOWEST:.0f} s")
            stored = self.flush(left / SLOWEST)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=min(5.0, timeout_s))  # it may hang in a request; it is a daemon
        if not stored:
            self._write_unsent()
            waiting = list(self._pending)
            uploads = [record["path"] for record in waiting if upload_bytes(record)]
            kept = f"are in {self._file} and are sent when this run is resumed"
            self._warn(f"tracking: {len(waiting)} records could not be sent to {self._place}"
                       + (f", {', '.join(uploads)} among them" if uploads else "") + "; they "
                       + (kept if self._written >= len(waiting) else "are lost, as nothing could be written"))
        if self._dropped:
            self._warn(f"tracking: {self._dropped} records were given up while {self._place} was away (more than "
                       f"{MAX_PENDING} waited)")

    def _stored(self) -> bool:
        return self._client is not None and not self._pending

    def _wait(self, holds: Callable[[int], bool], timeout_s: float) -> None:
        with self._changed:
            failures = self._failures
            self._changed.notify_all()
            self._changed.wait_for(lambda: holds(failures) or self._closing, timeout_s)

    def _add(self, record: dict[str, Any]) -> None:
        with self._changed:  # held for moments only, never across a request
            if len(self._pending) >= MAX_PENDING:
                self._dropped += 1
            else:
                self._pending.append(record)

    def _keep(self, path: Path, write: Callable[[Path], object]) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            self._warn(f"tracking: {path} was not written ({error}); the run goes on")
            return False
        return True

    def _work(self) -> None:
        """The background thread: every `flush_s` seconds, and when someone waits, send; after failures, ever later."""
        while not self._closing:
            try:
                if self._client is None:
                    self._connect()
                self._send()
                if self._failures:
                    self._warn(f"tracking: {self._place} is back; what waited has been sent")
                self._failures = 0
            except Exception as error:  # whatever a store does, the run goes on
                if not self._failures and not self._closing:  # `finish` has the last word
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                    self._warn(f"tracking: {self._place} does not answer ({reason}); the run goes on, and keeps its "
                               f"records in {self._file}")
                self._failures += 1
                self._write_unsent()
            with self._changed:
                self._changed.notify_all()
                if not self._closing:
                    self._changed.wait(self._flush_s * min(2**self._failures, 30))

    def _connect(self) -> None:
        """Find or make the run, and read which steps it already holds."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for noisy in ("alembic", "mlflow", "urllib3"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self.folder.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=self.uri)
        run = client.get_run(self._run_id) if self._run_id else self._own_run(client)
        self._run_id = run.info.run_id  # whatever fails from here on, no other one is made
        self._seen = {(key, metric.step): metric.value for key in run.data.metrics
                      for metric in sorted(client.get_metric_history(run.info.run_id, key), key=lambda m: m.timestamp)}
        if self._config is not None:
            self._log_config(client, run)
        self._client = client
        with self._changed:
            self._changed.notify_all()

    def _own_run(self, client: Any) -> Any:
        """The folder's run, opened again, or a new one. Processes take turns: while the store is away, a worker gets no
        id from its driver, and both come here later."""
        path = self.folder / IDENTITY
        own = {"uri": self._place, "name": self._name, "parent": self._parent}
        with open(path.with_name(f".{IDENTITY}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            run = _known_run(client, path, own) if self._resumes else None
            if run is None:
                tags = {"mlflow.parentRunId": self._parent} if self._parent else {}
                run = client.create_run(self._experiment_id(client), run_name=self._name,
                                        tags={**tags, "mlflow.source.name": sys.argv[0]})
                self._keep(path, lambda path: write_json(path, {**own, "run_id": run.info.run_id}))
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def _experiment_id(self, client: Any) -> str:
        """The experiment, made if there is none."""
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            if experiment.lifecycle_stage == "deleted":
                raise RuntimeError(f"experiment {self._experiment} is deleted there: restore it, or give another "
                                   "tracking.experiment")
            return experiment.experiment_id
        local = self.uri.startswith("sqlite:")
        try:
            place = Path(self.uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts"
            return client.create_experiment(self._experiment, artifact_location=place.as_uri() if local else None)
        except MlflowException:  # another process was faster
            return client.get_experiment_by_name(self._experiment).experiment_id

    def _log_config(self, client: Any, run: Any) -> None:
        from mlflow.entities import Param, RunTag

        given, known = params({**self._config, **self._inputs}), run.data.params
        new = [Param(key, value) for key, value in given.items() if key not in known]
        tags = [RunTag(f"resumed_with.{key}", value) for key, value in given.items() if known.get(key, value) != value]
        for start in range(0, len(new), 100):
            client.log_batch(run.info.run_id, params=new[start: start + 100])
        for start in range(0, len(tags), 100):
            client.log_batch(run.info.run_id, tags=tags[start: start + 100])
        client.log_dict(run.info.run_id, dict(self._config), "config.yaml")

    def _send(self) -> None:
        while self._pending:
            if self._pending[0]["do"] == "metrics":
                taken, rows, sent = 0, [], {}
                while taken < len(self._pending) and len(rows) < BATCH and self._pending[taken]["do"] == "metrics":
                    news = _news(self._pending[taken], ChainMap(sent, self._seen))
                    sent |= {(name, step): value for name, value, _, step in news}
                    rows += news
                    taken += 1
                self._send_metrics(rows)
                self._seen |= sent
            else:
                taken = 1
                self._send_or_give_up(self._pending[0])
            with self._changed:
                for _ in range(taken):
                    self._pending.popleft()
                self._written = max(0, self._written - taken)
        self._file.unlink(missing_ok=True)

    def _send_metrics(self, rows: list[list[Any]]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(rows), BATCH):
            self._client.log_batch(self._run_id, metrics=[Metric(*row) for row in rows[start: start + BATCH]])

    def _send_or_give_up(self, record: dict[str, Any]) -> None:
        """A record that fails though the store answers (a refused value, artifacts out of reach) is dropped."""
        try:
            send(self._client, self._run_id, record, self._warn)
        except Exception as error:
            self._client.get_run(self._run_id)  # raises when it is the store that is away: then the record waits
            self._warn(f"tracking: {record['do']} {record.get('path', '')} was refused "
                       f"({(str(error).strip() or type(error).__name__).splitlines()[0][:200]}); the run goes on")

    def _write_unsent(self) -> None:
        """Append to the file what waits and is not in it; without a disk to write on, memory has to do."""
        with self._changed:
            waiting = list(self._pending)[self._written:]
            whole = 0
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                whole = self._file.stat().st_size if self._file.exists() else 0
                with open(self._file, "a") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in waiting))
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._file, whole)  # a full disk takes a part of them
                return
            self._written += len(waiting)


def _known_run(client: Any, path: Path, own: Mapping[str, str | None]) -> Any:
    """The run that the file names, if it was made for `own` and the store still has it; else None."""
    from mlflow.exceptions import MlflowException

    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    run_id = known.pop("run_id", None)
    if not run_id or known != own:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it is the store that is away
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _news(record: dict[str, Any], held: Mapping[tuple[str, int], float]) -> list[list[Any]]:
    """Rows of a record of metrics that a store which holds these values lacks."""
    known = [held.get((name, step)) for name, _, _, step in record["rows"]]
    return [row for row, value in zip(record["rows"], known, strict=True)
            if value is None or record.get("again") and value != row[1] and not math.isnan(row[1])]


def _unsent(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Records of an earlier process that are worth sending: no status, no broken last line, no step made again."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    records = []
    for line in lines[:MAX_PENDING]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["do"] == "metrics":
            record["rows"] = [row for row in record["rows"] if row[3] < start_step]
        if record["do"] != "status" and record.get("rows") != []:
            records.append(record)
    return records
