"""Fault 10: a rank dies, hangs or fails: the others end, nobody is left behind, and the first reason is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.project import Project

# Leaves the process ids behind; then, at a call of the loss on one rank, something happens.
AT = """
import os, signal, time, llmctl.training.objectives as o
from llmctl import launch
launch.GRACE = 1.0
loss, calls = o.loss, 0
def other(*args, **more):
    global calls
    calls += 1
    if calls == 1:
        open(f'pid-{{launch.rank()}}', 'w').write(str(os.getpid()))
    if calls == {at} and launch.rank() == {rank}:
        print('now', flush=True)
        {happens}
    return loss(*args, **more)
o.loss = other
"""
IMPATIENT = ("--set", "pretrain.rank_timeout=2.0")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def at(call: int, rank: int, happens: str) -> str:
    return AT.format(at=call, rank=rank, happens=happens)


def left(folder: Path) -> list[str]:
    """Ranks that still run."""
    return [path.name for path in folder.glob("pid-*") if _runs(int(path.read_text()))]


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def gone(folder: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while left(folder) and time.monotonic() < end:
        time.sleep(0.02)
    return not left(folder)


def losses(project: Project) -> list[float]:
    rows = (project.run / "pretrain" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["train_loss"] for row in rows]


def test_a_rank_is_killed(fresh: Project, finished: Project) -> None:
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, before=at(6, 1, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert done.code == 4, done.out + done.err
    assert done.err.startswith("rank 1 was ended by SIGKILL\n   want of memory is a common reason; the same command")
    assert gone(fresh.path, 0)
    done = fresh.llmctl("pretrain", "t.toml")
    assert done.code == 0
    assert "resuming at step 3 of 12" in done.out
    assert losses(fresh) == pytest.approx(losses(finished), abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_rank_hangs(fresh: Project, strategy: str) -> None:
    hangs = at(6, 1, "os.kill(os.getpid(), signal.SIGSTOP)")
    strategy = f'pretrain.strategy="{strategy}"'
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, "--json", "--set", strategy, *IMPATIENT, before=hangs)
    assert done.code == 4, done.out + done.err
    error = json.loads(done.out.removeprefix("now\n"))["error"]
    assert error["message"] == "rank 1 did not answer within rank_timeout = 2 s"
    assert gone(fresh.path, 0)


def test_a_rank_fails(fresh: Project) -> None:
    """Its own reason is told, once, as an error of the command."""
    broken = at(6, 1, "raise __import__('llmctl.errors').errors.DataError('bad text', hint='mend it')")
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, before=broken)
    assert done.code == 3
    assert done.err == "rank 1: bad text\n   mend it\n"
    assert gone(fresh.path, 0)


def test_a_bug_on_a_rank(fresh: Project) -> None:
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, before=at(2, 1, "1 / 0"))
    assert done.code == 70
    assert done.err.startswith("rank 1: ZeroDivisionError: division by zero")


def test_the_first_rank_is_killed(fresh: Project) -> None:
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, before=at(6, 0, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert done.code == -signal.SIGKILL
    assert gone(fresh.path, 10)


@pytest.mark.slow
def test_the_first_rank_hangs(fresh: Project) -> None:
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, *IMPATIENT, before=at(6, 0, "time.sleep(300)"))
    assert done.code == 4
    assert done.err.startswith("rank 0 did not answer")
    assert gone(fresh.path, 0)


@pytest.mark.parametrize(("signum", "group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_stops_all_at_the_same_step(
    fresh: Project, finished: Project, signum: signal.Signals, group: bool
) -> None:
    """Fault 9, whether the command alone gets it or all its processes, as from a terminal."""
    fresh.edit("max_steps = 12", "max_steps = 12\nmicro_batch_size = 1")
    slow = at(9, 0, "time.sleep(0.5)")  # the first of two micro-batches of step 5
    call = fresh.start("pretrain", "t.toml", "--nproc", 2, before=f"import os; os.setpgid(0, 0)\n{slow}")
    call.until("now")
    os.killpg(call.pid, signum) if group else call.kill(signum)
    done = call.wait()
    assert done.code == 128 + signum, done.out + done.err
    assert "stopped at step 4 of 12; its state is saved" in done.err
    assert done.err.count("stopped") == 1
    assert gone(fresh.path, 0)
    assert "resuming at step 4 of 12" in fresh.llmctl("pretrain", "t.toml", "--nproc", 2).out
    assert losses(fresh) == pytest.approx(losses(finished), abs=1e-4)


def test_a_batch_that_cannot_be_shared_out(fresh: Project) -> None:
    """Fault 6: refused before anything starts."""
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 3, "--json")
    assert done.code == 2
    assert done.json["error"]["message"] == "[pretrain] global_batch_size = 4 cannot be divided among 3 ranks"
    assert done.json["error"]["hint"].startswith("set it to 3 or 6;")
    assert not (fresh.run / "prep").exists()


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_from_two_ranks_to_one_and_back(fresh: Project, finished: Project, strategy: str) -> None:
    on_two = ("--nproc", 2, "--set", f'pretrain.strategy="{strategy}"')
    for flags in ((*on_two, "--until-step", 4), ("--until-step", 8), on_two):
        done = fresh.llmctl("pretrain", "t.toml", *flags)
        assert done.code == 0, done.out + done.err
    assert "resuming at step 8 of 12" in done.out
    assert losses(fresh) == pytest.approx(losses(finished), abs=1e-4)
    assert fresh.manifest("pretrain")["metrics"]["tokens"] == finished.manifest("pretrain")["metrics"]["tokens"]


def test_a_sharded_checkpoint_is_safetensors_alone(fresh: Project) -> None:
    flags = ("--nproc", 2, "--set", 'pretrain.strategy="fsdp"', "--until-step", 3)
    assert fresh.llmctl("pretrain", "t.toml", *flags).code == 0
    folder = fresh.run / ".work/pretrain/step-00000003"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    shards = [
        f"{name}/shard-0000{n}-model-00001-of-00001.safetensors" for name in ("model", "optimizer") for n in (1, 2)
    ]
    assert files == sorted([*shards, "state.json"])
    listed = json.loads((folder / "state.json").read_text())["files"]
    assert sorted(listed) == sorted(shards)


def test_a_damaged_shard_is_passed_over(fresh: Project, finished: Project) -> None:
    fsdp = ("--nproc", 2, "--set", 'pretrain.strategy="fsdp"')
    assert fresh.llmctl("pretrain", "t.toml", *fsdp, "--until-step", 6).code == 0
    shard = fresh.run / ".work/pretrain/step-00000006/model/shard-00002-model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    done = fresh.llmctl("pretrain", "t.toml", *fsdp)
    assert done.code == 0
    assert done.out.count("checkpoint step-00000006 is damaged") == 1
    assert "resuming at step 3 of 12" in done.out
    assert losses(fresh) == pytest.approx(losses(finished), abs=1e-4)


def test_only_the_first_rank_speaks(fresh: Project) -> None:
    """torchrun starts every rank with the same command line."""
    shutil.rmtree(fresh.path / "runs", ignore_errors=True)
    calls = []
    for rank in (0, 1):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29_517}
        places = {name: str(value) for name, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"}
        calls.append(fresh.start("pretrain", "t.toml", "--json", "--events", "events.jsonl", env=places))
    first, second = (call.wait() for call in calls)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.json["ok"]
    assert (second.out, second.err) == ("", "")
    events = [json.loads(line)["event"] for line in (fresh.path / "events.jsonl").read_text().splitlines()]
    assert events.count("step") == 12


@pytest.mark.slow
def test_torchrun_itself(fresh: Project, finished: Project) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmctl")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [*launcher, "pretrain", "t.toml", "--json"],
        cwd=fresh.path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]
    assert losses(fresh) == pytest.approx(losses(finished), abs=1e-4)


def test_two_launchers_are_one_too_many(fresh: Project) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, env=env)
    assert done.code == 2
    assert done.err == "--nproc and torchrun both start the ranks\n   leave --nproc out under torchrun\n"


def test_a_finetuning_on_two_ranks(finished: Project) -> None:
    """And `run`, which makes all that is missing with them."""
    whole = finished.manifest("finetune")["metrics"]["train_loss"]
    for command in (("finetune",), ("run", "--set", 'finetune.strategy="fsdp"')):
        shutil.rmtree(finished.run / "finetune")
        name, *flags = command
        done = finished.llmctl(name, "t.toml", "--nproc", 2, *flags)
        assert done.code == 0, done.out + done.err
        assert finished.manifest("finetune")["metrics"]["train_loss"] == pytest.approx(whole, abs=1e-4)


def test_what_is_kept_of_an_average_on_shards_is_whole(fresh: Project, finished: Project) -> None:
    """EMA, models kept for good and evaluations on the way, with weights that no rank has whole."""
    fresh.edit("eval_every = 0\nsave_every = 3", "eval_every = 5\nsave_every = 3\nema_decay = 0.9\nkeep_every = 6")
    done = fresh.llmctl("pretrain", "t.toml", "--nproc", 2, "--set", 'pretrain.strategy="fsdp"')
    assert done.code == 0, done.out + done.err
    on_two = fresh.manifest("pretrain")["metrics"]["val_loss"]
    kept = json.loads((fresh.run / "checkpoints/pretrain/step-00000006/artifact.json").read_text())
    assert kept["metrics"]["steps"] == 6
    shutil.rmtree(fresh.run / "pretrain")
    assert fresh.llmctl("pretrain", "t.toml").code == 0
    assert on_two == pytest.approx(fresh.manifest("pretrain")["metrics"]["val_loss"], abs=1e-4)
