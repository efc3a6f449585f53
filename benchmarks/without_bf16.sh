#!/usr/bin/env bash
# Runs a command as on a CPU with vectors of 512 bits and no native bf16, on one that has both. Linux, as root:
#   benchmarks/without_bf16.sh python benchmarks/train_step.py --compile
# vitcmp reads the flags of /proc/cpuinfo, numba and oneDNN (torch's products in bf16) read these variables.
set -euo pipefail
flags="$(mktemp)"
sed 's/ avx512_bf16//; s/ amx_[a-z0-9]*//g' /proc/cpuinfo > "$flags"
export ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI NUMBA_CPU_NAME=cascadelake
exec unshare --mount sh -c 'mount --bind "$0" /proc/cpuinfo && rm "$0" && exec "$@"' "$flags" "$@"
