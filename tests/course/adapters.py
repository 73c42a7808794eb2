"""Between the course's tests and the code under test: thin functions that call this repository's own.

A student who writes a solution in another file changes a body here, and nothing in test_exercises.py. The
tests then use that solution; training does not: sft.py, rlvr.py, opsd.py and eval.py call the function in the
file that the docstrings below name.

Shapes: B sequences, T positions, H hidden size, N tokens of all responses, V vocabulary entries, R rows,
P prompts, G responses to each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that the tests run from any folder

import opsd  # noqa: E402
import rlvr  # noqa: E402
import rollout  # noqa: E402
import sft  # noqa: E402
import weak_verifier  # noqa: E402


def run_render_prompt(tokenizer, problem, context=None, privileged="", thinking=True):
    """Exercise 1, rollout.py. A tokenizer, a rollout.Problem -> the prompt's ids, a list.

    One user's message: the problem's text; for a context, PRIVILEGED[context] with `privileged` in place of
    its {}; INSTRUCTION. Then the chat template's generation prompt, with enable_thinking=thinking.
    """
    return rollout.render_prompt(tokenizer, problem, context, privileged, thinking)


def run_sample_ids(log_probs, uniforms):
    """Exercise 2, rollout.py. (R, V), (R,) in [0, 1) -> ids (R,).

    The first id at which the cumulated probability, in float64 and divided by its total, exceeds the uniform.
    An id of probability 0 is never drawn.
    """
    return rollout.sample_ids(log_probs, uniforms)


def run_collate(prompts, responses):
    """Exercise 3, rollout.py. Two lists of lists of ids -> input_ids (B, T), response_mask (B, T) bool.

    T is the longest sequence; shorter ones are padded right, with 0. The mask is made from lengths: True on
    the response, EOS included.
    """
    return rollout.collate(prompts, responses)


def run_response_hidden_states(model, input_ids, response_mask):
    """Exercise 4, rollout.py. A model, (B, T), (B, T) bool -> (N, H), in the order of the batch.

    model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state is (B, T, H). Wanted is, for each
    response token, the state from which that token is predicted.
    """
    return rollout.response_hidden_states(model, input_ids, response_mask)


def run_sft_loss(policy_log_probs, response_mask, num_tokens):
    """Exercise 5, sft.py. (B, T), (B, T) bool, int -> scalar.

    Minus the sum of the log-probs under the mask, over num_tokens (the whole batch's, not this tensor's).
    """
    return sft.sft_loss(policy_log_probs, response_mask, num_tokens)


def run_fool():
    """Exercise 6, tests/course/weak_verifier.py. -> {name of a weak verifier: a response that fools it}."""
    return weak_verifier.fool()


def run_compute_group_normalized_rewards(rewards, group_size, use_std=True, eps=1e-6):
    """Exercise 7, rlvr.py. (P * G,) -> advantages (P * G,).

    A reward minus its group's mean; with use_std divided by the group's population std plus eps.
    """
    return rlvr.compute_group_normalized_rewards(rewards, group_size, use_std, eps)


def run_grpo_clip_loss(policy_log_probs, old_log_probs, advantages, clip_low, clip_high, ratio_cap):
    """Exercise 8, rlvr.py. (B, T), (B, T), (B, 1) -> loss of each token (B, T), clipped (B, T) bool.

    ratio = policy / old, at most ratio_cap; loss = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A).
    clipped: where the clipped term is the smaller one, so that the clip takes the gradient.
    """
    return rlvr.grpo_clip_loss(policy_log_probs, old_log_probs, advantages, clip_low, clip_high, ratio_cap)


def run_sequence_weights(lengths, normalization, max_new_tokens):
    """Exercise 9, rlvr.py. Lengths |y| (B,), token | sequence | constant, int L -> weights (B,).

    What each token of a response weighs. token: 1 / (sum of all |y|); sequence: 1 / (B |y|);
    constant: 1 / (B L).
    """
    return rlvr.sequence_weights(lengths, normalization, max_new_tokens)


def run_k3_kl(p_log_probs, q_log_probs):
    """Exercise 10, rollout.py. Two tensors of one shape -> the same shape.

    Schulman's k3 estimate of KL(p || q) at tokens drawn from p: r - 1 - log r, r = q / p.
    """
    return rollout.k3_kl(p_log_probs, q_log_probs)


def run_divergence(student_logits, teacher_logits, kind, beta=0.5, is_correct=None):
    """Exercise 11, opsd.py. (N, V), (N, V) -> (N,), in float32.

    reverse: KL(S || T). forward: KL(T || S). jsd: beta KL(T || M) + (1 - beta) KL(S || M), with
    M = beta T + (1 - beta) S. split: reverse where is_correct (N,) bool, forward elsewhere.
    """
    return opsd.divergence(student_logits, teacher_logits, kind, beta, is_correct)


def run_is_kept(rollout, args):
    """Exercise 12, opsd.py. A Rollout with a label -> bool.

    A truncated one counts as what args.truncated says (incorrect, correct), or is never kept (drop). Then
    args.only_correct keeps correct ones only, args.only_incorrect incorrect ones only, neither: all.
    """
    return opsd.is_kept(rollout, args)


def run_update_teacher(step, teacher, student, args):
    """Exercise 13, opsd.py. Changes the teacher's parameters in place, after a step's update of the student.

    args.teacher: frozen does nothing; refresh copies the student whenever step is a multiple of
    args.refresh_every; ema takes args.ema_decay of the teacher and the rest of the student, at every step.
    """
    return opsd.update_teacher(step, teacher, student, args)
