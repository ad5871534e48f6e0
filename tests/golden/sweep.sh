#!/bin/bash

# Parameters
#SBATCH --account=team
#SBATCH --array=0-5%2
#SBATCH --comment='it is; "$HOME" #1'
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=8
#SBATCH --exclude='node[3-5],node9'
#SBATCH --gpus-per-node=2
#SBATCH --job-name=digits
#SBATCH --mail-type=END
#SBATCH --mem=65536M
#SBATCH --nice
#SBATCH --nodelist=node1
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/FOLDER/runs/sweep/slurm/%A_%a.log
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=course
#SBATCH --signal=USR1@300
#SBATCH --time=90

# setup
source CHECKOUT/launch/policy.sh || exit
MAX_REQUEUES=5
export SUBMITIT_LOG_LEVEL=WARNING
srun_options=(--cpu-bind=cores)
export PYTHONPATH=CHECKOUT${PYTHONPATH:+:$PYTHONPATH}
export WANDB_RUN_GROUP=sweep

# command
export SUBMITIT_EXECUTOR=slurm
run_training PYTHON -P -u -m submitit.core._submit /FOLDER/runs/sweep/slurm

