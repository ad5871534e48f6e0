#!/usr/bin/env bash
# A real, private Slurm cluster of three small nodes on this one machine, to try jobs, signals and requeues on.
#   slurm/dev_cluster.sh up [--install]    start it (--install: with apt-get, where packages are missing) and print how to use it
#   slurm/dev_cluster.sh status            its nodes; exit status 0 only if it is up
#   slurm/dev_cluster.sh down              cancel its jobs, stop its daemons, remove its folder
#   slurm/dev_cluster.sh fetch DIR         put a newer Slurm, Debian 13's, into the new folder DIR; nothing is installed (Debian, amd64).
#                                          With DIR/bin first in PATH, the cluster and all of Slurm's commands are of that one
# Runs as root or as an ordinary user, whose jobs alone it then runs. Touches nothing of a Slurm or munge that the machine may have.
set -euo pipefail

FOLDER=${DEV_CLUSTER_DIR:-${TMPDIR:-/tmp}/mnist-dist-slurm-$UID}
PORT=${DEV_CLUSTER_PORT:-31700} # slurmctld; the nodes use the next three (jobs on them take ports from 15000 to 30005)
UP_TIMEOUT_S=60
DOWN_TIMEOUT_S=60

MARK=.mnist-dist-dev-cluster # only a folder with this file is ever removed

PACKAGES=(slurmctld slurmd slurm-client munge)
COMMANDS=(slurmctld slurmd sbatch srun salloc scontrol squeue sinfo sacct scancel munged)
NEWER=trixie                      # Debian 13: Slurm 24.11
PLUGINS=usr/lib/x86_64-linux-gnu/slurm-wlm # of a fetched Slurm, below its root

# Node names that resolve, or no rank could find rank zero by its node's name: an address is the one name that every machine resolves
# without a change to /etc/hosts, and all of 127.0.0.0/8 is this machine.
NODES='127.0.0.[1-3]'
NODE_LIST=(127.0.0.1 127.0.0.2 127.0.0.3)

# A relative folder would mean another one to each daemon. Debian keeps daemons where an ordinary user's PATH does not look.
FOLDER=$(realpath --canonicalize-missing -- "$FOLDER")
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$FOLDER/slurm.conf

fail() {
    printf 'dev_cluster.sh: %s\n' "$1" >&2
    exit "${2:-1}"
}

list_missing() {
    local command
    for command in "${COMMANDS[@]}"; do
        command -v "$command" >/dev/null || echo "$command"
    done
}

require_packages() {
    local missing
    missing=$(list_missing)
    [[ -n $missing ]] || return 0
    local install="apt-get install --yes --no-install-recommends ${PACKAGES[*]}"
    if [[ ${1:-} == --install ]]; then
        local sudo=
        ((UID == 0)) || sudo=sudo
        $sudo apt-get update --quiet
        # shellcheck disable=SC2086  # words, on purpose
        $sudo env DEBIAN_FRONTEND=noninteractive $install
        missing=$(list_missing)
    fi
    [[ -z $missing ]] || fail "not found: ${missing//$'\n'/, }. On Debian and Ubuntu: $install (as root)" 2
}

is_up() {
    [[ -f $SLURM_CONF ]] && [[ $(timeout 10 scontrol ping 2>/dev/null) == *"is UP"* ]] || return 1
    # Down, drained, not responding (*) or unknown nodes are no cluster to rely on; allocated and completing ones are.
    local states
    states=$(timeout 10 sinfo --noheader --Node --partition=main --format=%T) || return 1
    [[ $(wc -l <<<"$states") -eq ${#NODE_LIST[@]} ]] && ! grep -Eqv '^(idle|allocated|mixed|completing)$' <<<"$states"
}

# The folder that `fetch` has filled, where Slurm's commands are of it; else nothing.
find_fetched() {
    local command
    command=$(realpath -- "$(command -v slurmctld)")
    [[ ! -d ${command%/bin/slurmctld}/root/$PLUGINS ]] || echo "${command%/bin/slurmctld}"
}

# Its packages with all that they need, libc included, are unpacked and not installed. Each program is told where its loader and its
# libraries are; what runs as a job on the cluster is the machine's own.
fetch() {
    local folder mirror apt command
    [[ $(dpkg --print-architecture 2>/dev/null) == amd64 ]] || fail "fetch takes Debian's packages for amd64" 2
    folder=$(realpath --canonicalize-missing -- "$1")
    # shellcheck disable=SC2016  # apt-get expands these
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' 'Origin: Debian' | awk '$2 !~ /-/ { print $1; exit }')
    [[ -n $mirror ]] || fail "apt-get knows no archive of Debian (run apt-get update); fetch is for Debian" 2
    [[ $folder =~ ^[[:graph:]]+$ && ! -e $folder ]] || fail "folder $folder: expected a new one, without spaces" 2
    mkdir -p "$folder" || fail "folder $folder cannot be made" 2
    # shellcheck disable=SC2064  # this folder, whatever the name means at the end
    trap "rm -rf -- '$folder'" EXIT
    mkdir -p "$folder"/{root,bin} "$folder"/apt/{lists,archives}/partial
    : >"$folder/apt/status" # nothing is installed
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $NEWER main" >"$folder/apt/sources.list"
    apt=(apt-get --quiet --option "Dir::State=$folder/apt" --option "Dir::State::status=$folder/apt/status" --option "Dir::Cache=$folder/apt"
        --option "Dir::Etc::SourceList=$folder/apt/sources.list" --option Dir::Etc::SourceParts=/dev/null --option Debug::NoLocking=1)
    "${apt[@]}" update
    "${apt[@]}" install --download-only --yes --no-install-recommends "${PACKAGES[@]}" patchelf
    find "$folder/apt/archives" -name '*.deb' -exec dpkg-deb --extract {} "$folder/root" \;
    local root=$folder/root library loader
    library=$root/${PLUGINS%/*} loader=$root/usr/lib64/ld-linux-x86-64.so.2
    for command in "${COMMANDS[@]}" slurmstepd; do
        cp --dereference "$(compgen -G "$root/usr/sbin/$command-wlm" || compgen -G "$root/usr/*bin/$command")" "$folder/bin/$command"
        "$loader" --library-path "$library" "$root/usr/bin/patchelf" --set-interpreter "$loader" \
            --force-rpath --set-rpath "$library:$root/$PLUGINS" "$folder/bin/$command"
    done
    rm -r "$folder/apt"
    trap - EXIT
    echo "$("$folder/bin/slurmctld" -V) is in $folder. To use it:"
    echo "    export PATH=$folder/bin:\$PATH"
}

write_config() {
    # Slurm binds to every address, or, by NoInAddrAny and NoCtldInAddrAny, to the one that the host's own name resolves to: there is no
    # option for another. So where that is a loopback address, all of the cluster (srun included) listens there alone. Where it is not,
    # the daemons must listen everywhere to be reached on loopback; they answer only to those who have this cluster's munge key.
    local host address fetched listen=NoInAddrAny,NoCtldInAddrAny
    fetched=$(find_fetched)
    host=$(hostname)
    address=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }') || true
    if [[ $address != 127.* ]]; then
        address=127.0.0.1 listen=
        echo "note: $host does not resolve to a loopback address, so Slurm's ports $PORT-$((PORT + 3)) are open on all addresses" >&2
    fi
    {
        cat <<END
ClusterName=dev
SlurmctldHost=${host%%.*}($address)
SlurmctldPort=$PORT
# The ports of a job follow from its number, so two clusters that are neighbours here begin with different ones. So does one that was
# put up again: run folders remember their jobs by number.
FirstJobId=$((($(date +%s) / 60 % 600 * 100 + PORT % 100) * 1000 + 1))
${fetched:+PluginDir=$fetched/root/$PLUGINS}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits until its old credential is surely void: 121 s by default, 11 s here.
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=10
${listen:+CommunicationParameters=$listen}

StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd-%n.log

# No cgroups: they need root, and are one for the whole machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
# A finished job can be asked about for ten minutes.
MinJobAge=600

# Look for jobs to start every 2 s, not every 60.
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A job that asked for a signal (--signal) gets it when it is preempted, too, and has its partition's GraceTime to end.
SlurmctldParameters=preempt_send_user_signal

# CPUs, memory and GPUs are made up: nothing is bound or limited, so a node is as good as the machine.
SlurmdParameters=config_overrides
GresTypes=gpu
END
        local index
        for index in "${!NODE_LIST[@]}"; do
            echo "NodeName=${NODE_LIST[index]} NodeHostname=${host%%.*} NodeAddr=$address Port=$((PORT + 1 + index))" \
                "CPUs=2 RealMemory=65536 Gres=gpu:2 State=UNKNOWN"
        done
        cat <<END
PartitionName=main Nodes=$NODES Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=$NODES MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF
END
    } >"$SLURM_CONF"
    # slurmd looks for the machine's cgroups though none are used, and in many containers does not find what it wants. Newer than 22.05 can
    # be told to leave them alone; 22.05 looks least far with this plugin.
    local version plugin=disabled
    version=$(slurmd -V | grep -Eo '[0-9]+\.[0-9]+' | head -n 1)
    [[ ${version%%.*} -ge 23 ]] || plugin=cgroup/v1
    echo "CgroupPlugin=$plugin" >"$FOLDER/cgroup.conf"
    # Slurm counts GPUs by their device files; it opens these only to confine jobs by cgroups, which are off.
    touch "$FOLDER/gpu0" "$FOLDER/gpu1"
    echo "Name=gpu File=$FOLDER/gpu[0-1]" >"$FOLDER/gres.conf"
}

start_daemons() {
    munged --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" --pid-file="$FOLDER/munged.pid" \
        --log-file="$FOLDER/munged.log" --seed-file="$FOLDER/munged.seed" || return
    slurmctld || return
    local node fetched
    fetched=$(find_fetched)
    for node in "${NODE_LIST[@]}"; do
        slurmd ${fetched:+-d "$fetched/bin/slurmstepd"} -N "$node" || return
    done
}

# The process ids of this cluster's daemons (they have files of its folder open) and of its jobs.
list_processes() {
    local pid file
    {
        find /proc/[0-9]*/fd -lname "$FOLDER/*" 2>/dev/null | cut -d/ -f3 | sort -u | while read -r pid; do
            grep -Eqx 'munged|slurmctld|slurmd|slurmstepd' "/proc/$pid/comm" 2>/dev/null && echo "$pid"
        done
        # A shell in which SLURM_CONF was exported is no job; what runs as a task has SLURM_TASK_PID as well.
        grep -lzFx "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | while read -r file; do
            grep -qz '^SLURM_TASK_PID=' "$file" 2>/dev/null && cut -d/ -f3 <<<"$file"
        done
    } | sort -u || true
}

# wait_until SECONDS COMMAND...: until the command succeeds; fails where it does not in that time.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.5
    done
}

is_queue_empty() { [[ -z $(timeout 10 squeue --noheader 2>/dev/null) ]]; }
are_processes_gone() { [[ -z $(list_processes) ]]; }

print_usage() {
    cat <<END
the cluster is up: nodes $NODES of 2 CPUs, partitions main and urgent (which preempts main). To use it:
    export SLURM_CONF=$SLURM_CONF
    sbatch --nodes 2 --ntasks-per-node 2 slurm/train.sh --config smoke
    slurm/dev_cluster.sh down
END
}

up() {
    require_packages "$@"
    if is_up; then
        echo -n "already up; "
        print_usage
        return
    fi
    # slurm.conf cannot quote spaces, and a socket's path has at most 107 characters.
    [[ $FOLDER =~ ^[[:graph:]]{1,70}$ ]] ||
        fail "folder $FOLDER: expected a path without spaces, of at most 70 characters; set DEV_CLUSTER_DIR" 2
    remove_cluster # what one that died has left
    local port
    for ((port = PORT; port <= PORT + ${#NODE_LIST[@]}; port++)); do
        ! (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "port $port is taken; set DEV_CLUSTER_PORT to the first of four free ones" 2
    done
    rmdir "$FOLDER" 2>/dev/null || true # an empty one may be used
    umask 022
    mkdir "$FOLDER" || fail "folder $FOLDER cannot be made, or is no cluster's; set DEV_CLUSTER_DIR" 2
    touch "$FOLDER/$MARK"
    mkdir --mode=700 "$FOLDER/state"
    (umask 077 && head -c 128 /dev/urandom >"$FOLDER/munge.key")
    write_config
    if ! start_daemons || ! wait_until "$UP_TIMEOUT_S" is_up; then
        tail -n 15 "$FOLDER"/*.log >&2 || true
        timeout 10 sinfo --Node --long >&2 || true
        remove_cluster
        fail "the cluster did not come up; above, the ends of its daemons' logs"
    fi
    print_usage
}

status() {
    is_up || fail "no cluster is up in $FOLDER"
    sinfo --Node --format='%N %P %T'
}

remove_cluster() {
    [[ -f $FOLDER/$MARK && -O $FOLDER ]] || return 0
    if [[ $(timeout 10 scontrol ping 2>/dev/null) == *"is UP"* ]]; then
        squeue --noheader --format=%A | xargs --no-run-if-empty scancel 2>/dev/null || true
        wait_until "$DOWN_TIMEOUT_S" is_queue_empty || echo "note: not all jobs ended; they are killed" >&2
    fi
    local signal
    for signal in TERM KILL; do
        # shellcheck disable=SC2046  # words, on purpose
        kill -s "$signal" $(list_processes) 2>/dev/null || true
        ! wait_until 10 are_processes_gone || break
    done
    are_processes_gone || fail "these processes do not end: $(list_processes | xargs)"
    rm -rf -- "$FOLDER"
}

down() {
    [[ -e $FOLDER ]] || {
        echo "no cluster in $FOLDER"
        return
    }
    [[ -f $FOLDER/$MARK && -O $FOLDER ]] || fail "$FOLDER is no cluster of yours; nothing is removed" 2
    remove_cluster
    echo "the cluster is down"
}

case "$*" in
up) up ;;
"up --install") up --install ;;
status) status ;;
down) down ;;
fetch\ ?*) fetch "${*:2}" ;;
*) fail "usage: dev_cluster.sh up [--install] | status | down | fetch DIR" 2 ;;
esac
