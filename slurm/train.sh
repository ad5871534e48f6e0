#!/bin/bash
# Trains on a Slurm cluster, one process for each srun task:
#   sbatch [sbatch's options] slurm/train.sh [options of the training]
#   sbatch --nodes 2 --ntasks-per-node 2 --time 10 slurm/train.sh --config smoke --run_dir runs/smoke
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-gpu 8 --time 1:00:00 slurm/train.sh --config mnist      (one task for each GPU)
# From any folder: relative paths begin where sbatch was called. The same command again continues the run in the same --run_dir.
# Before the time limit, and when the job is preempted with a grace time, the run saves, ends with 85, and the job is requeued. Where a
# site does not requeue, a chain of jobs does the same; each ends at once when nothing is left to do (docs/launching.md):
#   CHAIN=4711 sbatch --dependency=afterany:4711 [sbatch's options] slurm/train.sh [options of the training]

#SBATCH --job-name=mnist-dist
#SBATCH --output=%x-%j.out
# Without this each restart would empty the log of those before it.
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit; Slurm may be up to 60 s early, so a limit under 4 minutes wants a smaller number. It goes to the tasks of
# srun; "B:USR1" would go to this shell instead, which can do nothing with it while it waits for srun.
#SBATCH --signal=USR1@120

set -euo pipefail

# ---- What a site may have to set -------------------------------------------------------------------------------------------------------
export MAX_REQUEUES=${MAX_REQUEUES:-20} # after so many restarts, of any kind, the job ends, so that no mistake runs for ever
PYTHON=${PYTHON:-}                      # empty: the active virtual or conda environment's, else the checkout's .venv, else python3
SRUN_OPTIONS=${SRUN_OPTIONS:-}          # more options of srun, such as --cpu-bind=cores
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between nodes, where the host names' own is the wrong one
# export MASTER_ADDR=...                                 # rank zero's node, where node names do not resolve
# ----------------------------------------------------------------------------------------------------------------------------------------

fail() {
    printf 'train.sh: %s\n' "$@" >&2
    exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a batch script; submit it: sbatch [sbatch's options] $0 [options of the training]"

# Slurm runs a copy of this script from a folder of its own; only the controller knows the original, and shows it with its arguments.
job=$(scontrol show job "$SLURM_JOB_ID") || job=
script=$(sed -n 's/^ *Command=//p' <<<"$job" | head -n 1)
[[ $script == /* ]] || script=$SLURM_SUBMIT_DIR/$script
checkout=${script%%/slurm/train.sh*}
[[ -f $checkout/mnist_dist/train.py ]] || checkout=$SLURM_SUBMIT_DIR
if [[ -f $checkout/mnist_dist/train.py ]]; then
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} # an environment with torch will do; the package need not be installed in it
fi

if [[ -n $PYTHON ]]; then
    candidates=("$PYTHON")
else
    candidates=(${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} "$checkout/.venv/bin/python" python3)
fi
policy=
for candidate in "${candidates[@]}"; do
    python=$(command -v "$candidate") || continue
    # -P: a folder mnist_dist where sbatch was called is not the package.
    policy=$("$python" -P -c 'import sys; from importlib.util import find_spec as find
all(map(find, ("torch", "accelerate", "mnist_dist"))) or sys.exit(1)
print(*find("launch").submodule_search_locations)' 2>/dev/null) && break
done
[[ -n $policy ]] || fail "no Python 3.11 or newer with torch, accelerate and mnist_dist among: ${candidates[*]}" \
    "activate the environment before sbatch, or set PYTHON to its python, or install: pip install --editable $checkout"

# shellcheck source=launch/policy.sh
source "$policy/policy.sh"
[[ $job != *\ TimeLimit=00:0[0-3]:* ]] ||
    say "the time limit is under 4 minutes: without sbatch --signal=USR1@30, or so, the signal to save comes 120 s before it"
read -ra srun_options <<<"$SRUN_OPTIONS"
[[ -z ${CHAIN:-} ]] || leave_if_done "$python" -P -m launch.chain "$CHAIN" "$@"
run_training "$python" -P -m launch.training "$@"
