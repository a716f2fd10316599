"""How every pipeline starts: command line, one-line errors, quiet libraries, and Ray.

1. `launch` turns a `ValueError` (something that a user wrote) into one line and exit code 2; anything else is our bug
   and keeps its traceback.
2. Environment variables that silence Ray are set before it is imported, and never override the user's.
3. Ray workers get the project's root on PYTHONPATH, so that a pipeline started from any directory, installed or not,
   finds `grpo`, `actors` and `pipelines` in its workers as well.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo.config import Config
from grpo.config_file import load_config, to_yaml, value_at, with_values

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # what books no GPU sees none
    "RAY_worker_niceness": "0",  # actors and ranks are the run itself; at Ray's 15 whatever else runs here stops them
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait stall every other worker on a shared machine
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning",
}
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:0"}
"""For a Ray without a dashboard: Ray Train asks it whether its controller lives, and at the end of a fit waits 12 s for
that answer. An address where nobody can listen is an answer."""
TOKEN = Path("~/.ray/auth_token")
"""Ray writes it with its first private cluster. A cluster that is started where there is one asks for it, and one that
asks for none takes it; but Ray's client sends it only where the environment says so."""
ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ("grpo.base", "pretrain.teacher", "denoise.remasking_model", "evaluation.scorer")
"""Keys that hold the path of a checkpoint."""
CONNECT_S = 5.0
"""Seconds that the cluster of RAY_ADDRESS has to answer a connection."""


def quiet() -> None:
    """Silence other libraries' noise, and let Ray show its token; call before importing ray."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not private_ray() and TOKEN.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def private_ray() -> bool:
    """Whether `start_ray` starts a Ray on this machine, which no node will join."""
    return (os.environ.get("RAY_ADDRESS") or "local") == "local"


def start_ray(num_cpus: int | None = None) -> None:
    """Attach to the cluster of RAY_ADDRESS or of `ray job submit`, else start a private one on this machine.

    Raises:
        ValueError: no cluster answers at RAY_ADDRESS.
    """
    import ray

    if ray.is_initialized():
        return
    # A job's own variables are in os.environ already; named twice they would be a conflict, even with equal values.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**{name: os.environ[name] for name in QUIET if name in os.environ}, "PYTHONPATH": path}
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "runtime_env": {"env_vars": variables}}
    if private_ray():
        variables |= NO_DASHBOARD
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
        return
    address = os.environ["RAY_ADDRESS"]
    try:
        if address != "auto":  # Ray itself would try for minutes
            parts = urlsplit(address if "://" in address else f"//{address}")
            socket.create_connection((parts.hostname, parts.port), CONNECT_S).close()
        ray.init(address="auto", **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"RAY_ADDRESS={address}: no cluster answers there ({str(error).splitlines()[0]}): give the "
                         "address of one that runs, or unset RAY_ADDRESS for a private one on this machine") from error


def _located(config: Config) -> Config:
    """With absolute paths of checkpoints, swept ones too: workers look for them from other folders."""
    located = lambda path: str(Path(path).expanduser().absolute()) if path and isinstance(path, str) else path  # noqa: E731
    swept = {
        key: {kind: [located(path) for path in paths] for kind, paths in given.items()} if key in CHECKPOINTS else given
        for key, given in config.sweep.space.items()
    }
    given = {key: located(value_at(config, key)) for key in CHECKPOINTS}
    return with_values(config, {**given, "sweep.space": swept}, "command line")


def _config_file(name: str) -> Path:
    """A config by its path; one that is not there may come with the project, wherever that is installed."""
    return Path(name) if Path(name).exists() or not (ROOT / name).is_file() else ROOT / name


def checkpoint_config(args: argparse.Namespace) -> Config:
    """The config that `--checkpoint` was made with."""
    from grpo.checkpoint import load_checkpoint
    from grpo.config_file import from_dict
    from grpo.run_checkpoints import find_checkpoint

    folder = find_checkpoint(args.checkpoint, "--checkpoint")
    return from_dict(load_checkpoint(folder).config, f"config of {folder}")


def launch(
    main: Callable[[Config, argparse.Namespace], Any],
    description: str,
    *,
    default: str = "configs/tiny.yaml",
    base: Callable[[argparse.Namespace], Config] | None = None,
    arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Parse the command line, run `main(config, args)`, exit with 0, or with 2 after one line for a user's mistake.

    Args:
        default: file that the config starts from without `--config`.
        base: what it starts from instead, in a pipeline that looks at another run. That run's `run.name` is not taken
            over, wherever the config comes from: the folder belongs to that run.
        arguments: adds the pipeline's own.
    """
    quiet()
    parser = argparse.ArgumentParser(
        description=description.strip().splitlines()[0],
        epilog="--print-config shows all keys with their values; grpo/config_*.py say what they mean.",
    )
    starts = "the checkpoint's own config" if base else f"{default}, which comes with the project"
    parser.add_argument("--config", default=None, help=f"YAML file (default: {starts})")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example grpo.group_size=16")
    if arguments:
        arguments(parser)
    args = parser.parse_intermixed_args()
    try:
        if base and not args.config:
            file, start = None, base(args)
        else:
            file, start = _config_file(args.config or default), None
        config = load_config(file, ["run.name=''", *args.overrides] if base else args.overrides, start)
        if args.print_config:
            print(to_yaml(config), end="")
            return
        main(_located(config), args)
    except ValueError as error:
        if os.environ.get("GRPO_TRACEBACK"):
            raise
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)  # a task's holds its traceback
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
