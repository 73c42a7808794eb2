#!/usr/bin/env bash
# The README's results: every arm for each seed, judged by eval.py. Resumable: a finished run is not repeated.
#   bash tests/run_seeds.sh 0 1 2        then        python tests/results.py
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .github/results

run() { # run STAGE OUT FLAGS...: skip it if done, resume it if begun
  local stage=$1 out=$2
  shift 2
  if [ -f "$out/done" ]; then return; fi
  if [ -f "$out/trainer_state.pt" ]; then python "$stage" --resume --out "$out"; else
    python "$stage" --out "$out" --overwrite "$@"
  fi
  touch "$out/done"
}

for seed in "$@"; do
  dir=ckpt/seed$seed
  run sft.py $dir/sft --seed "$seed"
  run rlvr.py $dir/rlvr --init $dir/sft --seed "$seed"
  run opsd.py $dir/all --init $dir/rlvr --seed "$seed"
  run opsd.py $dir/only-correct --init $dir/rlvr --seed "$seed" --only-correct
  run opsd.py $dir/only-incorrect --init $dir/rlvr --seed "$seed" --only-incorrect
  run opsd.py $dir/forward-only-correct --init $dir/rlvr --seed "$seed" --only-correct --divergence forward
  run opsd.py $dir/forward-only-incorrect --init $dir/rlvr --seed "$seed" --only-incorrect --divergence forward
  python eval.py $dir/{sft,rlvr,all,only-correct,only-incorrect,forward-only-correct,forward-only-incorrect} \
    --json ".github/results/seed$seed.json"
done
