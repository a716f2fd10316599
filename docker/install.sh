#!/bin/sh
# What the image installs, as a script, so that it can be run anywhere: into the Python that comes first on PATH.
#
#   VARIANT      cpu or gpu
#   TORCH        version of torch, as in constraints.txt
#   TORCH_INDEX  package index of torch, if not pip's own
set -eu
cd "$(dirname "$0")/.."
export VARIANT="${VARIANT:-cpu}"
case "$VARIANT" in cpu|gpu) ;; *) echo "error: VARIANT must be cpu or gpu, got $VARIANT" >&2; exit 2 ;; esac
# torch first, alone: a range would let another package choose another build of it
python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==${TORCH:-2.13.0}"
python -m pip install -c constraints.txt .
python - <<'END'
import os, ray, mlflow, torch
import actors.generator, grpo.model, pipelines.launch
found = torch.version.cuda
if os.environ["VARIANT"] == "gpu" and not found:
    raise SystemExit("error: this torch was built without CUDA; give TORCH_INDEX the index of a CUDA build")
print(f"torch {torch.__version__} (CUDA {found}), ray {ray.__version__}, mlflow {mlflow.__version__}")
END
grpo-diffusion grpo --print-config > /dev/null
