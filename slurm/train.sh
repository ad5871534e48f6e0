#!/bin/bash
# Trains on a Slurm cluster, one process for each srun task:
#   sbatch [sbatch's options] slurm/train.sh [options of the training]
#   sbatch --nodes 2 --ntasks-per-node 2 --time 10 slurm/train.sh --config smoke --run_dir runs/smoke
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-gpu 8 --time 1:00:00 slurm/train.sh --config mnist      (one task for each GPU)
# From any folder: relative paths begin where sbatch was called. The same command again continues the run in the same --run_dir.
# Before the time limit, and when the job is preempted with a grace time, the run saves, ends with 85, and the job is requeued.

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
MAX_REQUEUES=${MAX_REQUEUES:-20} # after so many restarts, of any kind, the job ends, so that no mistake runs for ever
PYTHON=${PYTHON:-}               # empty: the active virtual or conda environment's, else the checkout's .venv, else python3
# module load cuda
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between nodes, where the host names' own is the wrong one
# export MASTER_ADDR=...                                 # rank zero's node, where node names do not resolve
# ----------------------------------------------------------------------------------------------------------------------------------------

REQUEUE_STATUS=85 # of the training: saved, and wants to run on

say() { printf 'train.sh: %s\n' "$*" >&2; }

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    say "this is a batch script; submit it: sbatch [sbatch's options] $0 [options of the training]"
    exit 2
fi

# Slurm runs a copy of this script from a folder of its own; only the controller knows the original, and shows it with its arguments.
job=$(scontrol --details show job "$SLURM_JOB_ID") || job=
script=$(sed -n 's/^ *Command=//p' <<<"$job" | head -n 1)
[[ $script == /* ]] || script=$SLURM_SUBMIT_DIR/$script
checkout=${script%%/slurm/train.sh*}
[[ -f $checkout/mnist_dist/train.py ]] || checkout=$SLURM_SUBMIT_DIR
if [[ -f $checkout/mnist_dist/train.py ]]; then
    export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} # an environment with torch will do; the package need not be installed in it
fi

# -P: a folder mnist_dist where sbatch was called is not the package.
find_python() {
    local candidate candidates=()
    if [[ -n $PYTHON ]]; then
        candidates+=("$PYTHON")
    else
        [[ -z ${VIRTUAL_ENV:-} ]] || candidates+=("$VIRTUAL_ENV/bin/python")
        [[ -z ${CONDA_PREFIX:-} ]] || candidates+=("$CONDA_PREFIX/bin/python")
        candidates+=("$checkout/.venv/bin/python" python3)
    fi
    for candidate in "${candidates[@]}"; do
        candidate=$(command -v "$candidate") || continue
        if "$candidate" -P -c 'import sys; from importlib.util import find_spec as find
sys.exit(not all(map(find, ("torch", "accelerate", "mnist_dist"))))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "no Python 3.11 or newer with torch, accelerate and mnist_dist among: ${candidates[*]}"
    say "activate the environment before sbatch, or set PYTHON to its python, or run make in the checkout"
    return 2
}
python=$(find_python)

# Not --kill-on-bad-exit=1 (nor a site's default of it): the first rank that ends with 85 would make srun send TERM to those still on their
# way out, one could die of it, and 143 would hide the 85. --wait alone ends what a lost rank leaves hanging; it is also how long rank zero
# may go on when the others have finished.
steps=(--kill-on-bad-exit=0 --wait=120 --export=ALL)

# A job that was submitted from within another one inherits that one's variables, and srun takes them for options. So what this job was
# given comes from the controller where it has that.
read_field() { grep -Eo "\b$1=[^ ]*" <<<"$job" | head -n 1 | cut -d= -f2 || true; }
tasks=$(read_field NumTasks)
cpus=$(read_field CPUs/Task)
if [[ -n $(read_field HetJobId) ]]; then
    say "job $SLURM_JOB_ID is heterogeneous, and srun would start its first component only: submit a job of a single component"
    exit 2
fi
if [[ $tasks =~ ^[0-9]+$ && $cpus =~ ^[0-9]+$ ]]; then
    [[ ${SLURM_NTASKS:-$tasks} == "$tasks" ]] || unset SLURM_NTASKS
    [[ ${SLURM_CPUS_PER_TASK:-$cpus} == "$cpus" ]] || SLURM_CPUS_PER_TASK=$cpus
    grep -Eq '\b(TresPer[A-Za-z]+|JOB_GRES)=[^ ]*gpu' <<<"$job" || unset SLURM_GPUS_ON_NODE
    steps+=(--nodes="$SLURM_NNODES")
else
    tasks=${SLURM_NTASKS:-} # an odd controller: the environment will do
fi
if [[ -n ${SLURM_STEP_NODELIST:-} ]]; then
    unset SLURM_DISTRIBUTION SLURM_HOSTFILE SLURM_HET_SIZE # those of a step: this job was submitted in it
fi
gpus=$((${SLURM_GPUS_ON_NODE:-0} * SLURM_NNODES))
if [[ -n ${SLURM_NTASKS:-} && $(read_field NtasksPerN:B:S:C) == 0:* && $SLURM_NTASKS -lt $gpus ]]; then
    say "$SLURM_NTASKS tasks would leave some of the $gpus GPUs idle: say sbatch --ntasks-per-node, $SLURM_GPUS_ON_NODE for one task for each"
    exit 2
fi
# What other launchers may have left in the environment is not about this job.
for name in $(compgen -e); do
    [[ ! $name =~ ^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|OMPI_COMM_.*|MV2_COMM_.*|PMI_.*|MPI_LOCAL.*)$ ]] || unset "$name"
done

if [[ -z ${SLURM_NTASKS:-} && $gpus -gt 0 ]]; then
    # GPUs asked for, and no number of tasks: one for each GPU, which share the node's CPUs.
    steps+=(--ntasks-per-node="$SLURM_GPUS_ON_NODE" --ntasks="$gpus")
    cpus=$((SLURM_CPUS_ON_NODE / SLURM_GPUS_ON_NODE))
    if ((cpus == 0)); then
        say "$SLURM_GPUS_ON_NODE tasks share $SLURM_CPUS_ON_NODE CPUs on a node: sbatch --cpus-per-gpu N would give each its own"
        steps+=(--overcommit)
    else
        steps+=(--cpus-per-task="$cpus")
    fi
else
    [[ -z $tasks ]] || steps+=(--ntasks="$tasks")
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        steps+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun inherits it only before Slurm 22.05
    fi
fi

# scancel, requeue and preemption send TERM to this shell, too; it stays to hear how the training ended.
trap : TERM
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST with $python"
status=0
# A rank that has not yet come as far as its own signal handlers would die of USR1, and the job with it: until then it is ignored, and one
# rank that heard it is enough. TERM may end such a rank.
# shellcheck disable=SC2016  # the inner shell expands "$@"
srun "${steps[@]}" bash -c 'trap "" USR1; exec "$@"' bash "$python" -P -m mnist_dist.train "$@" || status=$?

if ((status == REQUEUE_STATUS)); then
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
        say "started $((${SLURM_RESTART_COUNT:-0} + 1)) times, and not requeued again (MAX_REQUEUES is $MAX_REQUEUES); submit it again to go on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "requeued"
    else
        say "could not be requeued; submit it again to go on"
    fi
fi
exit "$status"
