#!/bin/sh
# Builds the fuzz targets and runs each (or those named) for SECONDS; fails on the first finding.
# usage: fuzz/run.sh SECONDS [TARGET...]      e.g. fuzz/run.sh 600 gguf_fuzz
# An input of a few kilobytes that asks for 64 MiB at once is a finding, as a crash or a hang is.
# Inputs that reach new code are kept in build/fuzz/corpus, findings in build/fuzz/findings.
set -eu
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
seconds=$1
shift
cd "$(dirname "$0")/.."

cmake --preset fuzz >/dev/null
cmake --build --preset fuzz --target fuzzers

[ $# -gt 0 ] || set -- $(cd fuzz && ls *_fuzz.cc | sed 's/\.cc$//')
for target in "$@"; do
  name=${target%_fuzz}
  corpus=build/fuzz/corpus/$name
  findings=build/fuzz/findings/$name
  mkdir -p "$corpus" "$findings"
  seeds=fuzz/corpus/$name
  [ -d "$seeds" ] || seeds=
  case $name in
    gguf) max_len=4096 ;;       # several keys and tensors of every kind
    tokenizer) max_len=2048 ;;  # a text of many pieces
    packed) max_len=16384 ;;    # a model's metadata and the manifest of its weights
    *) max_len=1024 ;;          # some blocks of the largest format
  esac
  echo "== $target, $seconds s"
  build/fuzz/fuzz/"$target" -max_total_time="$seconds" -max_len=$max_len -rss_limit_mb=2048 \
    -malloc_limit_mb=64 -timeout=10 -print_final_stats=1 -verbosity=0 -print_funcs=0 \
    -artifact_prefix="$findings/" "$corpus" $seeds
done
