import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.checkpoint import save_checkpoint
from grpo.config import Config, DataSection, DenoiseSection, ModelSection, RunSection
from grpo.config_file import load_config, save_config, to_dict
from grpo.model import GPT
from grpo.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = build_tokenizer("bytes")
CONFIG = Config(run=RunSection(name="trained"), model=ModelSection(n_layer=1, n_head=2, n_embd=16),
                data=DataSection(block_size=24), denoise=DenoiseSection(steps=3, remasking="auto"))


def save(folder, **options):
    torch.manual_seed(0)
    config = replace(CONFIG, model=replace(CONFIG.model, **options))
    model = GPT(config.model, TOKENIZER.vocabulary, block_size=24)
    save_checkpoint(folder, model, config=to_dict(config), tokenizer=TOKENIZER, state={"mask_bias": {"bias": 1.25}})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save(folder / "diffusion" / "checkpoints" / "step-00000007")
    save(folder / "causal" / "checkpoints" / "step-00000007", attention="causal", critic=False, sampler=False)
    return folder


def run(where, *arguments, module=False):
    program = ["-m", "pipelines.sample"] if module else [str(ROOT / "pipelines" / "sample.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if module else "", "COLUMNS": "100"}
    return subprocess.run([sys.executable, *program, *map(str, arguments)], cwd=where, env=environment,
                          capture_output=True, text=True, timeout=120)


def summary_of(where, name):
    return json.loads((where / "runs" / name / "summary.json").read_text(encoding="utf-8"))


def test_texts_continue_the_prompt_and_the_page_is_written(runs, tmp_path):
    done = run(tmp_path, "--checkpoint", runs / "diffusion", "--prompt", "Say: ", "--num", 3, "--live", "--html",
               "page.html", "run.name=one", "denoise.steps=2")
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path, "one")
    assert len(summary["texts"]) == 3 and all(text.startswith("Say: ") for text in summary["texts"])
    assert summary["checkpoint"].endswith("step-00000007") and summary["num_tokens"] == 3 * 24
    assert "\u2588" not in "".join(summary["texts"])
    assert "step 1 of 2, filled: 5 protected, 10 newly filled, 9 re-masked" in done.stdout  # plain lines, no terminal
    assert "step 2 of 2" in (tmp_path / "page.html").read_text(encoding="utf-8")
    config = load_config(tmp_path / "runs" / "one" / "config.yaml")
    assert config.data.block_size == 24 and config.denoise.steps == 2  # the checkpoint's own, and the override


def test_a_prompt_that_is_no_utf_8_is_read_with_replacements(runs, tmp_path):
    done = run(tmp_path, "--checkpoint", runs / "diffusion", "--prompt", b"caf\xe9".decode(errors="surrogateescape"),
               "run.name=one")
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path, "one")["prompt"] == "caf\ufffd"


def test_a_text_does_not_depend_on_how_many_are_written(runs, tmp_path):
    for name, num in (("few", 1), ("many", 3)):
        done = run(tmp_path, "--checkpoint", runs / "diffusion", "--num", num, f"run.name={name}", module=True)
        assert done.returncode == 0, done.stderr
        assert "steps 3/3" in done.stdout
    assert summary_of(tmp_path, "few")["texts"] == summary_of(tmp_path, "many")["texts"][:1]


def test_causal_checkpoints_continue_token_by_token(runs, tmp_path):
    done = run(tmp_path, "--checkpoint", runs / "causal", "--prompt", "Say: ", "--num", 2, "--length", 12,
               "run.name=causal")
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path, "causal")
    assert summary["num_tokens"] == 24 and all(text.startswith("Say: ") for text in summary["texts"])
    assert "tokens 7/7" in done.stdout


@pytest.mark.parametrize("config", ["the checkpoint's", "its run's file"])
def test_the_sampled_run_keeps_its_folder_to_itself(runs, tmp_path, config):
    save_config(CONFIG, tmp_path / "config.yaml")
    arguments = [] if config == "the checkpoint's" else ["--config", "config.yaml"]
    done = run(tmp_path, "--checkpoint", runs / "diffusion", "--num", 1, *arguments)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("sample-") and load_config(folder / "config.yaml").run.name == ""


def test_a_folder_of_a_training_run_is_refused(runs, tmp_path):
    trained = tmp_path / "runs" / "mine"
    trained.mkdir(parents=True)
    (trained / "decides.json").write_text("{}")
    done = run(tmp_path, "--checkpoint", runs / "diffusion", "--num", 1, "run.name=mine")
    assert done.returncode == 2 and "run.name: " in done.stderr and "choose another run.name" in done.stderr
    assert [path.name for path in trained.iterdir()] == ["decides.json"]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--checkpoint", "nowhere"), "--checkpoint nowhere: no checkpoint there"),
    (("--checkpoint", "{diffusion}", "--prompt", "x" * 30), "--prompt has 30 tokens and --length is 24"),
    (("--checkpoint", "{diffusion}", "--num", "0"), "--num must be at least 1"),
    (("--checkpoint", "{diffusion}", "--length", "-5"), "--length must be at least 1, or 0"),
    (("--checkpoint", "{causal}", "--html", "page.html"), "--html shows denoising steps"),
    (("--checkpoint", "{causal}", "--live"), "--live shows denoising steps"),
    (("--checkpoint", "{diffusion}", "denoise.step=4"), "did you mean denoise.steps?"),
    (("--checkpoint", "{diffusion}", "grpo.prompt_tokens=23"), "below data.block_size (24)"),
])
def test_a_users_mistake_is_one_line_and_exit_code_2(runs, refused, arguments, message):
    places = {"diffusion": runs / "diffusion", "causal": runs / "causal"}
    assert message in refused("sample", *(argument.format(**places) for argument in arguments))
