"""How each kind of record (see `pipelines/tracking.py`) goes to a store; metrics go there in batches of their own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.mlflow_model import save_model


def upload_bytes(record: dict[str, Any]) -> int:
    """Size of what a record uploads; 0: nothing."""
    path = Path(record.get("path", ""))
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) if "path" in record else 0


def send(client: Any, run_id: str, record: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Send one record.

    Args:
        warn: told of a file that is gone.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    do = record["do"]
    if do == "artifact":
        path = Path(record["path"])
        if path.is_dir():
            client.log_artifacts(run_id, str(path), record["folder"] or None)
        elif path.exists():
            client.log_artifact(run_id, str(path), record["folder"] or None)
        else:
            warn(f"tracking: {path} is gone and was not uploaded")
    elif do == "model":
        with tempfile.TemporaryDirectory() as folder:
            save_model(record["path"], Path(folder) / "model")
            client.log_artifacts(run_id, folder)
    elif do == "table":
        known = json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": record["name"], "type": "table"}
        if entry not in known:
            client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*known, entry]))
    elif do == "dataset":
        data = Dataset(record["name"], record["name"][:36], "local", json.dumps({"uri": record["source"]}),
                       profile=record["profile"])
        client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    else:
        client.set_terminated(run_id, record["status"])
