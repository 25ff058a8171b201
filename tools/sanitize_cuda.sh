#!/usr/bin/env bash
# The CUDA kernels' unit tests under compute-sanitizer, on a machine with a GPU: accesses out of
# bounds, races in shared memory, reads of memory that nobody wrote, misused barriers. Left out are
# tests of large shapes and of many, which add minutes and no kernel, and the one of a call that is
# meant to fail.
#   tools/sanitize_cuda.sh [nibble_cuda_test [memcheck|racecheck|initcheck|synccheck ...]]
set -euo pipefail
cd "$(dirname "$0")/.."
binary=${1:-build/release/src/cuda/nibble_cuda_test}
tools=("${@:2}")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
filter='-*AllShapes*:*AtEveryEdge*:*OfAnySize*:*Large*:*Statistics*:Runtime.AnErrorIsReportedOnce'
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for tool in "${tools[@]}"; do
  seconds=$SECONDS
  if ! compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 10 \
      "$binary" --gtest_brief=1 --gtest_filter="$filter" > "$log" 2>&1; then
    cat "$log"
    echo "$tool: failed"
    exit 1
  fi
  echo "$tool: $(tail -n 1 "$log"), $((SECONDS - seconds)) s"
done
