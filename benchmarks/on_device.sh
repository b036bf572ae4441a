#!/usr/bin/env bash
# All that a GPU is to show, in one command of at most eight minutes: build, correctness, kernels
# against their floors, decoding end to end. A stage that fails or runs out of time does not keep the
# next from running; what was measured by then is kept. The short table comes last.
#
#   benchmarks/on_device.sh              the whole
#   benchmarks/on_device.sh --deep       four minutes: compute-sanitizer, ncu, the tests of --rerun
#   benchmarks/on_device.sh --rehearse   the same stages without a GPU: the CUDA kernels on the CPU
#                                        (tests/native/shim), small models, one round of each
#
#   --out DIR      where logs and rows go; default: runs/device
#   --wheel FILE   a wheel of inferlab to install instead of building one
#   --skip NAMES   stages to leave out, e.g. --skip "tests decode"
#   --rerun TESTS  for --deep: test ids below tests/kernels/device, separated by blanks
#
# Needs torch, transformers and pytest in python3, nvcc for the build, and installs nothing there:
# packages go to a scratch folder. build/device/wheels (on_device_wheels.sh) is used if it is there.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

mode=whole total=480 out=runs/device wheel="" skip="" rerun=""
while (($#)); do
  case $1 in
    --deep) mode=deep total=240 ;;
    --rehearse) mode=rehearse total=1800 ;;
    --out) out=$2; shift ;;
    --wheel) wheel=$2; shift ;;
    --skip) skip=" $2 "; shift ;;
    --rerun) rerun=$2; shift ;;
    *) echo "on_device.sh: unknown argument $1; see the head of the file" >&2; exit 2 ;;
  esac
  shift
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$out"/{status.txt,{setup,tests,kernels,decode,sanitizer,ncu}.log,tests.xml,{kernels,decode}.jsonl}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false COLUMNS=160
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
SECONDS=0
failures=0

# stage NAME SECONDS LOG COMMAND...: runs it within its time and what is left of the whole.
stage() {
  local name=$1 limit=$2 log=$out/$3 begin=$SECONDS rc=0 how
  shift 3
  [[ $skip == *" $name "* ]] && return
  [[ $mode == rehearse ]] && limit=$((6 * limit))  # on two cores, perhaps busy ones
  ((limit > total - SECONDS)) && limit=$((total - SECONDS))
  if ((limit < 5)); then
    how="not begun: no time left"
  else
    printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
    timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 || rc=$?
    case $rc in
      0) how=ok ;;
      124 | 137) how="out of time ($limit s)" ;;
      *) how="failed ($rc)" ;;
    esac
  fi
  [[ $how == ok ]] || failures=$((failures + 1))
  printf '%-18s %4d s  %-22s %s\n' "$name" $((SECONDS - begin)) "$how" \
    "$(tail -n 1 "$log" 2>/dev/null | tr -d '\r' | cut -c1-100)" | tee -a "$out/status.txt"
}

build() {
  local define=--config-settings=cmake.define cuda=(INFERLAB_CUDA=ON INFERLAB_CUDA_ARCHITECTURES=90)
  [[ $mode == rehearse ]] && cuda=(INFERLAB_CUDA=OFF)
  python3 -m pip wheel . --no-deps --no-build-isolation --wheel-dir "$work" "${cuda[@]/#/$define.}" &&
    cp "$work"/llm_inference_lab-*.whl "$out"
}

install() {
  local wheels=(build/device/wheels/*.whl)
  [[ -e ${wheels[0]} && $mode != rehearse ]] || wheels=()
  [[ -n $wheel ]] || wheel=$(ls "$work"/llm_inference_lab-*.whl)
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" \
    "${wheels[@]}" "$wheel" && python3 -m inferlab.cli doctor &&
    python3 -c 'import inferlab.specdec.pipeline'  # all that it needs is there
}

bench() { # FILES... -k EXPRESSION
  python3 -m pytest -q -p no:cacheprovider --rows="$out/kernels.jsonl" --row-seconds="$row_seconds" "$@"
}
export -f build install bench
export out work mode wheel

if [[ $mode == rehearse ]]; then
  device=cpu row_seconds=0 backend=cuda-shim
  shim=$(PYTHONPATH=tests python3 -c 'from helpers import shim_build; print(shim_build.build())')
  smoke=(--shim "$shim") decode=(--rehearse --device cpu)
  # A few tests and rows: all of them run elsewhere.
  must_hold="bench_tiny or bench_match and B1-N64 and V4096" rows="V4096 and B1- or dim768 or rows1-in160 or N5- or S128"
  tests=(-k "$backend and (page_sizes or large_trees or copy_pages or silu_mul or chain_that_guesses)")
else
  device=cuda row_seconds=0.25 smoke=() decode=()
  tests=(-m "gpu and (full or not full)" -n 8)  # matrices whole: rows cost little there
  must_hold="bench_decode and B32-N or bench_match and B1-N64 and V151936 or bench_compact and layers32"
  rows="not ($must_hold)"
fi
export row_seconds

stage facts 30 setup.log python3 benchmarks/device/facts.py
[[ -n $wheel ]] || stage build 150 setup.log bash -c build
stage install 60 setup.log bash -c install

# What compute-sanitizer sees: every kernel, every value of each parameter, nothing huge.
few=(
  "test_device_attention.py::test_long_and_large" "test_device_attention.py::test_head_dims"
  "test_device_verify.py::test_a_chain_that_guesses_right_to_the_end"
  "test_device_verify.py::test_broken_rows_end_the_walk_only_where_it_gets"
  "test_device_verify_rejection.py::test_many_blocks_share_a_row" "test_device_verify_lossy.py::test_many_blocks_share_a_row"
  "test_device_sample.py::test_every_path" "test_device_sample.py::test_many_samples"
  "test_device_kv.py" "test_device_layer.py" "test_device_tree.py"
)
few=(-p no:cacheprovider -m gpu --each-value "${few[@]/#/tests/kernels/device/}")

if [[ $mode == deep ]]; then
  for tool in memcheck racecheck synccheck; do
    stage "$tool" 50 sanitizer.log compute-sanitizer --tool "$tool" --kernel-name kns=inferlab \
      --error-exitcode 9 python3 -m pytest -q -x "${few[@]}"
  done
  profile() { # FILE KERNELS EXPRESSION
    stage "ncu_$1" 25 ncu.log ncu --clock-control none --target-processes all -k "regex:$2" -c 6 \
      --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis \
      --section WarpStateStats --section LaunchStats \
      python3 -m pytest -q -p no:cacheprovider --benchmark-disable "benchmarks/$1" -k "$3"
  }
  profile bench_attention.py attention "cuda and bench_decode and bf16 and Hq32"
  profile bench_verify.py match_kernel "cuda and bench_match and B1-N64 and V151936"
  read -ra again <<<"$rerun"
  ((${#again[@]} == 0)) || stage rerun 60 tests.log python3 -m pytest -q -p no:cacheprovider -m gpu \
    "${again[@]/#/tests/kernels/device/}"
else
  [[ $mode != rehearse ]] || stage deep_tests 30 tests.log python3 -m pytest -q --co "${few[@]}"
  stage smoke 60 tests.log python3 benchmarks/device/smoke.py "${smoke[@]}"
  stage tests 120 tests.log python3 -m pytest -q -p no:cacheprovider --maxfail=20 --tb=short \
    --junitxml="$out/tests.xml" "${tests[@]}" tests/kernels/device
  stage must-hold 60 kernels.log bash -c 'bench "$@"' - \
    benchmarks/bench_attention.py benchmarks/bench_verify.py benchmarks/bench_kv.py -k \
    "$device and ($must_hold)"
  stage decode 130 decode.log python3 benchmarks/device/decode.py --rows "$out/decode.jsonl" "${decode[@]}"
  for op in attention verify sample kv layer build_tree; do
    stage "bench_$op" 30 kernels.log bash -c 'bench "$@"' - "benchmarks/bench_$op.py" -k \
      "$device and ($rows)"
  done
fi

python3 benchmarks/device/summary.py "$out"
echo "$failures stages failed; $SECONDS s; all of it in $out"
exit $((failures > 0))
