#!/usr/bin/env bash
# Everything that needs a GPU, in at most 9.5 minutes and without a network: build, GPU tests, compute-sanitizer, measurements.
#
#   benchmarks/gpu_check.sh [--no-build] [--only STEP,STEP...] [folder of the results, by default benchmarks/results/gpu-<card>]
#   steps: tests sanitizers ops step selection switching
#
# A step that fails or runs out of its time does not stop the others; the end says which did, and the exit status is 1 then. A
# measurement that runs out of its time writes what it has.
# PYTHON names the interpreter (default: .venv/bin/python, else python3). SPRAND_COMMIT names the commit where .git is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # one workspace for all streams: a captured product takes the algorithm of the eager one

known=" tests sanitizers ops step selection switching " only=$known build=1 out=()
usage() {
  echo "gpu_check: $1" >&2
  sed -n 's/^#   //p' "$0" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --no-build) build=0 ;;
    --only)
      only=" ${2:-} " only=${only//,/ }
      for name in ${only:- }; do
        if [[ $known != *" $name "* ]]; then usage "expected steps of$known, got $name"; fi
      done
      if [[ -z ${only// /} ]]; then usage "expected steps after --only"; fi
      shift
      ;;
    -*) usage "unknown option $1" ;;
    *) out=(--out "$1") ;;
  esac
  shift
done
chosen() { [[ $only == *" $1 "* ]]; }
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
fi

failed=()
step() { # step "title" seconds command...
  local title=$1 limit=$2 start=$SECONDS status=0
  shift 2
  echo "== $title"
  timeout -k 10 "$limit" "$@" || status=$?
  echo "-- $title: $((SECONDS - start)) s"
  if ((status == 0)); then return; fi
  if ((status == 124 || status == 137)); then status="not done after $limit s"; else status="exit status $status"; fi
  echo "-- $title FAILED: $status"
  failed+=("$title ($status)")
}

SMALL=(tests/test_ops.py tests/test_sparse_adamw.py tests/test_cuda_sddmm.py)
PICK="(cuda or variant) and not reference and not int64 and not float64 and not compile and not opcheck"
sanitize() { # sanitize tool seconds: the operators' problem table under compute-sanitizer, our kernels alone
  local tool=$1 sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [[ -z $sanitizer ]]; then
    echo "== $tool: left out, no compute-sanitizer here"
    return
  fi
  # Each tensor an allocation of its own, so that the one behind it is out of bounds.
  step "$tool" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --target-processes all \
    --kernel-name kns=sprand --error-exitcode 9 "$PYTHON" -m pytest -q -x -p no:cacheprovider -m gpu -k "$PICK" $side_by_side \
    "${SMALL[@]}"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>/dev/null
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: no CUDA device is visible to torch ($PYTHON): nothing was checked" >&2
  exit 1
fi
side_by_side=$("$PYTHON" -c 'import xdist; print("-n 8 --dist worksteal")' 2>/dev/null)
if ((build)); then step "Build" 100 "$PYTHON" setup.py -q build_ext --inplace; fi
loaded='from sprand import native; print(native.problems); assert native.kernel_of("sddmm", "cuda") == "CUDA"'
step "CUDA kernels are loaded" 20 "$PYTHON" -c "$loaded"
if chosen tests; then step "Tests" 110 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu --durations 5 $side_by_side; fi
if chosen sanitizers; then
  sanitize memcheck 50
  sanitize racecheck 50
fi
if chosen ops; then step "Operators" 65 "$PYTHON" benchmarks/gpu/ops.py --budget 50 ${out[@]+"${out[@]}"}; fi
if chosen step; then step "Training step" 75 "$PYTHON" benchmarks/gpu/step.py --budget 60 ${out[@]+"${out[@]}"}; fi
selection=(--device cuda --llama-8b --methods snip 'snip, bounded' 'naive snip')
if chosen selection; then
  step "Selection" 50 "$PYTHON" benchmarks/bench_selection.py "${selection[@]}" ${out[@]+"${out[@]}"}
fi
switching=(--device cuda --widths 1024 2048 --layers 2 --dtypes bf16 --repeats 10)
if chosen switching; then
  step "Switching" 35 "$PYTHON" benchmarks/bench_switch.py "${switching[@]}" ${out[@]+"${out[@]}"}
fi

if ((${#failed[@]})); then
  echo "FAILED after $SECONDS s:"
  printf '  %s\n' "${failed[@]}"
  exit 1
fi
echo "All passed in $SECONDS s."
