"""What happens to files: a full disk, a file that is damaged, a folder in use. One line, and nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bad_input import EVERY_STAGE, TRAINERS, refused, small
from test_chain import ROOT, TINY, read_rows, run_stage, same_tensors, start_command, weights, words
from test_chain import base_fixture, luck_fixture  # noqa: F401  (pytest fixtures: base, luck)

import eval as eval_stage
import rollout
import sft


def run_with_small_files(limit, script, *flags):
    """`python SCRIPT FLAGS` in a process that may write no file of more than `limit` bytes: to the program, a full
    disk. -> exit status, stderr."""
    command = [sys.executable, str(ROOT / script), *words(flags), "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("share", [0.2, 0.9, 1.5], ids=["weights", "weights' end", "optimizer"])
def test_a_full_disk_while_saving(base, share):
    """Saved at step 1; at step 2 there is no room, at three places of the save. The first save is whole, and the run
    goes on from it when there is room again."""
    flags = ["--init", base / "sft", "--out", "out", TINY, "--steps 3 --save-every 1"]
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    saved, state = weights("out"), Path("out/trainer_state.pt").read_bytes()
    size = Path("out/model.safetensors").stat().st_size
    status, err = run_with_small_files(int(share * size), "sft.py", "--resume --out out")
    assert status == 2 and err.startswith("error: out.new: step 2 cannot be saved") and err.count("\n") == 1, err
    assert same_tensors(weights("out"), saved) and Path("out/trainer_state.pt").read_bytes() == state
    assert sorted(path.name for path in Path().iterdir()) == ["out"]
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert torch.load("out/trainer_state.pt")["step"] == 3


def test_a_full_disk_while_logging(base):
    """A line of metrics.jsonl that finds no room ends the run in one line, too; the log is mended on resume."""
    flags = ["--init", base / "sft", "--out", "out", TINY, "--steps 60 --save-every 100 --eval-every 100"]
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    room = max(Path("out", name).stat().st_size for name in ("metrics.jsonl", "samples.jsonl")) + 700
    status, err = run_with_small_files(room, "sft.py", "--resume --out out")
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


def test_what_a_user_keeps_in_the_folder_stays(base):
    """A save replaces the folder: notes, plots and results of eval.py in it were lost with each."""
    flags = small(base, sft, steps=3)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    Path("out/notes.txt").write_text("the best so far")
    Path("out/mine.jsonl").write_text('{"problem": "1+1?"}\n')
    Path("out/plots").mkdir()
    Path("out/plots/a.svg").write_text("<svg/>")
    assert run_stage(sft, "--resume --out out --stop-after 1")[0] == 0
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert Path("out/notes.txt").read_text() == "the best so far" and Path("out/plots/a.svg").exists()
    assert Path("out/mine.jsonl").read_text() == '{"problem": "1+1?"}\n'
    assert torch.load("out/trainer_state.pt")["step"] == 3


def test_what_a_killed_save_left_is_no_hindrance(base):
    """OUT.new of a save that was killed holds old copies of the user's files; OUT.old, one killed at its very end, is in
    the way of the next rename: each save after that would fail, and with it the run."""
    flags = small(base, sft, steps=2)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    for left in ("out.new", "out.old"):
        Path(left).mkdir()
        Path(left, "notes.txt").write_text("the worst so far")
    Path("out/notes.txt").write_text("the best so far")
    status, _, err = run_stage(sft, "--resume --out out")
    assert status == 0, err
    assert Path("out/notes.txt").read_text() == "the best so far" and sorted(os.listdir()) == ["out"]


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


def test_a_link_that_leads_nowhere_is_kept(base):
    """One of the user's own in the folder: a save that follows it ends the run."""
    assert run_stage(sft, *small(base, sft, steps=3), "--stop-after 1")[0] == 0
    Path("out/gone").symlink_to("nowhere")
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert Path("out/gone").is_symlink()


def test_a_damaged_line_in_a_log(base):
    """In the middle, where no kill leaves one: one line that names the file."""
    assert run_stage(sft, *small(base, sft, steps=3), "--stop-after 1")[0] == 0
    log = Path("out/metrics.jsonl")
    log.write_text("half a line\n" + log.read_text())
    refused(sft, "--resume --out out", says=["metrics.jsonl", "damaged line"])


def test_a_live_save_is_not_undone(tmp_path, monkeypatch):
    """Between its two renames a run's folder is gone for a moment. A command that looks just then must wait, and not
    move the old folder into the new one's place."""
    (tmp_path / "run.old").mkdir()
    monkeypatch.setattr(rollout.time, "sleep", lambda seconds: (tmp_path / "run").mkdir())
    rollout.recover_checkpoint(tmp_path / "run")
    assert (tmp_path / "run.old").exists() and (tmp_path / "run").exists()


def test_a_kill_is_undone_also_for_a_path_with_a_slash(tmp_path):
    """--init ckpt/sft/ after a kill between the two renames: its .old was looked for inside the folder."""
    (tmp_path / "run.old").mkdir()
    rollout.recover_checkpoint(f"{tmp_path}/run/")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
