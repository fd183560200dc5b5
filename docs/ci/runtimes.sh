#!/usr/bin/env bash
# The upgrade gate for any CI system: where a change moves onnxruntime (or onnxruntime-gpu) in a lock file, the exported
# folder is run under both versions: is it still the model, and is it no slower? Exit codes as in gate.sh; 0 where the
# version is the same in both files.
#   usage: runtimes.sh LOCK_FILE_BEFORE LOCK_FILE_NOW
# Settings, by environment variable:
#   EXPORT   the exported folder                    MODEL     what it was exported from (checkpoint, hub id or 'demo')
#   PROVIDER cpu, cuda                              PAIRS     interleaved pairs, 0 for none (5)
#   OUT      folder of the reports (matrix-out)     WAIT      seconds to wait for another measurement (3600)
set -uo pipefail

before=${1:?give the lock file before the change}
now=${2:?give the lock file now}
: "${EXPORT:?give the exported folder}" "${MODEL:?give what it was exported from}"

# pip, uv and poetry write one of: onnxruntime==1.27.0 ; name = "onnxruntime" and on the next line version = "1.27.0"
pinned() {
    sed -nE -e 's/^(onnxruntime(-gpu)?)(\[[^]]*\])? *== *([0-9][0-9A-Za-z.]*).*/\1==\4/p' \
        -e '/^name = "onnxruntime(-gpu)?"$/{N;s/^name = "([^"]*)"\nversion = "([^"]*)".*/\1==\2/p}' "$1" | sort -u | head -n 1
}

old=$(pinned "$before")
new=$(pinned "$now")
if [ -z "$new" ]; then
    echo "error: $now pins neither onnxruntime nor onnxruntime-gpu" >&2
    exit 2
fi
if [ "$old" = "$new" ]; then
    echo "$new in both lock files: nothing to look at"
    exit 0
fi
exec llama-onnx matrix "$EXPORT" --baseline "$MODEL" --reference "${old:-$new}" --runtime "$new" \
    --provider "${PROVIDER:-cpu}" --pairs "${PAIRS:-5}" --wait "${WAIT:-3600}" --out "${OUT:-matrix-out}"
