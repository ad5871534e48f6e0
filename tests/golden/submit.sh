#!/bin/bash

# Parameters
#SBATCH --account=team
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=2
#SBATCH --job-name=digits
#SBATCH --mem=65536M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output='/FOLDER/runs/a b/slurm/%j.log'
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --time=90

# setup
# scancel, requeue and preemption send TERM to this shell, too; it stays to hear how the training ended.
trap : TERM
export SUBMITIT_LOG_LEVEL=WARNING
export PYTHONPATH=CHECKOUT${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/FOLDER/runs/a b/slurm/%j_%t_log.out' --kill-on-bad-exit=0 --wait=120 --export=ALL --output=all --cpus-per-task=8 bash -c 'trap "" USR1; exec "$@"' bash PYTHON -P -u -m submitit.core._submit '/FOLDER/runs/a b/slurm'


# teardown
status=$?
if [ "$status" -eq 85 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 5 ]; then
        echo "launch: not requeued again (max_requeues is 5); submit it again to go on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "launch: requeued"
    else
        echo "launch: could not be requeued; submit it again to go on"
    fi
fi
exit "$status"
