"""Every pipeline by its name: `python -m pipelines grpo ...`, installed as the command `grpo-diffusion grpo ...`.

1. A pipeline runs as `__main__`, exactly as `python pipelines/grpo.py` would.
2. What is offered is what the folder holds: a file that can be run.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def pipelines() -> dict[str, str]:
    """Name -> first line of what it does, of every file here that can be run."""
    files = sorted(Path(__file__).resolve().parent.glob("[a-z]*.py"))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in files}
    return {name: text.splitlines()[0].strip('"') for name, text in texts.items() if "\n    launch(main" in text}


def run() -> None:
    """Run the pipeline that the first argument names; without one, say which there are."""
    name, found = (sys.argv[1] if len(sys.argv) > 1 else ""), pipelines()
    if name not in found:
        wanted = name in ("", "-h", "--help")
        lines = [f"  {known:10} {line}" for known, line in found.items()]
        print("usage: grpo-diffusion PIPELINE [--config FILE] [section.key=value ...]\n\n" + "\n".join(lines)
              if wanted else f"error: no pipeline {name}; there are {', '.join(found)}",
              file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    sys.argv[:2] = [f"grpo-diffusion {name}"]
    runpy.run_module(f"pipelines.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
