import os
import subprocess
import sys
from pathlib import Path

from grpo.config import TrackingSection
from grpo.text_generator import TextGenerator
from pipelines.tracking import Tracker
from tests.test_text_generator import checkpoint


def test_a_logged_model_writes_text_in_a_process_without_the_project(tmp_path):
    folder = checkpoint(tmp_path)[0]
    with Tracker(TrackingSection(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "run", "run") as tracker:
        tracker.model(folder)
        run_id = tracker.run_id
    script = f"""import mlflow, sys
mlflow.set_tracking_uri("{tracker.uri}")
model = mlflow.pytorch.load_model("runs:/{run_id}/model")
assert "{Path(__file__).parent.parent}" not in sys.modules["grpo"].__file__
sys.stdout.buffer.write(repr(model("the ", num=2, seed=3)).encode())
"""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.decode() == repr(TextGenerator(folder)("the ", num=2, seed=3)), done.stderr.decode()
