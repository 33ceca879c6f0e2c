"""`llmctl import hf:org/name`, against a hub on this machine that speaks HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmctl.model import hf
from tests import folders
from tests.importing import hub_server
from tests.importing.hub_server import Hub
from tests.warm import Done, Warm

pytest.importorskip("huggingface_hub")
NAME = "some-org/Tiny-0.1B"


@dataclass
class World:
    """A working folder, a hub, and a cache."""

    path: Path
    hub: Hub
    warm: Warm

    def llmctl(self, *args: object, **more: str) -> Done:
        quiet = dict.fromkeys(("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"), "")
        environment = {**quiet, "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.path / "cache"), **more}
        environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        return self.warm.run(*args, cwd=self.path, env=environment)

    def manifest(self, run: str = "Tiny-0.1B") -> dict[str, dict[str, dict[str, str]]]:
        found: dict[str, dict[str, dict[str, str]]] = json.loads(
            (self.path / "runs" / run / "import/artifact.json").read_text()
        )
        return found


@pytest.fixture
def world(warm: Warm, tmp_path: Path) -> Iterator[World]:
    folder = folders.write(tmp_path / "published")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("not needed")
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("not needed")
    (folder / "modeling_tiny.py").write_text("not needed")
    (folder / "optimizer.safetensors").write_text("not needed")
    with hub_server.serving(Hub(NAME)) as hub:
        hub.publish(folder, "v1")
        yield World(tmp_path, hub, warm)


def test_a_repository_becomes_a_run_that_knows_its_commit_and_licence(world: World) -> None:
    done = world.llmctl("import", f"hf:{NAME}@v1", "--as", "tiny", "--json")
    assert done.code == 0, done.err
    commit = world.hub.revisions["v1"]
    source = world.manifest("tiny")["sources"][f"hf:{NAME}@{commit}"]
    assert (source["repository"], source["commit"], source["licence"]) == (NAME, commit, "apache-2.0")
    folder, published = world.path / "runs/tiny/import", world.path / "published"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (folder / name).read_bytes() == (published / name).read_bytes(), name
    assert hf.load(folder).config == hf.load(published).config
    assert f"{NAME} at {commit[:8]}" in done.err
    assert "chat template · apache-2.0" in done.err
    needed = {path.name for path in published.iterdir() if path.is_file()}
    assert world.hub.fetched() == needed - {"pytorch_model.bin", "modeling_tiny.py", "optimizer.safetensors"}


def test_once_imported_no_command_asks_the_hub(world: World) -> None:
    assert world.llmctl("import", f"hf:{NAME}").code == 0
    asked = len(world.hub.asked)
    status = world.llmctl("status", "runs/Tiny-0.1B", "--json")
    assert status.json["stages"]["import"]["state"] == "up to date"
    assert world.llmctl("verify", "runs/Tiny-0.1B").code == 0
    assert world.llmctl("run", "runs/Tiny-0.1B").code == 0
    recipe = f'[model]\nfrom = "hf:{NAME}@{world.hub.revisions["main"]}"\n[export]\nformats = ["hf"]\n'
    (world.path / "Tiny-0.1B.toml").write_text(recipe)
    run = world.llmctl("run", "Tiny-0.1B.toml", "--json")
    assert run.code == 0, run.err
    assert run.json["stages"]["import"]["made"] is False
    card = (world.path / "runs/Tiny-0.1B/export/import/hf/README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert len(world.hub.asked) == asked


def test_a_second_import_looks_whether_the_branch_has_moved(world: World) -> None:
    first = world.llmctl("import", f"hf:{NAME}", "--json").json
    fetched = world.hub.fetched()
    world.hub.asked.clear()
    again = world.llmctl("import", f"hf:{NAME}", "--json").json
    assert again["identity"] == first["identity"]
    assert again["stages"]["import"]["made"] is False
    assert world.hub.fetched() == set()
    other = folders.write(world.path / "newer", seed=1)
    world.hub.publish(other)
    moved = world.llmctl("import", f"hf:{NAME}")
    assert moved.code == 0, moved.err
    assert "import is stale: it was made from hf:some-org/Tiny-0.1B@" in moved.out
    assert world.hub.fetched() < fetched  # only what differs
    assert (world.path / "runs/Tiny-0.1B/import/model.safetensors").read_bytes() == (
        other / "model.safetensors"
    ).read_bytes()


def test_offline_means_the_cache(world: World) -> None:
    nothing = world.llmctl("import", f"hf:{NAME}", "--json", HF_HUB_OFFLINE="1")
    assert nothing.code == 6
    assert "offline, and not in the cache" in nothing.json["error"]["message"]
    assert "HF_HUB_OFFLINE" in nothing.json["error"]["hint"]
    assert world.hub.asked == []
    assert world.llmctl("import", f"hf:{NAME}", "--as", "one").code == 0
    asked = len(world.hub.asked)
    two = world.llmctl("import", f"hf:{NAME}", "--as", "two", HF_HUB_OFFLINE="1")
    assert two.code == 0, two.err
    assert len(world.hub.asked) == asked
    assert world.manifest("one")["files"] == world.manifest("two")["files"]


def test_shards_are_fetched_by_their_index(world: World) -> None:
    folder = folders.write(world.path / "sharded")
    folders.shard(folder)
    (folder / "model-00009-of-00009.safetensors").write_text("of another index")
    world.hub.publish(folder, "sharded")
    done = world.llmctl("import", f"hf:{NAME}@sharded")
    assert done.code == 0, done.err
    assert "model-00009-of-00009.safetensors" not in world.hub.fetched()
    made = world.path / "runs/Tiny-0.1B/import"
    assert folders.weights(made).keys() == folders.weights(folder).keys()


def test_pickled_weights_are_not_even_fetched(world: World) -> None:
    folder = folders.write(world.path / "old")
    folders.pickle(folder)
    world.hub.publish(folder, "old")
    refused = world.llmctl("import", f"hf:{NAME}@old")
    assert refused.code == 3
    assert "--convert-pickle" in refused.err
    assert "pytorch_model.bin" not in world.hub.fetched()
    done = world.llmctl("import", f"hf:{NAME}@old", "--convert-pickle")
    assert done.code == 0, done.err
    assert (world.path / "runs/Tiny-0.1B/import/model.safetensors").is_file()


def test_what_llmctl_cannot_build_costs_no_download(world: World) -> None:
    folder = folders.write(world.path / "other")
    folders.edit(folder, model_type="mixtral")
    world.hub.publish(folder, "moe")
    done = world.llmctl("import", f"hf:{NAME}@moe")
    assert done.code == 3
    assert "model_type is 'mixtral'" in done.err
    assert "the nearest is mistral" in done.err
    assert "model.safetensors" not in world.hub.fetched()


def test_a_private_one_wants_a_token(world: World) -> None:
    world.hub.token = "hf_secret"
    denied = world.llmctl("import", f"hf:{NAME}", HF_TOKEN="")
    assert denied.code == 3
    assert "HF_TOKEN" in denied.err
    done = world.llmctl("import", f"hf:{NAME}", "-v", HF_TOKEN="hf_secret")
    assert done.code == 0, done.err
    kept = [path for path in (world.path / "runs").rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in kept)
    assert "hf_secret" not in done.out + done.err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("hf:some-org/Other", 3, "no such repository at http://127.0.0.1"),
        (f"hf:{NAME}@v9", 3, "the repository has no such revision"),
        (f"hf:{NAME}@{'0' * 40}", 3, "hf:some-org/Tiny-0.1B@0000"),
        ("hf:../../etc", 3, "names no repository"),
        ("hf:a/b/c", 3, "names no repository"),
        (f"hf:{NAME}@../../x", 3, "names no repository"),
        ("hf:", 3, "names no repository"),
    ],
)
def test_what_is_not_there_is_named(world: World, name: str, code: int, message: str) -> None:
    done = world.llmctl("import", name)
    assert done.code == code, done.out + done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (world.path / "runs").exists() or not list((world.path / "runs").glob("*/import"))


def test_a_gated_one_says_what_to_do(world: World) -> None:
    world.hub.gated = True
    done = world.llmctl("import", f"hf:{NAME}")
    assert done.code == 3, done.err
    assert "accept its terms" in done.err


def test_a_hub_that_fails_in_the_middle_leaves_nothing_half(world: World) -> None:
    world.hub.broken = True
    done = world.llmctl("import", f"hf:{NAME}")
    assert done.code == 4, done.err
    assert "fetches what is missing" in done.err or "try again" in done.err
    assert not (world.path / "runs/Tiny-0.1B/import").exists()
    world.hub.broken = False
    assert world.llmctl("import", f"hf:{NAME}").code == 0


def test_a_hub_that_is_not_there(world: World) -> None:
    done = world.llmctl("import", f"hf:{NAME}", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.code == 4, done.err
    assert "http://127.0.0.1:9" in done.err


def test_a_dry_run_fetches_no_weights(world: World) -> None:
    done = world.llmctl("import", f"hf:{NAME}", "--dry-run")
    assert done.code == 0, done.err
    assert "would be made (missing)" in done.out
    assert world.hub.fetched() == {"config.json", "generation_config.json"}
    assert not (world.path / "runs").exists()


def test_a_recipe_names_the_commit(world: World) -> None:
    (world.path / "t.toml").write_text(f'[model]\nfrom = "hf:{NAME}@main"\n[export]\nformats = ["hf"]\n')
    done = world.llmctl("run", "t.toml")
    assert done.code == 3
    assert "names no commit" in done.err
    assert f"llmctl import hf:{NAME}@main" in done.err
    assert world.hub.asked == []


def test_without_the_package_the_extra_is_named(world: World) -> None:
    before = "import sys; sys.modules['huggingface_hub'] = None"
    environment = {"HF_ENDPOINT": world.hub.url, **{name: os.environ[name] for name in ("HOME",) if name in os.environ}}
    done = world.warm.run("import", f"hf:{NAME}", cwd=world.path, before=before, env=environment)
    assert done.code == 6
    assert "pip install 'llmctl[hub]'" in done.err
