#!/usr/bin/env bash
# The tests marked slurm, on a cluster that is there for as long as they run: `make slurm-test`.
#   run.sh PYTHON [DRILLS]      with DRILLS of each kind of benchmarks/slurm_drills.py after them
set -euo pipefail
python=${1:?a Python} drills=${2:-}
here=$(dirname "${BASH_SOURCE[0]}")

without() { echo "slurm-test: $1; nothing was tested"; exit 0; }

there() { command -v slurmctld slurmd sbatch munged > /dev/null; }

if [ "$(id -u)" != 0 ]; then without "a cluster is started by root"; fi
if ! there; then
  command -v apt-get > /dev/null || without "Slurm isn't installed, and there is no apt-get"
  log=$(mktemp)
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
    > "$log" 2>&1 || without "slurm-wlm and munge can't be installed, see $log"
  rm "$log"
fi
folder=$(mktemp -d)
trap '"$here/cluster.sh" stop "$folder"; rm -rf "$folder"' EXIT
eval "$("$here/cluster.sh" start "$folder")"
"$python" -m pytest -q -m slurm tests/slurm
[ -z "$drills" ] || "$python" benchmarks/slurm_drills.py --drills "$drills"
