"""Every way to start a pipeline, from every place, and what a user's mistake looks like."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from grpo.checkpoint import save_checkpoint
from grpo.config import Config, DataSection, GrpoSection, ModelSection, RunSection
from grpo.config_file import to_dict
from grpo.model import GPT
from grpo.tokenizer import build_tokenizer
from pipelines.__main__ import pipelines
from pipelines.launch import NO_DASHBOARD, launch, quiet, start_ray
from pipelines.prepare import prepare

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = sorted(pipelines())
LOOKING = ("sample", "evaluate")
"""Pipelines that look at a checkpoint, whose config is their default."""
TINY = ["data.block_size=16", "grpo.prompt_tokens=4", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
        "pretrain.batch_size=8", "pretrain.eval_rows=8", "pretrain.eval_every=10000", "run.threads=1"]


def start(command, folder, **environment):
    environment = os.environ | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small generator, made with a block that is longer than that of configs/tiny.yaml."""
    folder, tokenizer = tmp_path_factory.mktemp("small"), build_tokenizer("bytes")
    config = Config(run=RunSection(name="trained"), data=DataSection(block_size=256),
                    model=ModelSection(n_layer=1, n_head=2, n_embd=16), grpo=GrpoSection(prompt_tokens=60))
    model = GPT(config.model, tokenizer.vocabulary, block_size=256)
    return save_checkpoint(folder / "checkpoint", model, config=to_dict(config), tokenizer=tokenizer)


@pytest.mark.parametrize("name", LOOKING)
def test_the_config_of_a_checkpoint_is_where_overrides_begin(name, checkpoint, tmp_path):
    command = [sys.executable, str(ROOT / "pipelines" / f"{name}.py"), "--checkpoint", str(checkpoint)]
    done = start([*command, "--print-config", "grpo.prompt_tokens=100"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    config = yaml.safe_load(done.stdout)
    assert (config["data"]["block_size"], config["model"]["n_embd"], config["grpo"]["prompt_tokens"]) == (256, 16, 100)
    assert config["run"]["name"] == ""  # the folder is the checkpoint's run's
    done = start([*command, "--print-config", "grpo.prompt_tokens=300"], tmp_path)
    assert done.returncode == 2 and "below data.block_size (256)" in done.stderr and done.stderr.count("\n") == 1
    assert "default: the checkpoint's own config" in " ".join(start([*command, "--help"], tmp_path).stdout.split())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_starts_as_a_script_and_as_a_module_from_any_folder(name, checkpoint, tmp_path):
    """`python pipelines/grpo.py` puts pipelines/ first on sys.path, where grpo.py would hide the package grpo."""
    options = ["--print-config", "run.seed=7", *(["--checkpoint", str(checkpoint)] if name in LOOKING else [])]
    forms = [([str(ROOT / "pipelines" / f"{name}.py")], tmp_path), ([f"pipelines/{name}.py"], ROOT),
             (["-m", f"pipelines.{name}"], ROOT)]
    for arguments, folder in forms:
        done = start([sys.executable, *arguments, *options], folder)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert yaml.safe_load(done.stdout)["run"]["seed"] == 7
        if name not in ("grpo", "pretrain"):
            break  # one form shows that the file begins as it must


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The project elsewhere, marked: its training loops keep one checkpoint instead of two, wherever they run."""
    folder = tmp_path_factory.mktemp("elsewhere") / "project"
    for room in ("grpo", "actors", "pipelines", "configs"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for loop, mine, marked in (("pretrain_loop", "\nKEEP = 2\n", "\nKEEP = 1\n"), ("rounds", ", grpo.keep, ", ", 1, ")):
        file = folder / "pipelines" / f"{loop}.py"
        assert file.read_text().count(mine) == 1
        file.write_text(file.read_text().replace(mine, marked))
    return folder


def kept(folder):
    return sorted(os.listdir(folder / "checkpoints"))


@pytest.mark.ray
def test_a_project_that_is_not_installed_runs_its_own_code_in_ray_workers(copied, tmp_path):
    command = [sys.executable, str(copied / "pipelines" / "pretrain.py"), *TINY, "run.name=here", "run.cache=cache",
               "pretrain.steps=6", "pretrain.checkpoint_every=2"]
    done = start(command, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert kept(tmp_path / "runs" / "here") == ["step-00000006"]  # two would be the installed project's


@pytest.fixture(scope="module")
def installed(copied, tmp_path_factory):
    """The project installed into a folder of its own, without its dependencies, from an archive of what it packages."""
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copied / name)
    folder = tmp_path_factory.mktemp("site")
    done = start([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
                  "--disable-pip-version-check", f"--target={folder}", str(copied)], copied)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_installed_project_runs_from_any_folder_with_its_own_configs(installed, tmp_path):
    for command in ([str(installed / "bin" / "grpo-diffusion"), "grpo"], [sys.executable, "-m", "pipelines.grpo"],
                    [sys.executable, "-m", "pipelines", "grpo"]):
        for options in ([], ["--config", "configs/tiny.yaml"]):
            done = start([*command, *options, "--print-config", "run.seed=7"], tmp_path, PYTHONPATH=str(installed))
            assert (done.returncode, done.stderr) == (0, ""), command
            config = yaml.safe_load(done.stdout)
            assert config["run"]["seed"] == 7 and config["model"]["n_embd"] == 96  # as configs/tiny.yaml has it
    for arguments, code, said in (([], 0, "pretrain"), (["pretain"], 2, "error: no pipeline pretain; there are ")):
        done = start([str(installed / "bin" / "grpo-diffusion"), *arguments], tmp_path, PYTHONPATH=str(installed))
        assert done.returncode == code and said in (done.stderr if code else done.stdout)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_folder_that_takes_no_file_is_said_before_anything_starts(name, checkpoint, refused, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    options = ["--checkpoint", str(checkpoint)] if name in LOOKING else []
    bad = (["run.output=file"], ["run.output=file/deeper"], ["run.output=link"], ["run.output=.", "run.name=file"])
    for settings in bad if name == "sample" else bad[:1]:
        assert refused(name, *options, *settings).startswith(f"error: run.output: cannot write to {tmp_path}")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


@pytest.mark.parametrize("name", sorted(set(PIPELINES) - {"sample"}))
def test_a_cache_that_takes_no_file_is_said_before_anything_starts(name, checkpoint, refused, tmp_path):
    (tmp_path / "file").write_text("")
    options = ["--checkpoint", str(checkpoint)] if name in LOOKING else []
    told = refused(name, *options, "run.cache=file/deeper")
    assert told.startswith(f"error: run.cache: cannot write to {tmp_path / 'file' / 'deeper'} (Not a directory)")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("page, told", [
    ("file/page.html", "cannot write to {folder}/file (Not a directory): choose another folder"),
    (".", ". is a folder: name a file in it"),
])
def test_a_page_that_cannot_be_written_is_said_before_anything_is(page, told, checkpoint, refused, tmp_path):
    (tmp_path / "file").write_text("")
    found = refused("sample", "--checkpoint", checkpoint, "--html", page, "run.cache=file/unused")
    assert found == f"error: --html: {told.format(folder=tmp_path)}\n" and os.listdir(tmp_path) == ["file"]


def test_workers_get_absolute_paths_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["pretrain.mode=token_classifier", "pretrain.teacher=runs/one", "grpo.base=~/two",
             "sweep.space={denoise.remasking_model: {choice: ['', 3, runs/three]}, run.seed: {grid: [1, 2]}}"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
    got = []
    launch(lambda config, args: got.append(config), "Pretrain.")
    (config,) = got
    assert config.pretrain.teacher == str(tmp_path / "runs/one") and config.grpo.base == str(Path.home() / "two")
    assert config.denoise.remasking_model == "" and config.run.cache == RunSection().cache
    assert config.sweep.space == {"denoise.remasking_model": {"choice": ["", 3, str(tmp_path / "runs/three")]},
                                  "run.seed": {"grid": [1, 2]}}


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def joined(monkeypatch):
    """Addresses that `start_ray` asks Ray to join, which it does not, and whether workers expect a dashboard there."""
    import ray

    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(
        (options["address"], not NO_DASHBOARD.items() <= options["runtime_env"]["env_vars"].items())))
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    return asked


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1", "nowhere.invalid:1"])
def test_an_address_where_no_cluster_answers_is_one_line(address, joined, monkeypatch):
    address = address.format(port=free_ports(1)[0])
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS={address}: no cluster answers .* unset RAY_ADDRESS") as error:
        start_ray()
    assert "\n" not in str(error.value) and not joined


def test_a_cluster_that_answers_is_joined(joined, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in ("", "local", "auto", f"127.0.0.1:{server.getsockname()[1]}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            start_ray()
    assert joined == [("local", False), ("local", False), ("auto", True), ("auto", True)]


@pytest.mark.parametrize("address, token, mode, wanted", [
    ("head:6379", True, None, "token"), ("head:6379", True, "disabled", "disabled"), ("head:6379", False, None, None),
    ("local", True, None, None),
])
def test_a_cluster_that_asks_for_the_token_gets_it(address, token, mode, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr("os.environ", {"HOME": str(tmp_path), "RAY_ADDRESS": address})
    if mode:
        os.environ["RAY_AUTH_MODE"] = mode
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0123")
    quiet()
    assert os.environ.get("RAY_AUTH_MODE") == wanted


def test_where_no_dashboard_is_its_lack_is_an_answer(monkeypatch):
    """What Ray Train's controller looks for until it ends; without an address it is a search of 40 s."""
    from ray.util.state import get_actor
    from ray.util.state.exception import ServerUnavailable

    for name, value in NO_DASHBOARD.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ServerUnavailable):
        get_actor("0" * 32)


@pytest.fixture(scope="module")
def job_server():
    """A head node of our own on spare ports, ended by its session id: `ray stop` would end everybody's."""
    home = tempfile.mkdtemp(prefix="ray-")  # short, for the paths of sockets
    port, dashboard, client, agent, agent_grpc, metrics, environment = free_ports(7)
    binaries = Path(sys.executable).parent
    ray = str(binaries / "ray")
    with open(f"{home}/log", "w") as log:
        head = subprocess.Popen(
            [ray, "start", "--head", "--block", f"--port={port}", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={home}",
             f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
             f"--metrics-export-port={metrics}", f"--runtime-env-agent-port={environment}", "--num-cpus=3",
             "--object-store-memory=200000000", "--disable-usage-stats"],
            stdout=log, stderr=log, start_new_session=True, cwd=home,  # jobs start there, and read code that lies there
            env=os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"})  # jobs say `python`
    address = f"http://127.0.0.1:{dashboard}"
    try:
        end = time.monotonic() + 120
        while start([ray, "job", "list", "--address", address], home).returncode:
            assert head.poll() is None and time.monotonic() < end, Path(home, "log").read_text()
            time.sleep(1)
        yield [ray, "job"], address
    finally:
        for pid in session_members(head.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(home, ignore_errors=True)


def session_members(session):
    listed = subprocess.run(["ps", "-axo", "pid="], capture_output=True, text=True, check=True).stdout
    members = []
    for pid in map(int, listed.split()):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(pid) == session:
                members.append(pid)
    return members


def tracked(output):
    """Name, status and logged rounds of every run in the store."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return [(run.info.run_name, run.info.status,
             [point.step for point in client.get_metric_history(run.info.run_id, "reward_accuracy")]) for run in found]


@pytest.mark.ray
def test_a_job_stops_between_rounds_and_the_next_one_goes_on_in_the_same_run(copied, installed, job_server, tmp_path):
    """The first one with a working directory, the next one of an installed project; workers run the job's own code."""
    job, address = job_server
    rounds, warmup, output, folder = 80, 2, tmp_path / "runs", tmp_path / "runs" / "job"
    tokenizer = build_tokenizer("bytes")
    base = GPT(ModelSection(n_layer=1, n_head=2, n_embd=16), tokenizer.vocabulary, block_size=16)
    save_checkpoint(tmp_path / "base", base, config={}, tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(2000)))
    settings = [*TINY, "run.name=job", f"run.output={output}", f"run.cache={tmp_path / 'cache'}",
                f"data.source={tmp_path / 'text.txt'}", f"grpo.base={tmp_path / 'base'}", f"grpo.rounds={rounds}",
                "grpo.prompts=4", "grpo.group_size=4", "grpo.residual=8", "reward.hidden=16", "reward.batch_size=16",
                f"reward.warmup_rounds={warmup}", "reward.min_steps=1", "reward.max_steps=2", "evaluation.samples=20",
                "evaluation.judge_steps=4", "evaluation.judge_layers=1", "evaluation.judge_width=16"]

    def submit(variables, *command):
        environment = json.dumps({"env_vars": variables})
        return [*job, "submit", "--address", address, "--runtime-env-json", environment, *command, *settings]

    with open(tmp_path / "log", "w") as log:  # which `ray job submit` follows until the job ends
        following = subprocess.Popen(
            submit({"RAY_JOB_STOP_WAIT_TIME_S": "60"}, "--working-dir", ".", "--submission-id", "first", "--", "python",
                   "pipelines/grpo.py"), cwd=copied, stdout=log, stderr=log)
    said, end = (tmp_path / "log").read_text, time.monotonic() + 180
    while "adversarial rounds 0/" not in said() or not list(folder.glob("checkpoints/step-*")):
        assert following.poll() is None and time.monotonic() < end, said()
        time.sleep(0.1)
    done = start([*job, "stop", "--address", address, "first"], copied)
    assert "stopped" in done.stdout + done.stderr
    (last,) = kept(folder)
    stopped = int(last.removeprefix("step-"))
    assert following.wait(60) == 0 and f"stopped after round {stopped}; the same command goes on" in said(), said()
    assert 0 < stopped < rounds and not (folder / "summary.json").exists()
    assert tracked(output) == [("job", "KILLED", list(range(1, stopped + 1)))]

    program = str(installed / "bin" / "grpo-diffusion")
    done = start(submit({"PYTHONPATH": str(installed)}, "--", program, "grpo"), tmp_path)
    assert done.returncode == 0 and f"adversarial rounds {stopped}/" in done.stdout, done.stdout + done.stderr
    assert json.loads((folder / "summary.json").read_text())["rounds"] == rounds
    assert kept(folder) == [f"step-{rounds + warmup:08}"]
    assert tracked(output) == [("job", "FINISHED", list(range(1, rounds + warmup + 1)))]


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory):
    """A cache that holds the default data, so that a mistake beyond the data needs no Ray."""
    cache = tmp_path_factory.mktemp("cache")
    prepare(DataSection(), str(cache))
    return cache


@pytest.mark.ray
@pytest.mark.parametrize("overrides, message", [
    (["pretrain.stepz=3"], "command line: unknown key pretrain.stepz; did you mean pretrain.steps?"),
    (["pretrain.steps=many"], "command line: pretrain.steps: Value 'many'"),
    (["pretrain.steps"], "override 'pretrain.steps' must read section.key=value"),
    (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
    (["model.n_embd=97"], "model.n_embd must be a positive multiple of model.n_head (4), got 97"),
    (["model.attention=causal"], "model.sampler must be false when model.attention is causal"),
    (["data.source=nowhere.txt"], "data.source: no file at nowhere.txt"),
    (["data.tokenizer=cl100k_base"], "data.tokenizer=cl100k_base cannot be fetched: connect to the network once"),
    (["pretrain.eval_rows=100000"], "the validation split holds"),
    (["pretrain.mode=token_classifier"], "pretrain.teacher must be the path of a generator checkpoint"),
    (["pretrain.mode=token_classifier", "pretrain.teacher=nowhere"], "/nowhere: no checkpoint there"),
    (["pretrain.mode=token_classifier", "pretrain.teacher=small"], "expected shape [96, 96], found [16, 16]"),
])
def test_a_mistake_is_one_line_and_exit_code_2(prepared, refused, monkeypatch, tmp_path, overrides, message):
    if "pretrain.teacher=small" in overrides:
        tokenizer = build_tokenizer("bytes")
        model = GPT(ModelSection(n_layer=3, n_head=4, n_embd=16), tokenizer.vocabulary, block_size=64)
        save_checkpoint(tmp_path / "small", model, config={}, tokenizer=tokenizer)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert message in refused("pretrain", *overrides, f"run.cache={prepared}")
    assert not (tmp_path / "runs").exists()
