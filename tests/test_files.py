"""What happens to files: a full disk, a file that is damaged, a folder in use. One line, and nothing is lost."""

import json
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_bad_input import EVERY_STAGE, TRAINERS, refused, small
from test_chain import TINY, read_rows, run_stage, same_tensors, start_command, weights, words
from test_chain import base_fixture, luck_fixture  # noqa: F401  (pytest fixtures: base, luck)

import eval as eval_stage
import rollout
import sft


def run_with_small_files(limit, stage, *flags):
    """Calls main() while no file may have more than `limit` bytes, as on a full disk. -> exit status, stderr."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status, _, err = run_stage(stage, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return status, err


@pytest.mark.parametrize("share", [0.2, 0.9, 1.5], ids=["weights", "weights' end", "optimizer"])
def test_a_full_disk_while_saving(base, share):
    """Saved at step 1; at step 2 there is no room, at three places of the save. The first save is whole, and the run
    goes on from it when there is room again."""
    flags = ["--init", base / "sft", "--out", "out", TINY, "--steps 3 --save-every 1"]
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    saved, state = weights("out"), Path("out/trainer_state.pt").read_bytes()
    size = Path("out/model.safetensors").stat().st_size
    status, err = run_with_small_files(int(share * size), sft, "--resume --out out")
    assert status == 2 and err.startswith("error: out: no checkpoint can be saved"), err
    assert err.count("\n") == 1, err
    assert same_tensors(weights("out"), saved) and Path("out/trainer_state.pt").read_bytes() == state
    assert sorted(path.name for path in Path().iterdir()) == ["out"]
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert torch.load("out/trainer_state.pt")["step"] == 3


@pytest.mark.parametrize("how", ["new", "--resume", "--overwrite"])
@TRAINERS
def test_a_save_is_tried_before_the_first_step(base, luck, stage, how, monkeypatch):
    """A tokenizer or a config that cannot be saved ended the run at its first save, step 500: all work lost.
    Nothing of the last save is touched, and what the trial leaves is in nobody's way."""
    flags = small(base, stage)
    if how != "new":
        assert run_stage(stage, *flags, "--stop-after 1")[0] == 0
        flags = ["--resume --out out"] if how == "--resume" else [*flags, how]
    saved = {path: path.read_bytes() for path in Path().glob("out/*")} if how == "--resume" else {}

    def cannot(self, folder):
        raise ValueError("cannot be\nsaved")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", cannot)
        patch.setattr(stage, "measure", None)  # a call would raise
        patch.setattr(stage, "accumulate_gradients", None)
        status, _, err = run_stage(stage, *flags)
    assert status == 2 and err.count("\n") == 1, err
    assert err.startswith("error: out: no checkpoint can be saved: ValueError: cannot be saved; mend"), err
    if how == "--resume":
        assert {path: path.read_bytes() for path in Path().glob("out/*")} == saved
    else:
        assert os.listdir("out") == ["args.json"]
    status, _, err = run_stage(stage, *(flags if how == "--resume" else [*small(base, stage), "--overwrite"]))
    assert status == 0, err


@pytest.mark.parametrize("flags, saves", [("--steps 3 --save-every 1", 2), ("--steps 3 --save-every 3", 1)])
def test_a_disk_too_small_for_a_save(base, flags, saves, monkeypatch):
    """Weights and AdamW's two moments, and the last save beside the one that is being written: seen before
    the first step, from sizes. Nothing big is written for it."""
    size = 3 * sum(weight.nbytes for weight in weights(base / "sft").values())
    usage, room = shutil.disk_usage("."), saves * size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room - 1))
    flags = ["--init", base / "sft", "--out", "out", TINY, flags]
    flags += ["--overwrite"]  # where an attempt before left its args.json
    refused(sft, *flags, says=["out: no checkpoint", f"{room / 1e9:.1f} GB are needed"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    written, save = [], rollout.save_checkpoint

    def saving(args, *rest, trial=False):
        save(args, *rest, trial=trial)
        written.append((trial, sorted(os.listdir("out"))))

    monkeypatch.setattr(rollout, "save_checkpoint", saving)
    monkeypatch.setattr(sft, "save_checkpoint", saving)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    assert written[0] == (True, ["args.json"]) and "model.safetensors" in written[1][1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))  # a save is there
    assert run_stage(sft, "--resume --out out")[0] == 0


def test_a_file_in_the_way_of_a_save(base):
    """transformers logs such an error and goes on, as if it had saved."""
    assert run_stage(sft, *small(base, sft), "--stop-after 1")[0] == 0
    Path("out/save.part").write_text("mine")
    refused(sft, "--resume --out out", says=["out: no checkpoint can be saved: FileExistsError", "save.part"])


def test_a_trial_writes_no_weights(base, monkeypatch):
    """Those of an 8B model are 33 GB, with its optimizer 98."""
    model, tokenizer = rollout.load_model(str(base / "sft"))
    args = SimpleNamespace(out="out", resume=False, save_every=1, steps=1)
    seen, rmtree = [], shutil.rmtree

    def look(path, **kwargs):
        seen.extend(file for file in Path(path).glob("*"))
        assert sum(file.stat().st_size for file in seen if file.suffix != ".json") < 5000
        rmtree(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", look)
    Path("out").mkdir()
    start = time.perf_counter()
    rollout.save_checkpoint(args, model, tokenizer, None, {}, trial=True)
    assert time.perf_counter() - start < 1  # 0.004 s where nothing else runs
    names = {file.name for file in seen}
    assert {"config.json", "generation_config.json", "tokenizer.json", "args.json"} <= names, names
    assert "model.safetensors" not in names and not os.listdir("out")


def test_a_full_disk_while_logging(base):
    """A line of metrics.jsonl that finds no room ends the run in one line, too; the log is mended on resume."""
    flags = ["--init", base / "sft", "--out", "out", TINY, "--steps 60 --save-every 100 --eval-every 100"]
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    room = max(Path("out", name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")) + 700
    status, err = run_with_small_files(room, sft, "--resume --out out")
    assert status == 2 and err.startswith("error: out") and "--resume" in err and err.count("\n") == 1, err
    assert run_stage(sft, "--resume --out out --stop-after 2")[0] == 0
    assert [row["step"] for row in read_rows("out/metrics.jsonl")] == [0, 1, 2, 3]


DAMAGE = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["trainer_state.pt", "model.safetensors", "args.json", "config.json",
    "tokenizer.json"])  # fmt: skip
def test_resume_from_a_damaged_file(base, name, damage):
    """A traceback of three libraries tells nobody which file it was, or what to do."""
    assert run_stage(sft, *small(base, sft), "--stop-after 1")[0] == 0
    path = Path("out", name)
    path.write_bytes(damage(path.read_bytes()))
    refused(sft, "--resume --out out", says=[name, "restore it"])


@pytest.mark.parametrize("name", ["model.safetensors", "args.json", "config.json", "tokenizer.json"])
@EVERY_STAGE
def test_start_from_a_damaged_checkpoint(base, stage, name):
    """The same for --init, and for what eval.py is given; and no folder is made."""
    shutil.copytree(base / "sft", "init")
    path = Path("init", name)
    path.write_bytes(path.read_bytes()[:-30])
    flags = ["init --n 1 --problems 2"] if stage is eval_stage else small(base, stage, init="init")
    refused(stage, *flags, says=[name, "restore it"])
    assert not Path("out").exists()


def test_damage_names_the_file_for_json_that_is_no_object(base):
    """A file of another kind under that name."""
    shutil.copytree(base / "sft", "init")
    Path("init/args.json").write_text("[1, 2]")
    refused(sft, *small(base, sft, init="init"), says=["init/args.json"])


@TRAINERS
def test_a_folder_that_cannot_be_written(base, stage):
    """Here a file is in the way of the folder's parent, which stops root as well."""
    Path("file").write_text("mine")
    refused(stage, *small(base, stage, out="file/run"), says=["file"])


def test_a_folder_without_permission(base, monkeypatch):
    """What the system says of it stands in the line, with the path."""
    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    status, _, err = run_stage(sft, *small(base, sft))
    assert status == 2 and "Permission denied" in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_second_run_in_the_folder_of_one_that_is_alive(base):
    """Both would save over each other. The second is refused, also with --overwrite; the first does not notice; once
    it is gone, even killed, its folder is free."""
    flags = ["--init", base / "sft", "--out", "out", TINY, "--steps 100000 --save-every 1 --eval-every 100000"]
    first = start_command("sft.py", *flags)
    try:
        for line in first.stdout:
            if line.startswith("sft       2/"):  # the first step is saved
                break
        for more in ("--resume --out out", "--overwrite"):
            status, _, err = run_stage(sft, *([] if "--resume" in more else flags), more)
            assert status == 2 and err.startswith("error: out: another run is at work there"), err
            assert err.count("\n") == 1
        for line in first.stdout:
            if line.startswith("sft      12/"):
                break
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    status, _, err = run_stage(sft, "--resume --out out --stop-after 1")
    assert status == 0, err
    assert torch.load("out/trainer_state.pt")["step"] >= 12 and sorted(os.listdir()) == ["out"]


def test_a_folder_has_one_lock_however_it_is_spelled(tmp_path, monkeypatch, fails_with):
    """The same folder through a link, or by its whole path, is the same folder: two runs would save over each other."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("sub").mkdir()
    Path("link").symlink_to("run")

    def start(folder):
        with rollout.only_run_in(folder):
            pass

    with rollout.only_run_in("run"):
        for spelling in ("run", "run/", "./run", "sub/../run", "link", tmp_path / "run"):
            fails_with(lambda: start(spelling), spelling, "another run is at work")
    start("link")
    assert sorted(os.listdir()) == ["link", "run", "sub"]


def test_what_a_user_keeps_in_the_folder_stays(base, monkeypatch):
    """A save that replaces the folder loses notes, plots, results of eval.py in it; or copies them each time,
    and loses what is written while it does. They are the same files before and after."""
    flags = small(base, sft, steps=3)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    Path("out/plots").mkdir()
    Path("out/plots/a.svg").write_text("<svg/>")
    Path("out/gone").symlink_to("nowhere")
    save, mine = transformers.PreTrainedTokenizerFast.save_pretrained, ["out/notes.txt", "out/plots/a.svg"]

    def save_and_write(tokenizer, folder):
        save(tokenizer, folder)
        Path("out/notes.txt").write_text("the best so far")  # by somebody else, in the middle of a save

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save_and_write)
    assert run_stage(sft, "--resume --out out --stop-after 1")[0] == 0
    before = [os.stat(path).st_ino for path in mine]
    folder = Path("out").stat().st_ino
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert [os.stat(path).st_ino for path in mine] == before and Path("out").stat().st_ino == folder
    assert Path("out/notes.txt").read_text() == "the best so far" and Path("out/gone").is_symlink()
    assert torch.load("out/trainer_state.pt")["step"] == 3


def test_what_a_killed_save_left_is_no_hindrance(base):
    """A save that was killed half-written is in the way of the next, and must not be taken for one; one that
    was killed at its very end leaves an empty folder."""
    flags = small(base, sft, steps=2)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    for left in ("save.part", "save.whole"):
        Path("out", left).mkdir()
    Path("out/save.part/model.safetensors").write_text("half a mod")
    status, _, err = run_stage(sft, "--resume --out out")
    assert status == 0, err
    assert torch.load("out/trainer_state.pt")["step"] == 2 and not list(Path("out").glob("save.*"))


def test_a_slash_at_the_end_of_out(base):
    """A shell completes a folder's name with a slash: OUT/.new was a folder inside OUT, and the first save failed."""
    assert run_stage(sft, *small(base, sft, out="out/"))[0] == 0
    assert sorted(os.listdir()) == ["out"] and torch.load("out/trainer_state.pt")["step"] == 2


def test_out_is_a_link(base):
    """A folder of runs on another disk, reached by a link: the link stays, and the run is where it leads."""
    Path("disk").mkdir()
    Path("out").symlink_to("disk")
    assert run_stage(sft, *small(base, sft))[0] == 0
    assert Path("out").is_symlink() and torch.load("disk/trainer_state.pt")["step"] == 2


def test_a_damaged_line_in_a_log(base):
    """In the middle, where no kill leaves one: one line that names the file."""
    assert run_stage(sft, *small(base, sft, steps=3), "--stop-after 1")[0] == 0
    log = Path("out/metrics.jsonl")
    log.write_text("half a line\n" + log.read_text())
    refused(sft, "--resume --out out", says=["metrics.jsonl", "damaged line"])


def test_two_may_end_a_save(tmp_path, monkeypatch):
    """A run moves a save's files into place, and eval.py, which looks just then, does too: each finds files
    gone that the other has moved, and neither may delete any."""
    whole = tmp_path / "save.whole"
    for name in ("config.json", "additional_chat_templates/tool_use.jinja", "model.safetensors"):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text(f"new {name}")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    replace = Path.replace

    def replace_twice(path, target):  # the other one is always a little faster
        replace(path, target)
        if not any(file.is_file() for file in whole.rglob("*")):  # it was the last: the other one saves again
            (whole / "trainer_state.pt").write_text("new trainer_state.pt")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_twice)
        rollout.recover_checkpoint(f"{tmp_path}/")
    rollout.recover_checkpoint(tmp_path)
    found = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(found) == 4 and all(text == f"new {name}" for name, text in found.items())
    assert not whole.exists()


def test_logs_are_rewritten_in_one_piece(base, monkeypatch):
    """Killed while --resume drops lines from a log, the log must still be there."""
    assert run_stage(sft, *small(base, sft, steps=3), "--stop-after 1")[0] == 0
    before = Path("out/metrics.jsonl").read_text()
    with open("out/metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 2, "loss": 1.0}) + "\n")

    class Killed(BaseException):
        pass

    def half(path, text, *args, **kwargs):
        with open(path, "w") as file:
            file.write(text[: len(text) // 2])
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "write_text", half)
        run_stage(sft, "--resume --out out")
    assert Path("out/metrics.jsonl").read_text().startswith(before)
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert [row["step"] for row in read_rows("out/metrics.jsonl")] == [0, 1, 2, 3, 3]
