"""The arrows between rooms, read off the source: pipelines -> actors -> grpo, and downwards only inside grpo."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "files",
    "config_model",
    "config_rounds",
    "config_cluster",
    "config_sweep",
    "config",
    "config_file",
    "noise",
    "tokenizer",
    "sources",
    "shards",
    "data",
    "metrics",
    "slices",
    "products",
    "heads",
    "sliced_loss",
    "lora",
    "features",
    "kv_cache",
    "trunk",
    "model",
    "checkpoint",
    "run_checkpoints",
    "gpt2",
    "corruption",
    "mask_bias",
    "diffusion_loss",
    "wavefront",
    "critic",
    "remasking",
    "denoise",
    "autoregress",
    "completion",
    "text_generator",
    "multitask",
    "actions",
    "trajectory",
    "policy_loss",
    "replay",
    "reward_loss",
    "reward_functions",
    "example_rewards",
    "optim",
    "text_quality",
]
FORBIDDEN = {"grpo": {"ray", "mlflow", "actors", "pipelines"}, "actors": {"mlflow", "pipelines"}, "pipelines": set()}
FILES = [path for room in FORBIDDEN for path in sorted((ROOT / room).glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rooms_import_one_way(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & FORBIDDEN[path.parent.name]


@pytest.mark.parametrize("path", sorted((ROOT / "grpo").glob("*.py")), ids=lambda path: path.stem)
def test_grpo_imports_downwards_only(path):
    if path.stem == "__init__":
        return
    lower = set(ORDER[: ORDER.index(path.stem)])
    used = {name.split(".")[1] for name in imported(path) if name.startswith("grpo.") and name.count(".")}
    assert used <= lower, f"{path.name} imports {used - lower} from above"


def test_the_benchmark_for_a_bare_gpu_machine_starts_there():
    code = "import sys; sys.modules |= dict.fromkeys(['scipy', 'ray', 'mlflow', 'rich']); import benchmarks.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_config_files_of_the_mathematics_know_the_whole_config():
    knowing = {path.stem for path in (ROOT / "grpo").glob("*.py") if "grpo.config.Config" in imported(path)}
    assert knowing <= {"config_file"}


def test_the_mathematics_never_synchronises_inside_a_step():
    """`.item()` and `.tolist()` wait for the device; they belong to those who read metrics."""
    steps = ["corruption", "diffusion_loss", "features", "critic", "remasking", "denoise", "policy_loss"]
    for name in steps:
        text = (ROOT / "grpo" / f"{name}.py").read_text(encoding="utf-8")
        assert ".item()" not in text and ".tolist()" not in text, name
