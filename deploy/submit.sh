#!/usr/bin/env bash
# Submit a training run to a Ray cluster: deploy/submit.sh RUN CONFIG [train options]
#
# RUN names the run: submitted again under it (after a crash, a lost node, a stopped job), training goes on
# from the newest checkpoint; once done, it ends at once. CONFIG is a preset, or a YAML file below this
# directory, which travels to the cluster. Needs RAY_API_SERVER_ADDRESS (http://head:8265) and, where the
# cluster asks for a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; `ray` on the PATH. Follows the log; exit
# status 0 if the run has ended well.
set -euo pipefail

if (($# < 2)); then
  echo "usage: deploy/submit.sh RUN CONFIG [train options], e.g. deploy/submit.sh mine quickstart --set seed=1" >&2
  exit 2
fi
run=$1
shift
cd "$(dirname "$0")/.."
exec ray job submit \
  --submission-id "$run-$(date +%Y%m%d-%H%M%S)" \
  --metadata-json "{\"run\": \"$run\"}" \
  --runtime-env deploy/runtime_env.yaml \
  --working-dir . \
  --entrypoint-num-cpus "${MARA_DRIVER_CPUS:-0}" \
  -- mara-rl train "$@" --run "$run"
