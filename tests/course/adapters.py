"""Between the course's tests and the code under test: thin functions that call this repository's own.

Students who write their own version elsewhere change a body here, and nothing in test_exercises.py. Shapes:
B sequences, T positions, N tokens of all responses, V vocabulary entries, P prompts, G responses to each.
"""

import opsd
import rlvr
import rollout
import sft


def run_sft_loss(policy_log_probs, response_mask, num_tokens):
    """Exercise 1. (B, T), (B, T) bool, int -> scalar: the negative masked sum over num_tokens."""
    return sft.sft_loss(policy_log_probs, response_mask, num_tokens)


def run_collate(prompts, responses):
    """Exercise 2. Two lists of lists of ids -> input_ids (B, T), response_mask (B, T) bool, padded right."""
    return rollout.collate(prompts, responses)


def run_compute_group_normalized_rewards(rewards, group_size, use_std=True, eps=1e-6):
    """Exercise 3. (P * G,) -> advantages (P * G,)."""
    return rlvr.compute_group_normalized_rewards(rewards, group_size, use_std, eps)


def run_grpo_clip_loss(policy_log_probs, old_log_probs, advantages, clip_low, clip_high, ratio_cap):
    """Exercise 4. (B, T), (B, T), (B, 1) -> loss of each token (B, T), whether the clip took it (B, T) bool."""
    return rlvr.grpo_clip_loss(policy_log_probs, old_log_probs, advantages, clip_low, clip_high, ratio_cap)


def run_sequence_weights(lengths, normalization, max_new_tokens):
    """Exercise 5. (B,), token | sequence | constant, int -> weight of each token of a response (B,)."""
    return rlvr.sequence_weights(lengths, normalization, max_new_tokens)


def run_divergence(student_logits, teacher_logits, kind, beta=0.5, is_correct=None):
    """Exercise 6. (N, V), (N, V), reverse | forward | jsd | split, float, (N,) bool for split -> (N,)."""
    return opsd.divergence(student_logits, teacher_logits, kind, beta, is_correct)


def run_update_teacher(step, teacher, student, args):
    """Exercise 7. Changes the teacher's parameters in place; args: teacher, refresh_every, ema_decay."""
    return opsd.update_teacher(step, teacher, student, args)


def run_is_kept(rollout, args):
    """Exercise 8. A Rollout with a label -> bool; args: only_correct, only_incorrect, truncated."""
    return opsd.is_kept(rollout, args)
