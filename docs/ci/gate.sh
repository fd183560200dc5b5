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
# What an earlier run in this workspace left is no result of this one.
rm -f "$OUT/gate/report.md" "$OUT/compare/report.md" "$OUT/comment.md"
worst=0

# 1 (failed) outranks 2 and 4 (could not be run), these outrank 3 (inconclusive), that outranks 0.
rank() { case $1 in 0) echo 0 ;; 3) echo 1 ;; 4) echo 2 ;; 1) echo 4 ;; *) echo 3 ;; esac; }
note() {
    local code=$1 what=$2
    echo "$what: exit code $code" | tee -a "$OUT/summary.txt"
    if [ "$(rank "$code")" -gt "$(rank "$worst")" ]; then worst=$code; fi
}

: >"$OUT/summary.txt"
# --force: an equal export that is kept may be an earlier revision's.
llama-onnx export "$MODEL" "$OUT/export" --precision "$PRECISION" --target "$TARGET" --provider "$EXPORT_PROVIDER" --force
code=$?
note "$code" export
if [ "$code" -ne 0 ]; then exit "$worst"; fi

llama-onnx bench --model "$MODEL" --exported "$OUT/export" --precision "$PRECISION" --target "$TARGET" \
    --provider "$PROVIDER" --profile "$PROFILE" --wait "$WAIT" --report-dir "$OUT/gate"
gate=$?
note "$gate" gate

if [ -n "$BASE_EXPORT" ]; then
    # A comparison that was cut off goes on, unless it was of other files.
    files=$(grep -hE 'sha256|spec_digest' "$BASE_EXPORT/manifest.json" "$OUT/export/manifest.json" 2>/dev/null | cksum)
    if [ -f "$OUT/compare/comparison.json" ] || [ "$(cat "$OUT/compare.files" 2>/dev/null)" != "$files" ]; then
        rm -rf "$OUT/compare"
    fi
    echo "$files" >"$OUT/compare.files"
    mode=$PROFILE
    if [ "$mode" = smoke ]; then mode=quick; fi
    llama-onnx compare --base "$BASE_EXPORT,provider=$PROVIDER" --candidate "$OUT/export,provider=$PROVIDER" \
        --model "$MODEL" --mode "$mode" --pairs "$PAIRS" --wait "$WAIT" --resume --out "$OUT/compare"
    compare=$?
    note "$compare" compare
fi

# One comment for the pull request, of the part that decided; on a tie the comparison, it says what this change did.
part=gate
if [ -n "$BASE_EXPORT" ] && [ "$(rank "$compare")" -ge "$(rank "$gate")" ]; then part=compare; fi
report=$OUT/$part/report.md
if [ ! -f "$report" ]; then report=$OUT/summary.txt; fi # it ended before it could report
cat "$report" >"$OUT/comment.md"
exit "$worst"
