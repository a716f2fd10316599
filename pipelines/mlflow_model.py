"""A generator in MLflow's format, which writes text wherever MLflow can load it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL_NEEDS = ["torch", "numpy", "pyarrow", "tiktoken", "omegaconf", "safetensors"]


def save_model(checkpoint: str | Path, folder: Path) -> None:
    """Write a generator in MLflow's format, with the code that it needs: pickled as it is, because what an exported
    graph gives back cannot sample."""
    import mlflow.pytorch

    from grpo.text_generator import TextGenerator

    mlflow.pytorch.save_model(TextGenerator(checkpoint), folder, serialization_format="pickle",
                              code_paths=[str(ROOT / "grpo")], pip_requirements=MODEL_NEEDS)
