#!/usr/bin/env bash
# A Slurm of this machine alone, for tests: as many nodes and GPUs as are asked for, none of them real, all on loopback.
#   cluster.sh start FOLDER     prints what the environment needs, to be read by eval
#   cluster.sh stop FOLDER
# FOLDER keeps its state. NODES=2, GPUS=4 and CPUS=8 of each change its size. It needs root, slurm-wlm and munge.
set -euo pipefail
folder=$(realpath -m "${2:?a folder}")
nodes=${NODES:-2} gpus=${GPUS:-4} cpus=${CPUS:-8}
last=$((nodes - 1)) host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
hosts="# by tests/slurm/cluster.sh" # marks its lines of /etc/hosts

pids() { cat "$folder"/run/*.pid 2>/dev/null || true; }

alive() { for pid in $(pids); do kill -0 "$pid" 2>/dev/null && return 0; done; return 1; }

stop() {
  # jobs end first, or their slurmstepd would stay behind
  timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 80); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.25; done
  for pid in $(pids); do kill "$pid" 2>/dev/null || true; done
  for _ in $(seq 50); do alive || break; sleep 0.2; done
  rm -f "$folder"/run/*.pid
  # not by sed -i, which replaces the file: in a container it may be a mount
  left=$(grep -vF "$hosts" /etc/hosts) && echo "$left" > /etc/hosts
}

configure() {
  # Signals before a preemption go to jobs, as before the end of their time. Times are short, for tests. A requeued job
  # waits for its credential to expire.
  cat <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16917
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=3
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MinJobAge=300
GresTypes=gpu
CONF
  for node in $(seq 0 $last); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17100 + node)) CPUs=$cpus RealMemory=8000" \
      "Gres=gpu:fake:$gpus State=UNKNOWN"
  done
  echo "PartitionName=low Nodes=n[0-$last] Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=30"
  echo "PartitionName=high Nodes=n[0-$last] MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF"
}

start() {
  mkdir -p "$folder"/{run,state,log,bin}
  configure > "$SLURM_CONF"
  # a GPU is a character device with a number: copies of /dev/null
  for gpu in $(seq 0 $((gpus - 1))); do [ -c "$folder/gpu$gpu" ] || mknod -m 666 "$folder/gpu$gpu" c 1 3; done
  echo "NodeName=n[0-$last] Name=gpu Type=fake File=$folder/gpu[0-$((gpus - 1))]" > "$folder/gres.conf"
  echo "CgroupAutomount=no" > "$folder/cgroup.conf"
  for node in $(seq 0 $last); do echo "127.0.0.1 n$node $hosts" >> /etc/hosts; done
  # in sacct's place, which needs a database
  cat > "$folder/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
echo "JobID|State|NodeList"
while [ $# -gt 0 ]; do
  [ "$1" = -j ] && { squeue -h -r -t all -j "$2" -o '%i|%T|%N' 2>/dev/null; shift; }
  shift
done
exit 0
SACCT
  chmod +x "$folder/bin/sacct"
  [ -s "$folder/munge.key" ] || (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
  munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
  slurmctld -c
  for node in $(seq 0 $last); do mkdir -p "$folder/spool-n$node"; slurmd -N "n$node"; done
  for _ in $(seq 60); do
    [ "$(sinfo -h -N -o %T -p low 2>/dev/null | grep -c idle)" = "$nodes" ] && break
    sleep 0.5
  done
  [ "$(sinfo -h -N -o %T -p low | grep -c idle)" = "$nodes" ] || { tail -n 5 "$folder"/log/*.log >&2; stop; exit 1; }
  printf 'export SLURM_CONF=%q PATH=%q:"$PATH"\n' "$SLURM_CONF" "$folder/bin"
}

"${1:?start or stop}"
