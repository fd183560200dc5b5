#!/usr/bin/env bash
# The gate as a plain script, for any CI system: the checks and the latency of this revision's export, then a paired
# comparison with the base revision's. Everything that a reader needs lands in $OUT; the exit code is the worst of both:
#   0 passed   1 failed   2 wrong input   3 inconclusive   4 this machine cannot run what was asked
# Settings, all by environment variable:
#   MODEL      checkpoint folder, .gguf file, hub id or 'demo'      BASE_EXPORT      export of the base (unset: no comparison)
#   PRECISION  fp32, fp16, bf16, int8, int4                         TARGET           ort, tensorrt, plain
#   PROVIDER   cpu, cuda, tensorrt, tensorrt-rtx                    EXPORT_PROVIDER  any, cuda: what the graph has to run on
#   PROFILE    smoke, standard, full                                PAIRS            interleaved pairs (10)
#   OUT        folder of the reports (gate-out)                     WAIT             seconds to wait for another measurement (3600)
set -uo pipefail

MODEL=${MODEL:-demo}
PRECISION=${PRECISION:-fp32}
TARGET=${TARGET:-ort}
PROVIDER=${PROVIDER:-cpu}
EXPORT_PROVIDER=${EXPORT_PROVIDER:-any}
PROFILE=${PROFILE:-standard}
PAIRS=${PAIRS:-10}
WAIT=${WAIT:-3600}
OUT=${OUT:-gate-out}
BASE_EXPORT=${BASE_EXPORT:-}

mkdir -p "$OUT"
worst=0

# 1 (failed) outranks 2 and 4 (could not be run), these outrank 3 (inconclusive), that outranks 0.
rank() { case $1 in 0) echo 0 ;; 3) echo 1 ;; 4) echo 2 ;; 1) echo 4 ;; *) echo 3 ;; esac; }
note() {
    local code=$1 what=$2
    echo "$what: exit code $code" | tee -a "$OUT/summary.txt"
    if [ "$(rank "$code")" -gt "$(rank "$worst")" ]; then worst=$code; fi
}

: >"$OUT/summary.txt"
llama-onnx export "$MODEL" "$OUT/export" --precision "$PRECISION" --target "$TARGET" --provider "$EXPORT_PROVIDER"
code=$?
note "$code" export
if [ "$code" -ne 0 ]; then exit "$worst"; fi

llama-onnx bench --model "$MODEL" --exported "$OUT/export" --provider "$PROVIDER" --profile "$PROFILE" \
    --wait "$WAIT" --report-dir "$OUT/gate"
note $? gate

if [ -n "$BASE_EXPORT" ]; then
    mode=$PROFILE
    if [ "$mode" = smoke ]; then mode=quick; fi
    llama-onnx compare --base "$BASE_EXPORT,provider=$PROVIDER" --candidate "$OUT/export,provider=$PROVIDER" \
        --model "$MODEL" --mode "$mode" --pairs "$PAIRS" --wait "$WAIT" --resume --out "$OUT/compare"
    note $? compare
fi

# One comment for the pull request: the comparison first, it says what this change did.
for part in compare gate; do
    if [ -f "$OUT/$part/report.md" ]; then
        cat "$OUT/$part/report.md" >"$OUT/comment.md"
        break
    fi
done
exit "$worst"
