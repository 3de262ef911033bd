#!/usr/bin/env bash
# One run over the hosts named, started by ssh; ends when all of them have.
#
#   HOSTS="node-0 node-1" deploy/nodes/ssh.sh generate --model DIR --input FILE --output FILE --tp 4
#
# The first host has rank 0 and the files. PORT: of the rendezvous, on the first host. SETTINGS:
# variables for all of them (SETTINGS="GLOO_SOCKET_IFNAME=eth1"). ONECAST: the command there.
set -euo pipefail
: "${HOSTS:?names the hosts, the first one with the files: HOSTS=\"node-0 node-1\"}"
read -ra hosts <<<"$HOSTS"
read -ra settings <<<"${SETTINGS:-}"
mode=${1:?generate or serve}
shift

processes=()
# A closed terminal is a SIGHUP there, which ends a run in order.
trap 'kill "${processes[@]}" 2>/dev/null || true' INT TERM
for number in "${!hosts[@]}"; do
  there=(exec env "${settings[@]}" "${ONECAST:-onecast}" "$mode"
    --nnodes "${#hosts[@]}" --node-rank "$number"
    --rdzv-endpoint "${hosts[0]}:${PORT:-29500}" "$@")
  ssh -tt -o BatchMode=yes "${hosts[number]}" "$(printf '%q ' "${there[@]}")" </dev/null &
  processes+=($!)
done
status=0
for process in "${processes[@]}"; do
  wait "$process" || status=$?
done
exit "$status"
