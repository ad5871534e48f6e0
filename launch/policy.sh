# shellcheck shell=bash
# How a batch job trains: what srun starts and inherits, and whether the job is requeued. Sourced by slurm/train.sh and by the scripts of
# launch.submit, launch.sweep and launch.prove. A batch script of your own may use it, too:
#   #SBATCH --signal=USR1@120 --requeue --open-mode=append
#   source CHECKOUT/launch/policy.sh
#   run_training python -m mnist_dist.train --config smoke

set -euo pipefail

MAX_REQUEUES=${MAX_REQUEUES:-20} # after so many restarts, of any kind, the job ends, so that no mistake runs for ever
REQUEUE_STATUS=85                # of the training: saved, and wants to run on
STOPPED_STATUS=143               # of the training: saved, and was told to end
srun_options=()                  # more of srun's; an empty array is unset to bash before 4.4

say() { printf 'launch: %s\n' "$*" >&2 || true; } # a log whose disk is full ends no job

read_field() { grep -Eo "\b$1=[^ ]*" <<<"$job" | head -n 1 | cut -d= -f2 || true; }

# Slurm ends a job that it requeues or preempts with TERM, at once. Who asks it is not to die of that before the answer is there.
ask_slurm() { (trap '' TERM && scontrol "$@"); }

# What Slurm says of this job alone, on one line: of an array's last job it would show the whole array.
read_job() {
    job=$(ask_slurm --oneliner --details show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID ") || job=
    tasks=$(read_field NumTasks)
    cpus=$(read_field CPUs/Task)
}

# A job that was submitted from within another one inherits that one's variables, and srun and the training take them for their own. So
# what this job was given comes from the controller where it has that.
drop_inherited() {
    if [[ $tasks =~ ^[0-9]+$ ]]; then
        [[ ${SLURM_NTASKS:-$tasks} == "$tasks" ]] || unset SLURM_NTASKS
        # The controller has no number where the CPUs of a task follow from its GPUs.
        [[ ! $cpus =~ ^[0-9]+$ || ${SLURM_CPUS_PER_TASK:-$cpus} == "$cpus" ]] || SLURM_CPUS_PER_TASK=$cpus
        grep -Eq '\b(TresPer[A-Za-z]+|JOB_GRES)=[^ ]*gpu' <<<"$job" || unset SLURM_GPUS_ON_NODE SLURM_NTASKS_PER_GPU
        local kind
        for kind in Job: Node:_PER_NODE Socket:_PER_SOCKET Task:_PER_TASK; do
            grep -Eq "\bTresPer${kind%%:*}=[^ ]*gpu" <<<"$job" || unset "SLURM_GPUS${kind#*:}"
        done
        # srun refuses two kinds of memory.
        for kind in Node:NODE CPU:CPU; do
            [[ $(read_field "MinMemory${kind%%:*}") =~ ^[1-9] ]] || unset "SLURM_MEM_PER_${kind#*:}"
        done
        for kind in MemPerTres:MEM_PER_GPU CpusPerTres:CPUS_PER_GPU TresPerTask:TRES_PER_TASK; do
            [[ -n $(read_field "${kind%%:*}") ]] || unset "SLURM_${kind#*:}"
        done
        [[ -n $(read_field ArrayJobId) ]] || unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
        steps+=(--nodes="$SLURM_NNODES")
    else
        tasks=${SLURM_NTASKS:-} # an odd controller: the environment will do
    fi
    if [[ -n ${SLURM_STEP_NODELIST:-} ]]; then
        # Those of a step: this job was submitted in it.
        unset SLURM_DISTRIBUTION SLURM_HOSTFILE SLURM_HET_SIZE "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_GPU_BIND@}"
    fi
    unset SRUN_CPUS_PER_TASK # choose_tasks says what this job has
    local name
    for name in $(compgen -e); do # what other launchers may have left
        [[ ! $name =~ ^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|OMPI_COMM_.*|MV2_COMM_.*|PMI_.*|MPI_LOCAL.*)$ ]] || unset "$name"
    done
}

choose_tasks() {
    local gpus=$((${SLURM_GPUS_ON_NODE:-0} * SLURM_NNODES)) per_node kinds
    per_node=$(read_field NtasksPerN:B:S:C)
    # What each node has: of GPUs for a task, or for the job, the nodes may have different numbers.
    kinds=$({ grep -Eo '\bGRES=[^ ]*gpu[^ ]*' <<<"$job" || true; } | sed 's/([^)]*)//g' | sort -u | wc -l)
    if [[ -z ${SLURM_NTASKS:-} && $kinds -gt 1 ]]; then
        say "the nodes have different numbers of GPUs in this job: say sbatch --gpus-per-node, for as many on each"
        exit 2
    fi
    if [[ -n ${SLURM_NTASKS:-} && $kinds -lt 2 && $per_node == 0:* && $SLURM_NTASKS -lt $gpus ]]; then
        say "$SLURM_NTASKS tasks would leave some of the $gpus GPUs idle: say sbatch --ntasks-per-node=$SLURM_GPUS_ON_NODE for one task for each GPU"
        exit 2
    fi
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
}

# leave_if_done COMMAND...: end this job of a chain where COMMAND, which is launch.chain, says that the jobs before it left nothing to do.
leave_if_done() {
    local status=0
    "$@" || status=$?
    ((status != 0)) || exit 0
    ((status != 2)) || exit 2
}

# run_training COMMAND...: COMMAND as each task of this job. Ends the script with the training's status, or has the job requeued.
run_training() {
    local job tasks cpus status=0
    if [[ ! $MAX_REQUEUES =~ ^[0-9]{1,9}$ ]]; then
        say "MAX_REQUEUES is '$MAX_REQUEUES'; expected a whole number, such as 20"
        exit 2
    fi
    # Not --kill-on-bad-exit=1 (nor a site's default of it): the first rank that ends with 85 would make srun send TERM to those still on
    # their way out, one could die of it, and 143 would hide the 85. --wait alone ends what a lost rank leaves hanging; it is also how long
    # rank zero may go on when the others have finished.
    local steps=(--kill-on-bad-exit=0 --wait=120 --export=ALL)
    read_job
    if [[ -n $(read_field HetJobId) ]]; then
        say "job $SLURM_JOB_ID is heterogeneous, and srun would start its first component only: submit a job of a single component"
        exit 2
    fi
    drop_inherited
    choose_tasks
    # scancel, requeue and preemption send TERM to this shell, too; it stays to hear how the training ended.
    trap : TERM
    say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST with $1"
    # A rank that has not yet come as far as its own signal handlers would die of USR1, and the job with it: until then it is ignored, and
    # one rank that heard it is enough. TERM may end such a rank.
    # shellcheck disable=SC2016  # the inner shell expands "$@"
    srun "${steps[@]}" ${srun_options[@]+"${srun_options[@]}"} bash -c 'trap "" USR1; exec "$@"' bash "$@" || status=$?
    # Preempted with a grace time, a job that ends in it has failed to Slurm, which requeues only one that it has to end itself.
    ((status != STOPPED_STATUS)) || ! is_preempted || status=$REQUEUE_STATUS
    ((status != REQUEUE_STATUS)) || requeue
    exit "$status"
}

is_preempted() {
    read_job
    [[ $(read_field PreemptTime) =~ ^[0-9] && $(read_field JobState) == RUNNING ]]
}

requeue() {
    # Of an array's last job the number is the array's, and all of it would be requeued.
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
    if ((${SLURM_RESTART_COUNT:-0} >= 10#$MAX_REQUEUES)); then
        say "not requeued again (max_requeues is $MAX_REQUEUES); the same command, or the next job of its chain, resumes the run"
    elif ask_slurm requeue "${id:-$SLURM_JOB_ID}"; then
        say "requeued"
    elif read_job && [[ $(read_field JobState) == PENDING ]]; then
        say "requeued already"
    else
        say "could not be requeued; the same command, or the next job of its chain, resumes the run"
    fi
}
