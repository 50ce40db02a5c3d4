#!/usr/bin/env bash
# A SLURM cluster of this machine alone, with a partition `high` whose jobs take the place of those in `low`.
#
#   tests/executors/slurm.sh FOLDER PORT
#
# FOLDER is empty and gets everything, the process ids in *.pid included; ending those processes ends it all. Needs root and the Debian
# packages slurmctld, slurmd, slurm-client and munge. Returns when the node takes jobs.
set -euo pipefail
folder=${1:?folder} port=${2:?port}
mkdir -p "$folder"/{state,spool,munge}
host=$(hostname)
export SLURM_CONF=$folder/slurm.conf

cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthInfo=socket=$folder/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/node.pid
SlurmctldLogFile=$folder/controller.log
SlurmdLogFile=$folder/node.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$host PriorityTier=10 MaxTime=INFINITE State=UP
CONF

dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chmod 400 "$folder/munge/key"
chmod 755 "$folder" "$folder/munge"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge.pid" \
  --log-file="$folder/munge.log" --seed-file="$folder/munge/seed"
slurmctld
slurmd
for _ in $(seq 60); do
  [ "$(sinfo --noheader --partition low --format %t)" = idle ] && exit 0
  sleep 0.5
done
tail -n 20 "$folder"/*.log >&2
exit 1
