"""make_optimizer and optimizer_step of each stage, against numbers worked out by hand.

They stand in all three stages, so that each can be read alone. A fault planted in all of them alike must show.
"""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import opsd
import rlvr
import rollout
import sft

EVERY_STAGE = pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)


def flags(**changed):
    """No schedule, no decay, no clipping, but for what is changed."""
    given = {"lr": 0.1, "min_lr_ratio": 1.0, "warmup_steps": 0, "steps": 10, "weight_decay": 0.0,
        "grad_clip": 1e9, "out": "nowhere"}  # fmt: skip
    return SimpleNamespace(**given | changed)


class TwoNumbers(torch.nn.Module):
    """A matrix (1, 1) and a vector (1,), both 2."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[2.0]]))
        self.vector = torch.nn.Parameter(torch.tensor([2.0]))

    def set_gradients(self, matrix, vector):
        self.matrix.grad, self.vector.grad = torch.tensor([[matrix]]), torch.tensor([vector])


@EVERY_STAGE
def test_two_adamw_steps_by_hand(stage):
    """Other betas go unseen: training just differs a little. AdamW with betas .9 and .95, eps 1e-8, rate .1.

    Gradient 1, then 3. Step 1: m = .1, v = .05; corrected by 1 - .9 and 1 - .95 both are 1: 2 - .1 = 1.9.
    Step 2: m = .9 * .1 + .1 * 3 = .39, over 1 - .81 = .19: 2.0526316. v = .95 * .05 + .05 * 9 = .4975, over
    1 - .9025 = .0975: 5.1025641, its root 2.2588856. 2.0526316 / 2.2588856 = .9086922: 1.9 - .0908692 = 1.8091308.
    """
    model, args = TwoNumbers(), flags()
    optimizer = stage.make_optimizer(model, args)
    model.set_gradients(1.0, 1.0)
    stage.optimizer_step(1, model, optimizer, 0.0, args)
    assert model.matrix.item() == pytest.approx(1.9, abs=1e-6)
    model.set_gradients(3.0, 3.0)
    stage.optimizer_step(2, model, optimizer, 0.0, args)
    assert model.matrix.item() == pytest.approx(1.8091308, abs=1e-6)
    assert model.vector.item() == pytest.approx(1.8091308, abs=1e-6)


@EVERY_STAGE
def test_weight_decay_is_for_matrices(stage):
    """Decay on the gain of a norm pulls it from 1, where it starts, to 0.

    Decay .5 at rate .1 takes .1 * .5 = 5 % of a matrix before the step: 2 * .95 - .1 = 1.8. The vector: 1.9.
    """
    model, args = TwoNumbers(), flags(weight_decay=0.5)
    optimizer = stage.make_optimizer(model, args)
    model.set_gradients(1.0, 1.0)
    stage.optimizer_step(1, model, optimizer, 0.0, args)
    assert model.matrix.item() == pytest.approx(1.8, abs=1e-6)
    assert model.vector.item() == pytest.approx(1.9, abs=1e-6)


@EVERY_STAGE
def test_every_parameter_is_trained_once(stage):
    """A parameter in no group stays as it was; tied embeddings in two would be stepped twice."""
    model = make_tiny()
    groups = stage.make_optimizer(model, flags(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2} and {p.dim() for p in groups[1]["params"]} == {1}
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))


@EVERY_STAGE
def test_the_learning_rate_by_hand(stage):
    """An off-by-one makes the first step's rate 0, or the last one's. A warm-up that was lost looks like luck.

    10 steps, 4 of them warm-up, a cosine down to .1 of the rate, which is .1. The cosine's part at step s is
    .1 + .9 (1 + cos(s pi / 10)) / 2. Step 1: .9779755 / 4 = .2444939. Step 2: .9140576 * 2/4 = .4570288.
    Step 4: .6890576, the warm-up is over. Step 5: .1 + .9 / 2 = .55. Step 10: .1.
    """
    model = TwoNumbers()
    args = flags(min_lr_ratio=0.1, warmup_steps=4)
    for step, expected in [(1, 0.2444939), (2, 0.4570288), (4, 0.6890576), (5, 0.55), (10, 0.1)]:
        optimizer = stage.make_optimizer(model, args)
        model.set_gradients(1.0, 1.0)
        before = model.vector.item()
        metrics = stage.optimizer_step(step, model, optimizer, 0.0, args)
        assert metrics["lr"] == pytest.approx(0.1 * expected, abs=1e-7)
        # AdamW's first step is as long as the rate: what is reported is what was used.
        assert before - model.vector.item() == pytest.approx(0.1 * expected, abs=1e-6)


@EVERY_STAGE
def test_a_constant_rate_stays_constant(stage):
    """--min-lr-ratio 1, the default of rlvr.py and opsd.py."""
    model, args = TwoNumbers(), flags(steps=7)
    optimizer = stage.make_optimizer(model, args)
    for step in range(1, 8):
        model.set_gradients(1.0, 1.0)
        assert stage.optimizer_step(step, model, optimizer, 0.0, args)["lr"] == pytest.approx(0.1)


@EVERY_STAGE
def test_the_clip_by_hand(stage):
    """A clip that never clips is seen only when one batch rules the run. AdamW's first step hides a gradient's size,
    so plain gradient descent shows it.

    Gradients 3 and 4: norm 5. Clipped to .5 they are .3 and .4 (to 1e-6, which torch adds to the norm): with rate
    .1, 2 - .03 and 2 - .04. Under a limit of 6 they stay 3 and 4. The norm that is logged is the one before.
    """
    for limit, matrix, vector in [(0.5, 1.97, 1.96), (6.0, 1.7, 1.6)]:
        model, args = TwoNumbers(), flags(grad_clip=limit)
        model.set_gradients(3.0, 4.0)
        metrics = stage.optimizer_step(1, model, torch.optim.SGD(model.parameters(), lr=0.1), 0.0, args)
        assert metrics["grad_norm"] == pytest.approx(5)
        assert model.matrix.item() == pytest.approx(matrix, abs=1e-5)
        assert model.vector.item() == pytest.approx(vector, abs=1e-5)


@EVERY_STAGE
def test_gradients_are_cleared(stage):
    """One that is carried over is momentum that nobody asked for."""
    model, args = TwoNumbers(), flags()
    optimizer = stage.make_optimizer(model, args)
    model.set_gradients(1.0, 1.0)
    stage.optimizer_step(1, model, optimizer, 0.0, args)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@EVERY_STAGE
@pytest.mark.parametrize("loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_ends_the_run(stage, loss, gradient, fails_with):
    """One NaN in the weights, saved over the last good checkpoint, and the run is lost."""
    model, args = TwoNumbers(), flags()
    optimizer = stage.make_optimizer(model, args)
    before = copy.deepcopy(model.state_dict())
    model.set_gradients(gradient, 1.0)
    fails_with(lambda: stage.optimizer_step(7, model, optimizer, loss, args), "step 7", "not finite")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@EVERY_STAGE
@pytest.mark.parametrize("device, fused", [("cpu", False), ("cuda", True)])
def test_adamw_is_fused_on_a_gpu(stage, device, fused):
    """AdamW's default on CUDA makes a tensor for each parameter within step(): 4 bytes a number, 33 GB for
    8B. Tensors without data stand in for a GPU's. On a CPU it stays as it was: fused rounds otherwise."""
    with FakeTensorMode():
        model = torch.nn.ParameterList([torch.empty(1, 1, device=device), torch.empty(1, device=device)])
        groups = stage.make_optimizer(model, flags()).param_groups
    assert [bool(group["fused"]) for group in groups] == [fused, fused]


@pytest.mark.parametrize("saved_fused, fused", [(True, False), (False, True), (None, True)])
def test_a_run_that_changes_its_device_changes_its_adamw(tmp_path, monkeypatch, saved_fused, fused):
    """--device is free on --resume. The optimizer's state says `fused`, too, as where it was saved; None is
    what runs saved before there was the flag."""
    model = TwoNumbers()
    saved = torch.optim.AdamW(model.parameters(), lr=0.1, fused=saved_fused)
    model.set_gradients(1.0, 1.0)
    saved.step()
    torch.save({"step": 1, "optimizer": saved.state_dict()}, tmp_path / "trainer_state.pt")
    for log in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / log).write_text(json.dumps({"step": 1}) + "\n")
    resumed = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    monkeypatch.setattr(rollout, "save_checkpoint", lambda *args, **kwargs: None)  # its trial
    rollout.start_run(SimpleNamespace(out=tmp_path, resume=True), model, None, resumed)
    assert resumed.param_groups[0]["fused"] is fused
    model.set_gradients(3.0, 3.0)
    resumed.step()
    assert resumed.state[model.matrix]["step"] == 2
