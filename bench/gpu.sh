#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes at most: whatever it has reached by then is in $OUT/records.jsonl.
#   OUT=FOLDER bench/gpu.sh [STEP ..]    all steps of bench/gpu/run.py, most valuable first, or those named
#   FMOE_DRY=1 OUT=F bench/gpu.sh        the same on a CPU, tiny: do all steps start, keep their limits, leave records?
# Before, on a CPU with the same Python and triton: python bench/gpu/precompile.py, and carry build/triton-cache; wheels of peers in build/wheels.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python3 || command -v python)}
export OUT=${OUT:-bench/results/gpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$OUT"
export PYTHONPATH=.:kernels:bench/gpu:/tmp/fmoe-wheels${PYTHONPATH:+:$PYTHONPATH}
if [[ ${FMOE_DRY:-} ]]; then
    export TRITON_INTERPRET=1
    limit=200
else
    limit=600
    export TRITON_CACHE_DIR=${FMOE_CACHE:-/tmp/fmoe-triton-cache}
    mkdir -p build/triton-cache
    ln -sfn "$PWD/build/triton-cache" "$TRITON_CACHE_DIR"
fi
shopt -s nullglob
wheels=(build/wheels/*.whl)
export FMOE_WHEELS=
pip=(timeout 15 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/fmoe-wheels)
for wheel in "${wheels[@]}"; do
    said=$("${pip[@]}" "$wheel" 2>&1) && said=installed
    FMOE_WHEELS+="${wheel##*/}: $(tail -c 200 <<<"$said"); "
done
export FMOE_SECONDS=$((limit - SECONDS - 4))
exec timeout --kill-after=3 "$FMOE_SECONDS" "$python" bench/gpu/run.py "$@"
