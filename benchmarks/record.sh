#!/usr/bin/env bash
# Everything that a record on a GPU stands on, in one go: the whole suite, all benchmarks, into one folder. On two GPUs it
# takes 9 to 11 minutes; a third one takes what need not wait for the suite. The variant for this machine lies in build/;
# packages are those of requirements-dev.txt.
#
#     bash benchmarks/record.sh OUT [FLA]      FLA: a folder with fla-core 0.6.0, which transformers must not see by itself
#
# Prints a summary last; OUT gets records/ and logs.txt, the ends of the logs. Exits with 1 if a test or a program failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1") fla=$(realpath -m "${2:-.fla}")
work=$(mktemp -d)
mkdir -p "$out" "$out/records"
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
second=$((gpus > 1 ? 1 : 0))
start=$SECONDS
: >"$work/failed"

# step NAME COMMAND...: runs it into a log and says how it went
step() {
  local name=$1 began=$SECONDS code=0
  shift
  "$@" >"$work/$name.log" 2>&1 || code=$?
  [ $code = 0 ] || { echo "$name" >>"$work/failed" && grep -hE '^(FAILED|ERROR)' "$work/$name.log"; }
  printf '%-12s rc %s, %s s, at %s s: %s\n' "$name" $code $((SECONDS - began)) $((SECONDS - start)) "$(tail -n 1 "$work/$name.log")"
}
suite() { python3 -m pytest -q --tb=short -p no:cacheprovider "$@"; }

# They look at the sources, the build and the documentation, or take the machine's programs: not with what is timed.
slow=(test_build test_benchmarks test_hub test_docs test_release test_notebook test_fla test_model_benchmark)
half=(test_layer_kernels test_whole_layers test_transformers test_layers test_sanitizer test_schedule test_contract)
paths() { printf 'tests/%s.py ' "$@"; }
other=() # the rest
for file in tests/test_*.py; do
  name=$(basename "$file" .py)
  [[ " ${slow[*]} ${half[*]} test_two_gpus " == *" $name "* ]] || other+=("$name")
done

with_fla() { PYTHONPATH=$fla${PYTHONPATH:+:$PYTHONPATH} "$@"; }
# Compiling every configuration that FLA's autotuner knows would take minutes; which one runs matters to its speed only.
strict() {
  with_fla python3 -c '
import sys
import pytest
from triton.runtime.autotuner import Autotuner
init = Autotuner.__init__
Autotuner.__init__ = lambda self, fn, names, configs, *a, **k: init(self, fn, names, configs[:1], *a, **k)
sys.exit(pytest.main(sys.argv[1:]))' -q --tb=short -p no:cacheprovider "$@"
}
junit() { # both halves as one
  python3 - "$work" <<'PY'
import sys
import xml.etree.ElementTree as tree
both = tree.Element("testsuites")
for half in ("half", "other"):
    both.extend(tree.parse(f"{sys.argv[1]}/{half}.xml").getroot().iter("testsuite"))
tree.ElementTree(both).write(f"{sys.argv[1]}/junit.xml")
PY
}

strict_logits() { step strict strict tests/test_transformers.py tests/test_whole_layers.py -k bf16_logits; }
beside() { step beside strict tests/test_kda.py tests/test_decode.py -k fla; }
decode() { step decode with_fla python3 benchmarks/decode.py --out "$out/records"; }
model() { step model with_fla python3 benchmarks/model.py --out "$out/records"; }

first_gpu() {
  step two_gpus suite tests/test_two_gpus.py
  export CUDA_VISIBLE_DEVICES=0
  step other suite -n 8 --junitxml="$work/other.xml" $(paths "${other[@]}")
  while ! [ -e "$work/half.done" ]; do sleep 1; done
  junit
  step prefill with_fla python3 benchmarks/prefill.py --given all --repeats 3 --tests "$work/junit.xml" --out "$out/records"
}
second_gpu() {
  export CUDA_VISIBLE_DEVICES=$second
  step slow suite -n 8 --dist loadfile $(paths "${slow[@]}") &
  step half suite -n 8 --junitxml="$work/half.xml" $(paths "${half[@]}")
  touch "$work/half.done"
  [ "$gpus" -gt 2 ] || { strict_logits; beside; }
  wait
  step accuracy with_fla python3 benchmarks/accuracy.py --out "$out/records"
  [ "$gpus" != 2 ] || model
}
third_gpu() {
  export CUDA_VISIBLE_DEVICES=2
  strict_logits
  beside
  model
}

if [ "$gpus" -lt 2 ]; then
  second_gpu
  first_gpu
  model
else
  second_gpu &
  [ "$gpus" = 2 ] || third_gpu &
  first_gpu
  wait
fi
decode # alone: its calls of one sequence are bound by the host
for log in "$work"/*.log; do printf '\n==== %s\n' "$(basename "$log" .log)" && tail -n 80 "$log"; done >"$out/logs.txt"
echo "$((SECONDS - start)) s; failed: $(tr '\n' ' ' <"$work/failed")"
[ ! -s "$work/failed" ]
