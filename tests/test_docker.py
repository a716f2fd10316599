"""The images, the compose cluster and the RayJob, as far as they can be checked without an engine."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from grpo.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
QUANTITIES = {...: (int, str)}
POD = {"spec": {
    "securityContext": {"fsGroup": int},
    "containers": [{
        "name": str, "image": str, "ports": [{"containerPort": int, "name": str}], "env": [{"name": str, "value": str}],
        "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
        "volumeMounts": [{"name": str, "mountPath": str}]}],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str},
                 "emptyDir": {"medium": str, "sizeLimit": (int, str)}}]}}
GROUP = {"rayStartParams": {...: str}, "template": POD}
RAY_JOB = {"apiVersion": str, "kind": str, "metadata": {"name": str}, "spec": {
    "entrypoint": str, "runtimeEnvYAML": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int, "rayClusterSpec": {
        "rayVersion": str, "headGroupSpec": GROUP, "workerGroupSpecs": [
            {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, **GROUP}]}}}
"""What rayjob.yaml may hold, `...` being any name: the part that it uses of KubeRay's schema of ray.io/v1."""


class Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, as engines do."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key stands twice among {keys}"
        return super().construct_mapping(node, deep)


def read(name):
    return yaml.load((DOCKER / name).read_text(), Strict)


def instructions(word):
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    return [line.split(None, 1)[1] for line in text.splitlines() if line.startswith(f"{word} ")]


def option(command, name):
    return re.search(rf"{name}[= ](\S+)", command)[1]


def options(command):
    return re.findall(r"--[a-z-]+", command)


def test_the_image_pins_what_the_constraints_pin():
    arguments = dict(line.split("=", 1) for line in instructions("ARG"))
    assert arguments["TORCH"] == PINS["torch"]
    assert f"TORCH:-{PINS['torch']}" in (DOCKER / "install.sh").read_text()
    assert f"torch=={PINS['torch']}" in (ROOT / "Makefile").read_text()
    assert arguments["PYTHON"] in ("3.11", "3.12", "3.13")
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]


def test_what_the_image_copies_exists_and_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert set(copied) == kept and all((ROOT / source).exists() for source in copied)
    packages = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert set(re.findall(r'"(\w+)"', packages)) <= set(copied)


def test_the_image_installs_torch_first_and_everything_pinned(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\ncat > /dev/null\n')
    stub.chmod(0o755)
    (tmp_path / "grpo-diffusion").symlink_to(stub)
    calls = tmp_path / "calls"
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}

    def install(**variables):
        return subprocess.run(["sh", str(DOCKER / "install.sh")], env=environment | variables, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL)

    assert install(VARIANT="gpu", TORCH_INDEX="https://index").returncode == 0
    assert calls.read_text().splitlines() == [
        f"-m pip install --index-url https://index torch=={PINS['torch']}", "-m pip install -c constraints.txt .", "-",
        "grpo --print-config"]
    refused = install(VARIANT="tpu")
    assert refused.returncode == 2 and refused.stderr == "error: VARIANT must be cpu or gpu, got tpu\n"


def test_compose_services_find_each_other():
    services = read("compose.yaml")["services"]
    head, worker, mlflow = (services[name]["command"] for name in ("head", "worker", "mlflow"))
    gcs, dashboard, tracking = option(head, "--port"), option(head, "--dashboard-port"), option(mlflow, "--port")
    assert option(worker, "--address") == services["worker"]["environment"]["RAY_ADDRESS"] == f"head:{gcs}"
    for name in ("head", "worker"):
        assert services[name]["environment"]["MLFLOW_TRACKING_URI"] == f"http://mlflow:{tracking}"
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "disabled"
    assert f"mlflow:{tracking}" in option(mlflow, "--allowed-hosts").split(",")
    assert services["head"]["ports"] == [f"127.0.0.1:{dashboard}:{dashboard}"]
    assert services["mlflow"]["ports"] == [f"127.0.0.1:{tracking}:{tracking}"]
    assert services["head"]["healthcheck"]["test"][-1] == f"localhost:{gcs}"
    assert {gcs, dashboard, tracking} == set(instructions("EXPOSE")[0].split())
    for name, service in services.items():
        assert set(service["depends_on"] if "depends_on" in service else ()) <= services.keys() - {name}
        assert service["volumes"] == ["shared:/shared"] and service["image"] == "grpo-diffusion:cpu"
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert option(mlflow, "--backend-store-uri").startswith("sqlite:////shared/")
    overrides = read("compose.gpu.yaml")["services"]
    assert overrides.keys() == services.keys() and all(each["build"]["args"]["VARIANT"] == "gpu"
                                                       for each in overrides.values())


@pytest.mark.parametrize("service", ["head", "worker", "mlflow"])
def test_compose_commands_have_options_that_exist(service):
    """Asked of the pinned versions' own command lines."""
    command = shlex.split(read("compose.yaml")["services"][service]["command"])
    if command[0] == "ray":
        from ray.scripts.scripts import cli
    else:
        from mlflow.cli import cli
    known = [name for parameter in cli.commands[command[1]].params for name in parameter.opts]
    assert [each for each in options(" ".join(command)) if each not in known] == []


def misfits(value, shape, path=""):
    """Paths of what is not as its shape says."""
    if isinstance(shape, dict) and isinstance(value, dict):
        return [odd for key, part in value.items()
                for odd in (misfits(part, shape.get(key, shape.get(...)), f"{path}.{key}"))]
    if isinstance(shape, list) and isinstance(value, list):
        return [odd for index, part in enumerate(value) for odd in misfits(part, shape[0], f"{path}[{index}]")]
    types = shape if isinstance(shape, tuple) else (shape,)
    return [] if type(value) in types else [path]


def test_the_ray_job_is_one():
    job = read("rayjob.yaml")
    assert misfits(job, RAY_JOB) == [] and (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "grpo-diffusion:cpu"
        assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert {each["name"]: each["containerPort"] for each in head["ports"]} == {
        "gcs-server": 6379, "dashboard": 8265, "client": 10001}  # names by which the operator finds them
    assert any("install" in line and " wget " in line for line in instructions("RUN"))  # what its probes call
    assert all(each["minReplicas"] <= each["replicas"] <= each["maxReplicas"] for each in cluster["workerGroupSpecs"])
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_the_ray_jobs_command_is_a_config_that_holds():
    program, pipeline, *arguments = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    assert f'{program} = "pipelines.__main__:run"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "pipelines" / f"{pipeline}.py").exists() and arguments[0] == "--config"
    config = load_config(ROOT / arguments[1], arguments[2:])
    assert config.run.output == "/shared/runs" and config.run.name and config.cluster.placement == "SPREAD"
