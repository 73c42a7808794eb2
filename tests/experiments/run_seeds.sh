#!/usr/bin/env bash
# The results of tests/experiments/README.md: every arm, for each seed given. What is finished is not repeated.
#   bash tests/experiments/run_seeds.sh 0 1 2 3 4                 about an hour a seed, on one core
#   ONLY="start paper" bash tests/experiments/run_seeds.sh 0      some groups of arms only (the last lines list them)
#   python tests/experiments/results.py --write                   then: the tables of the pages
# To use two cores, start it twice, with different seeds and OMP_NUM_THREADS=1.
set -euo pipefail
cd "$(dirname "$0")/../.."

run() { # run NAME STAGE FLAGS...: train ckpt/seed$seed/NAME, or resume it, then judge it
  local out=ckpt/seed$seed/$1 stage=$2.py
  shift 2
  if [ -f "$out/eval.json" ]; then return; fi
  if [ -f "$out/trainer_state.pt" ]; then python "$stage" --resume --out "$out"; else
    python "$stage" --out "$out" --overwrite --seed "$seed" "$@"
  fi
  python eval.py "$out" --data arithmetic --json "$out/eval.json" $thinking
}

opsd() { # opsd NAME FLAGS...: an arm that starts from this seed's RLVR checkpoint
  local name=$1
  shift
  run "$name" opsd --init "ckpt/seed$seed/rlvr" --eval-every 10 "$@"
}

start() { # the paper's pipeline up to the fork
  run sft sft
  run rlvr rlvr --init "ckpt/seed$seed/sft"
}

paper() { # which rollouts; the budget is what a batch of 32 gives
  opsd all
  opsd only-correct --only-correct
  opsd only-incorrect --only-incorrect
}

matched() { # 32 kept rollouts a step for everyone (`all` has them anyhow)
  opsd correct-matched --only-correct --match-budget
  opsd incorrect-matched --only-incorrect --match-budget --max-refills 40
}

forward_matched() { # is it the direction, or the budget?
  opsd forward-correct-matched --only-correct --divergence forward --match-budget
  opsd forward-incorrect-matched --only-incorrect --divergence forward --match-budget --max-refills 40
}

divergences() {
  opsd forward-correct --only-correct --divergence forward
  opsd forward-incorrect --only-incorrect --divergence forward
  opsd jsd-correct --only-correct --divergence jsd
  opsd jsd-incorrect --only-incorrect --divergence jsd
  opsd split-all --divergence split
}

controls() { # what the teacher is shown; and no teacher at all
  opsd context-none --only-correct --context none
  opsd context-concise --only-correct --context concise
  opsd context-answer --only-correct --context answer
  opsd context-wrong-answer --only-correct --context wrong-answer
  opsd context-sibling --only-correct --context rollout --group-size 4 --batch-size 8
  local dump=ckpt/seed$seed/shortest.jsonl
  if [ ! -f "$dump" ]; then
    python eval.py "ckpt/seed$seed/rlvr" --train --problems 1280 --n 8 --seed "$seed" --shortest "$dump"
  fi
  run shortest-sft sft --init "ckpt/seed$seed/rlvr" --data "$dump" --privileged-frac 0 --steps 40 \
    --lr 2e-4 --min-lr-ratio 1 --warmup-steps 0 --weight-decay 0 --eval-every 10
}

order() { # OPSD in place of RLVR, and before it
  run sft-opsd opsd --init "ckpt/seed$seed/sft" --only-correct --eval-every 10
  run sft-opsd-rlvr rlvr --init "ckpt/seed$seed/sft-opsd"
}

no_thinking() { # short answers: nobody checks, so there is nothing to compress
  thinking=--no-thinking
  run short-sft sft --no-thinking
  run short-rlvr rlvr --init "ckpt/seed$seed/short-sft" --no-thinking
  local from="--init ckpt/seed$seed/short-rlvr --no-thinking --eval-every 10"
  run short-all opsd $from
  run short-correct opsd $from --only-correct
  run short-incorrect opsd $from --only-incorrect
  thinking=
}

teachers() { # 100 steps each, so that a refresh at step 50 has time to show
  opsd frozen-100 --only-correct --steps 100
  opsd refresh-1 --only-correct --steps 100 --teacher refresh --refresh-every 1
  opsd refresh-50 --only-correct --steps 100 --teacher refresh --refresh-every 50
  opsd ema --only-correct --steps 100 --teacher ema --ema-decay 0.95
}

anatomy() { # where the KL sits, which words go, who gets shorter
  local out=ckpt/seed$seed/anatomy.json
  if [ ! -f "$out" ]; then python tests/experiments/anatomy.py "ckpt/seed$seed"/{sft,rlvr,only-correct} --json "$out"; fi
}

thinking=
for group in ${ONLY:-start paper matched forward_matched divergences controls order no_thinking teachers anatomy}; do
  for seed in "$@"; do
    $group
    python tests/experiments/results.py --collect "ckpt/seed$seed"
  done
done
