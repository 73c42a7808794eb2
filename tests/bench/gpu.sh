#!/usr/bin/env bash
# Half an hour of one GPU: the tests marked gpu, speed and memory, the tiny chain, a real pretrained model.
#   bash tests/bench/gpu.sh                               # all of it: 20 minutes of an H100 (estimated)
#   MINUTES=9 bash tests/bench/gpu.sh                     # stops after 9 minutes; called again, it goes on
#   PARTS="tests speed" bash tests/bench/gpu.sh           # some parts only: tests speed chain smollm2
#   DEVICE=cpu SIZE=small bash tests/bench/gpu.sh         # a rehearsal on a CPU: 4 minutes, one core
# The part smollm2 needs SMOLLM2, the folder that smollm2.py writes (default ckpt/smollm2), and GSM8K: TRAIN and
# TEST name its two files, or data sets of the hub (the default).
#
# Everything goes to OUT (default ckpt/gpu). A step that has ended well leaves NAME.json there, and is not repeated.
# A training that is stopped saves, and goes on at the next call. Then gpu.py makes one json of it all, and the
# pages' tables from that.
set -euo pipefail
cd "$(dirname "$0")/../.."

device=${DEVICE:-cuda}
size=${SIZE:-full}
smollm2=${SMOLLM2:-ckpt/smollm2}
train_data=${TRAIN:-openai/gsm8k}
test_data=${TEST:-openai/gsm8k:main:test}
deadline=$((SECONDS + 60 * ${MINUTES:-30}))
failed=""

if [ "$size" = full ]; then
  out=${OUT:-ckpt/gpu}
  json=tests/bench/gpu.json
else
  out=${OUT:-ckpt/gpu-small}
  json=$out/gpu.json
fi
mkdir -p "$out"

step() { # step NAME SECONDS COMMAND...: run it, unless it is done; it may take so long. Status 0: it is done
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS))
  shift 2
  if [ -f "$out/$name.json" ]; then return; fi
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  if [ "$limit" -lt 20 ]; then
    failed="$failed $name"
    return 1
  fi
  printf '\n== %s, at most %d s: %s\n' "$name" "$limit" "$*"
  if timeout --kill-after=30 "$limit" "$@" 2>&1 | tee "$out/$name.log"; then
    if [ ! -f "$out/$name.json" ]; then
      printf '{"command": "%s", "seconds": %d}\n' "$*" $((SECONDS - start)) >"$out/$name.json"
    fi
  else
    failed="$failed $name"
    return 1
  fi
}

stage() { # stage NAME SECONDS STAGE FLAGS...: train $out/NAME, or go on with it
  local name=$1 limit=$2 script=$3.py
  shift 3
  if [ -f "$out/$name/trainer_state.pt" ]; then
    step "$name" "$limit" python3 "$script" --resume --out "$out/$name" --device "$device"
  else
    step "$name" "$limit" python3 "$script" --out "$out/$name" --overwrite --device "$device" "$@"
  fi
}

tests() {
  if [ "$device" = cpu ]; then export TEST_DEVICE=cpu; fi
  step tests 400 python3 -m pytest tests -m gpu -p no:cacheprovider || true
}

speed() { # tokens per second, share of the peak, peak of memory
  if [ "$size" = full ]; then
    step speed-0.6B 200 python3 tests/bench/bench_model.py --size 0.6B --device "$device" --json "$out/speed-0.6B.json" || true
    step speed-1.7B 300 python3 tests/bench/bench_model.py --size 1.7B --device "$device" --json "$out/speed-1.7B.json" || true
  else
    step speed-tiny 100 python3 tests/bench/bench_model.py --size tiny --rows 16 --prompt-tokens 8 --new-tokens 8 \
      --micro-batch-size 4 --device "$device" --json "$out/speed-tiny.json" || true
  fi
}

chain() { # the README's four commands; each needs the one before
  local few="" keep=""
  if [ "$size" != full ]; then
    few="--steps 4 --batch-size 8 --max-new-tokens 48 --eval-problems 8"
    keep="--truncated correct" # so short, nothing is correct
  fi
  stage chain-sft 400 sft $few || return 0
  stage chain-rlvr 300 rlvr --init "$out/chain-sft" $few || return 0
  stage chain-opsd 200 opsd --init "$out/chain-rlvr" --only-correct $few $keep || return 0
  few=""
  if [ "$size" != full ]; then few="--problems 8 --max-new-tokens 48"; fi
  step chain-eval 200 python3 eval.py "$out"/chain-{sft,rlvr,opsd} --device "$device" \
    --json "$out/chain-eval.json" $few || return 0
}

smollm2() { # SmolLM2-135M-Instruct on GSM8K: about 10 minutes of an H100 (estimated)
  local common="--dtype bfloat16 --max-new-tokens 256 --eval-problems 256 --weight-decay 0" groups="" few="" keep=""
  if [ "$size" != full ]; then
    few="--steps 2 --batch-size 2 --micro-batch-size 2 --max-new-tokens 16 --eval-problems 2 --dtype float32"
    groups="--group-size 2"
    keep="--truncated correct"
  fi
  # Three epochs. A quarter of the demonstrations have the teacher's prompt, which a model of this size must learn.
  stage smollm2-sft 300 sft --init "$smollm2" --data "$train_data" --no-thinking --privileged-frac 0.25 \
    --steps 330 --batch-size 64 --micro-batch-size 32 --lr 1e-4 --warmup-steps 20 --eval-every 165 --save-every 110 \
    $common $few || return 0
  # 16 responses to a problem: where 1 in 20 is correct, half of the groups hold a correct one.
  stage smollm2-rlvr 500 rlvr --init "$out/smollm2-sft" --group-size 16 --steps 40 --batch-size 32 \
    --micro-batch-size 64 --lr 1e-5 --eval-every 20 --save-every 10 $common $few $groups || return 0
  stage smollm2-opsd 300 opsd --init "$out/smollm2-rlvr" --only-correct --group-size 4 --steps 20 --batch-size 64 \
    --micro-batch-size 32 --lr 1e-5 --eval-every 10 --save-every 10 $common $few $groups $keep || return 0
  few="--problems 400 --n 4 --max-new-tokens 256"
  if [ "$size" != full ]; then few="--problems 2 --n 1 --max-new-tokens 16"; fi
  step smollm2-eval 300 python3 eval.py "$smollm2" "$out"/smollm2-{sft,rlvr,opsd} --data "$test_data" --no-thinking \
    --device "$device" --json "$out/smollm2-eval.json" $few || return 0
}

for part in ${PARTS:-tests speed chain smollm2}; do
  $part
done

python3 tests/bench/gpu.py --collect "$out" --json "$json"
python3 tests/bench/gpu.py --json "$json"
if [ -n "$failed" ]; then
  echo "not finished:$failed (their .log files in $out say why); call this again to go on" >&2
  exit 1
fi
