"""The recipe: what it accepts, and that every error names its place and its mend."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import recipe
from llmctl.errors import RecipeError
from llmctl.recipe import Recipe

WHOLE = """\
name = "whole"
seed = 7

[prep]
sources = ["notes.txt", "builtin:python-stdlib"]

[prep.tokenizer]
type = "bpe"
vocab_size = 512

[model]
depth = 2

[pretrain]
max_steps = 10
learning_rate = 3e-4

[finetune]
sources = "chats.jsonl"

[eval]
text = ["more.txt"]

[eval.require]
val_bits_per_byte = "<1.6"

[export]
formats = ["onnx", "hf"]

[serve]
port = 0
"""


def written(folder: Path, text: str, name: str = "r.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    return caught.value


# ------------------------------------------------------------------------------------------------------------- errors

# what is written, the line the error names, words of the message, words of the mend
KEYS = "llmctl init --keys "
MISTAKES = {
    "key": ("[pretrain]\nlearning_rat = 1", 2, "unknown key `learning_rat` in [pretrain]", "mean `learning_rate`"),
    "key of a subsection": ("[prep]\nsources='x'\n[prep.tokenizer]\nvocab = 4", 4, "`vocab` in [prep.tok", "vocab"),
    "key of another section": ("[pretrain]\n[export]\nlora_r = 1", 3, "`lora_r` in [export]", "a key of [finetune]"),
    "section": ("name='a'\n[pretrian]\n", 2, "unknown section or key `pretrian`", "Did you mean `pretrain`"),
    "top-level key": ("sed = 3", 1, "`sed`", "Did you mean `seed`"),
    "kind": ("[model]\n\ndepth = 'six'", 3, "[model] depth: ", KEYS + "model"),
    "kind in a list": ("[prep]\nsources = [\n 'a',\n 3]", 2, "[prep] sources: ", "llmctl init --keys prep"),
    "kind of a union": ("[pretrain]\nmicro_batch_size = 'many'", 2, "[pretrain] micro_batch_size: ", "--keys pretrain"),
    "range": ("[prep]\nsources='x'\nval_percent = 50", 3, "less than 50", "--keys prep"),
    "choice": ("[prep]\nsources='x'\n[model]\nfamily='gpt5'", 4, "'t5' or 'lstm'", "--keys model"),
    "key of other families": (
        "[prep]\nsources='x'\n[model]\nfamily='bert'\n\nrope_theta=1e6", 6, "bert has no such thing; qwen3", "--keys"
    ),
    "heads of an LSTM": ("[model]\nfamily='lstm'\nnum_attention_heads=2", 3, "[model] num_attention_heads: lstm", ""),
    "chats for an encoder": (
        "[model]\nfamily='bert'\n[finetune]\nsources='x'", None, "bert is an encoder: leave the section out", ""
    ),
    "infinite": ("[pretrain]\nlearning_rate = inf", 2, "finite", "--keys pretrain"),
    "missing": ("[prep]\nval_percent = 5", 1, "[prep] has no `sources`", "llmctl init --keys prep"),
    "empty": ("[prep]\nsources = []", 2, "names no source", "--keys prep"),
    "gate": ("[eval.require]\nval_loss = '~2'", 1, "is not a comparison", ""),
    "not a section": ("prep = 3", 1, "expected a section", ""),
    "section twice": ("[model]\n[model]\n", 2, "not TOML", "toml.io"),
    "not TOML": ("name = 'a'\nseed =\n", 2, "not TOML", "toml.io"),
    "name": ("seed = 1\nname = '../x'", 2, "`name`", ""),
    "reserved name": ("name = 'current'", 1, "`name`", ""),
    "no prep": ("name='x'\n[pretrain]\nmax_steps = 1", None, "[pretrain] needs a [prep] section", ""),
    "mixture of another": (
        "[prep]\nsources=['a','b']\n[pretrain]\nmixture={a=1,c=1}", None, "mixture: 'c' is none of [prep] sources", ""
    ),
    "mixture of some": (
        "[prep]\nsources=['a','b']\n[pretrain]\nmixture={a=1}", None, "mixture: 'b' has no weight (0 leaves it out)", ""
    ),
    "mixture of nothing": (
        "[prep]\nsources=['a','b']\n[pretrain]\nmixture={a=0,b=0}", None, "one of the weights must be above 0", ""
    ),
    "weight below nothing": (
        "[prep]\nsources=['a']\n[pretrain]\nmixture={a=-1}", 4, "greater than or equal to 0", "--keys pretrain"
    ),
    "middles of no fim": (
        "[prep]\nsources='x'\n[pretrain]\nfim_rate=0.5", 3, 'objective = "fim", or leave the key out', "--keys pretrain"
    ),
    "origin": ("origin = 3", 1, "`origin`", ""),
    "origin's root": ("[origin]\nroot = 3", 2, "[origin] root", ""),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_names_line_found_and_mend(tmp_path: Path, mistake: str) -> None:
    text, line, message, hint = MISTAKES[mistake]
    problem = refused(written(tmp_path, text))
    assert problem.file == str(tmp_path / "r.toml")
    assert problem.line == line
    assert message in problem.message
    assert hint in problem.hint
    assert problem.exit_code == 2


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes("name = 'caf\xe9'".encode("latin-1"))
    assert "UTF-8" in refused(path).message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    written(tmp_path, "", "small.toml")
    problem = refused(tmp_path / "smal.toml")
    assert "no such recipe" in problem.message
    assert str(tmp_path / "small.toml") in problem.hint
    assert "llmctl init" in refused(tmp_path / "nowhere" / "other.toml").hint


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "r.toml").mkdir()
    assert "cannot be read" in refused(tmp_path / "r.toml").message


def test_lines_after_multiline_strings_and_comments(tmp_path: Path) -> None:
    text = '# [pretrain]\n[pretrain]\nprompts = [\n"""\ndepth = 1\n""",\n]  # x = 3\n[model] # "quoted"\n"dept" = 3\n'
    assert refused(written(tmp_path, text)).line == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.max_stepz=3", "unknown key `max_stepz` in [pretrain]"),
        ("pretran.max_steps=3", "unknown section or key `pretran`"),
        ("pretrain.max_steps=three", "[pretrain] max_steps"),
        ("pretrain.max_steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("name.x=3", "name is not a section"),
        ("seed.x=3", "seed is not a section"),
        ("prep.sources.x=3", "sources is not a section"),
        ("prep.sources=3", "[prep] sources"),
        ("prep.sources=[3]", "[prep] sources"),
        ("prep.sources=[]", "names no source"),
        ("prep=3", "expected a section"),
    ],
)
def test_overrides_are_checked_like_keys(tmp_path: Path, override: str, message: str) -> None:
    problem = refused(written(tmp_path, WHOLE), override)
    assert message in problem.message
    assert f"--set {override}" in problem.message
    assert problem.file is None


# -------------------------------------------------------------------------------------------------------------- base


def test_base_is_overlaid_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, WHOLE, "base.toml")
    made = recipe.load(written(tmp_path, "base = 'base.toml'\n[pretrain]\nmax_steps = 20\n", "mine.toml"))
    assert made.name == "mine"  # the base's name would make two recipes share a run
    assert made.seed == 7
    assert made.pretrain is not None
    assert (made.pretrain.max_steps, made.pretrain.learning_rate) == (20, 3e-4)


def test_a_base_in_another_folder_keeps_its_own_paths(tmp_path: Path) -> None:
    written(tmp_path, WHOLE, "shared/base.toml")
    made = recipe.load(written(tmp_path, "base = '../shared/base.toml'\n[eval]\ntext = 'mine.txt'\n", "here/r.toml"))
    assert made.prep is not None
    assert made.eval is not None
    assert made.prep.sources == ("../shared/notes.txt", "builtin:python-stdlib")  # relative: a checkout may move
    assert made.eval.text == ("mine.txt",)
    assert made.root == tmp_path / "here"


def test_a_mixture_names_its_sources_as_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the base lies and wherever the user stands, its keys follow the sources."""
    text = "[prep]\nsources = ['a', 'builtin:python-stdlib']\n[pretrain]\n"
    written(tmp_path, text + "mixture = {a = 2, 'builtin:python-stdlib' = 1}\n", "shared/base.toml")
    path = written(tmp_path, "base = '../shared/base.toml'\n", "here/r.toml")
    made = recipe.load(path)
    assert made.section("pretrain").mixture == {"../shared/a": 2.0, "builtin:python-stdlib": 1.0}
    kept = recipe.load(written(tmp_path, recipe.resolved(made, []), "runs/kept.toml"))
    assert kept.section("pretrain").mixture == made.section("pretrain").mixture
    monkeypatch.chdir(tmp_path / "shared")
    overrides = ["prep.sources=['a', '../b']", "pretrain.mixture={'a' = 1, '../b' = 0}"]
    outside = recipe.load(tmp_path / "shared/base.toml", overrides)
    assert outside.section("pretrain").mixture == {"a": 1.0, str(tmp_path / "b"): 0.0}
    there = recipe.load(written(tmp_path, text, "r.toml"), overrides)
    assert there.section("pretrain").mixture == {"shared/a": 1.0, "b": 0.0}


def test_a_repository_means_the_same_from_any_folder(tmp_path: Path) -> None:
    source = f"hf:org/name@{'0' * 40}"
    written(tmp_path, f"[model]\nfrom = '{source}'\n", "shared/base.toml")
    path = written(tmp_path, "base = '../shared/base.toml'\n", "here/r.toml")
    for made in (recipe.load(path), recipe.load(path, [f"model.from={source}"])):
        assert made.section("model").source == source


def test_errors_of_a_base_name_the_base(tmp_path: Path) -> None:
    written(tmp_path, "[model]\ndept = 3\n", "base.toml")
    problem = refused(written(tmp_path, "base = 'base.toml'\n[model]\nfamily = 'llama'\n"))
    assert problem.where() == f"{tmp_path / 'base.toml'}:2"


def test_bases_do_not_chain(tmp_path: Path) -> None:
    written(tmp_path, "base = 'c.toml'", "b.toml")
    problem = refused(written(tmp_path, "seed = 1\nbase = 'b.toml'"))
    assert problem.line == 2
    assert "may not have a base" in problem.message


def test_a_base_that_is_missing_or_damaged(tmp_path: Path) -> None:
    problem = refused(written(tmp_path, "seed = 1\nbase = 'none.toml'"))
    assert (problem.file, problem.line) == (str(tmp_path / "r.toml"), 2)
    assert "none.toml" in problem.message
    written(tmp_path, "x = = 1", "bad.toml")
    assert refused(written(tmp_path, "base = 'bad.toml'")).where() == f"{tmp_path / 'bad.toml'}:1"


# ---------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_toml_and_bare_words_are_strings(tmp_path: Path) -> None:
    made = recipe.load(
        written(tmp_path, WHOLE),
        ["pretrain.max_steps=3", "model.family=llama", 'export.formats=["hf"]', "pretrain.compile=false"],
    )
    assert made.pretrain is not None
    assert made.model is not None
    assert (made.pretrain.max_steps, made.pretrain.compile, made.model.family) == (3, False, "llama")
    assert made.section("export").formats == ("hf",)


def test_paths_of_overrides_are_from_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = written(tmp_path, WHOLE)
    made = recipe.load(path, ["prep.sources=a.txt", "eval.text=[]", "export.text=builtin:python-stdlib"])
    assert made.section("prep").sources == ("elsewhere/a.txt",)
    assert recipe.load(path, ["prep.sources=../a.txt"]).section("prep").sources == ("a.txt",)
    there = written(tmp_path, WHOLE, "there/r.toml")
    assert recipe.load(there, ["prep.sources=a.txt"]).section("prep").sources == (str(tmp_path / "elsewhere/a.txt"),)
    assert made.section("eval").text == ()
    assert made.section("export").text == "builtin:python-stdlib"
    assert recipe.load(path, ["prep.tokenizer.from="]).section("prep").tokenizer.source == ""


def test_kept_overrides_mean_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, overrides = written(tmp_path, WHOLE), ["prep.sources=a.txt", "pretrain.max_steps=4"]
    monkeypatch.chdir(tmp_path)
    kept = recipe.load(written(tmp_path, recipe.resolved(recipe.load(path, overrides), overrides), "kept.toml"))
    assert kept.origin is not None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = recipe.load(Path(kept.origin.recipe), kept.origin.overrides)
    assert again.section("prep").sources == ("a.txt",)
    assert again.root == tmp_path
    assert again.section("pretrain").max_steps == 4


# --------------------------------------------------------------------------------------------------------- round trip


def same(one: Recipe, other: Recipe) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("name", "seed", *recipe.SECTIONS))


def test_resolved_loads_as_the_same_recipe(tmp_path: Path) -> None:
    made = recipe.load(written(tmp_path, WHOLE))
    kept = recipe.load(written(tmp_path, recipe.resolved(made, []), "runs/whole/recipe.resolved.toml"))
    assert same(made, kept)
    assert kept.root == tmp_path  # its paths are still the recipe's
    again = recipe.load(written(tmp_path, recipe.resolved(kept, []), "again.toml"))
    assert same(kept, again)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(TEXT, max_size=3),
    system=TEXT,
    rate=st.floats(1e-300, 1e300),
    gates=st.dictionaries(TEXT, st.just("<1.5"), max_size=2),
    sources=st.lists(TEXT.filter(bool), min_size=1, max_size=3),
)
def test_any_value_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[str],
    system: str,
    rate: float,
    gates: dict[str, str],
    sources: list[str],
) -> None:
    made = Recipe.model_validate(
        {
            "name": "x",
            "prep": {"sources": sources},
            "pretrain": {"prompts": prompts, "learning_rate": rate},
            "finetune": {"sources": sources, "system": system},
            "eval": {"require": gates},
        }
    )
    path = tmp_path_factory.getbasetemp() / "roundtrip.toml"
    path.write_text(recipe.resolved(made, []), encoding="utf-8")
    assert same(made, recipe.load(path))


def test_a_key_is_never_kept_in_the_run(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE + 'api_key = "hunter2"\n')
    assert recipe.load(path).section("serve").api_key == "hunter2"
    assert "hunter2" not in recipe.resolved(recipe.load(path), [])
    overrides = ["serve.api_key=hunter3"]
    assert "hunter3" not in recipe.resolved(recipe.load(path, overrides), overrides)


@pytest.mark.parametrize(
    ("stem", "name"),
    [("my notes", "my-notes"), ("_draft", "draft"), ("..", "run"), ("x" * 90, "x" * 64), ("论文", "run")],
)
def test_every_file_name_suggests_a_valid_run_name(tmp_path: Path, stem: str, name: str) -> None:
    assert recipe.load(written(tmp_path, "", f"{stem}.toml")).name == name


# ---------------------------------------------------------------------------------------------------------- identity


def test_operational_keys_are_never_declared() -> None:
    """What decides how a call runs and not what it makes must not make an artifact stale."""
    of_training = {"micro_batch_size", "compile", "eval_every", "save_every", "keep_last", "keep_every", "log_every"}
    of_training |= {"report_to", "strategy", "activation_checkpointing", "rank_timeout"}
    operational = {
        "model": {"convert_pickle"},
        "pretrain": of_training | {"prompts", "sample_every"},
        "finetune": of_training,
        "eval": {"require"},
        "export": {"debug_parity"},
        "serve": {"host", "port", "api_key", "served_model_name", "max_model_len", "runtime", "dtype"},
    }
    made = Recipe.model_validate({"name": "x", "prep": {"sources": ["a"]}, "finetune": {"sources": ["b"]}})
    for name in recipe.SECTIONS:
        section = made.section(name)
        keys = {field.alias or key for key, field in type(section).model_fields.items()}
        assert keys - set(section.declared()) == operational.get(name, set()), name


def test_what_is_a_default_is_no_key_of_another_family(tmp_path: Path) -> None:
    """A resolved recipe spells every default out, those of other families too."""
    made = recipe.load(written(tmp_path, "[model]\nfamily = 'bert'\n"))
    kept = recipe.load(written(tmp_path, recipe.resolved(made, []), "kept.toml"))
    assert same(made, kept)


def test_declared_is_plain_json_with_defaults_filled_in() -> None:
    made = Recipe.model_validate({"name": "x", "prep": {"sources": "a"}})
    declared = made.section("prep").declared()
    assert json.loads(json.dumps(declared)) == declared
    assert declared["sources"] == ["a"]
    assert declared["tokenizer"] == {"type": "bpe", "vocab_size": 4096, "from": "", "extend": 0}


# ------------------------------------------------------------------------------------------------------- JSON Schema


def accepts(schema: dict[str, Any], value: Any, whole: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies a schema: the keywords that pydantic writes, and an error for any other."""
    passed = True
    for word, rule in schema.items():
        match word:
            case "$ref":
                passed &= accepts(whole["$defs"][rule.removeprefix("#/$defs/")], value, whole)
            case "anyOf":
                passed &= any(accepts(option, value, whole) for option in rule)
            case "type":
                kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
                kind = {**kinds, "object": dict, "null": type(None)}[rule]
                passed &= isinstance(value, kind) and (rule == "boolean" or not isinstance(value, bool))
            case "enum":
                passed &= value in rule
            case "const":
                passed &= value == rule
            case "properties" if isinstance(value, dict):
                passed &= all(accepts(rule[key], item, whole) for key, item in value.items() if key in rule)
            case "additionalProperties" if isinstance(value, dict):
                extra = {key: item for key, item in value.items() if key not in schema.get("properties", {})}
                passed &= not extra if rule is False else all(accepts(rule, item, whole) for item in extra.values())
            case "required":
                passed &= not isinstance(value, dict) or all(key in value for key in rule)
            case "items" if isinstance(value, list):
                passed &= all(accepts(rule, item, whole) for item in value)
            case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum" if isinstance(value, (int, float)):
                bounds = {"minimum": value >= rule, "exclusiveMinimum": value > rule}
                passed &= {**bounds, "maximum": value <= rule, "exclusiveMaximum": value < rule}[word]
            case "pattern" | "title" | "description" | "default" | "operational" | "$schema" | "$defs":
                pass
            case "properties" | "additionalProperties" | "items" | "minimum" | "exclusiveMinimum" | "maximum":
                pass
            case "exclusiveMaximum":
                pass
            case _:
                raise AssertionError(f"unknown keyword {word}")
    return passed


def test_the_schema_takes_what_llmctl_takes() -> None:
    schema = recipe.json_schema()
    assert accepts(schema, tomllib.loads(WHOLE), schema)
    assert accepts(schema, {"base": "x.toml"}, schema)
    assert accepts(schema, {"prep": {"sources": "notes.txt"}, "model": {"from": "x"}}, schema)


@pytest.mark.parametrize(
    "mistake", ["key", "key of a subsection", "section", "kind", "kind in a list", "choice", "range"]
)
def test_the_schema_refuses_what_llmctl_refuses(mistake: str) -> None:
    schema = recipe.json_schema()
    assert not accepts(schema, tomllib.loads(MISTAKES[mistake][0]), schema)


def test_the_schema_hides_what_llmctl_writes_itself() -> None:
    assert not {"origin", "file", "root"} & set(recipe.json_schema()["properties"])


# ---------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("section", [*recipe.SECTIONS, "prep.tokenizer"])
def test_every_key_is_explained(section: str) -> None:
    rows = recipe.reference(section)
    assert rows
    for key, kind, default, meaning in rows:
        assert all((key, kind, default)), (section, key)
        assert len(meaning) > 10, (section, key)


def test_reference_of_an_unknown_section() -> None:
    with pytest.raises(RecipeError, match="no section") as caught:
        recipe.reference("pretrian")
    assert "pretrain" in caught.value.hint
