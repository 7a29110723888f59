#!/bin/sh
# The study on plain hosts that ssh reaches: cluster/hosts.sh HOST [HOST ...], the first is this one.
# Needs: the project and its store (SDAUG_STORE) at the same path of a disk that all hosts share and
# that knows file locks; its .venv with the extra 'cluster'.
cd "$(dirname "$0")/.." || exit 1
export RAY_USAGE_STATS_ENABLED=0
ray="$PWD/.venv/bin/ray"
first=$1
shift
"$ray" start --head --node-ip-address "$first" --port 6379 || exit 1
for host in "$@"; do
    ssh "$host" "$ray" start --address "$first:6379"
done
.venv/bin/python run_all.py --profile thesis --ray auto
code=$?
for host in "$@"; do
    ssh "$host" "$ray" stop
done
"$ray" stop
exit $code
