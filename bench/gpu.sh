#!/usr/bin/env bash
# Everything that needs a GPU, in one call: tests, errors against fp64, every kernel, whole layers, memory, graphs.
#   bench/gpu.sh [FOLDER]        writes FOLDER/*.json, *.png and report.txt (bench/results)
#   FMOE_DRY=1 bench/gpu.sh F    the same on a CPU, tiny, without the tests: do the scripts work?
# A step that fails is said at the end, and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-bench/results}
mkdir -p "$folder"
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
failed=()

step() {
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

[[ ${FMOE_DRY:-} ]] && export TRITON_INTERPRET=1 || step tests python -m pytest -q -p no:cacheprovider tests/kernels/test_kernels_{backend,fp8,layer,ops,transforms,twins}.py
[[ ${FMOE_DRY:-} ]] || for edge in te:transformer_engine deep_ep:deep_ep; do
    if python -c "import importlib.util as u; exit(u.find_spec('${edge#*:}') is None)"; then
        step "${edge%:*}" python -m pytest -q -p no:cacheprovider "tests/gpu/gpu_${edge%:*}.py"
    else
        echo "== ${edge%:*}: ${edge#*:} is not installed"
    fi
done
step correct python bench/gpu/correct.py --json "$folder/correct.json"
step kernels python bench/gpu/each_kernel.py --json "$folder/kernels.json" --sweep "$folder/tiles.json"
step layers python bench/gpu/layers.py --json "$folder/layers.json"
step report bash -c "python bench/gpu/report.py '$folder' > '$folder/report.txt' && cat '$folder/report.txt'"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
