"""The command line: one short function a command. Nothing heavy is imported until a command runs (a test guards it)."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import llmctl
from llmctl import console, launch
from llmctl.errors import DataError, Interrupted, LlmctlError, Paused, RunError, UsageError

if TYPE_CHECKING:
    from llmctl.artifact import Artifact
    from llmctl.chain import Options, Step
    from llmctl.target import Target

STAGES, AROUND = "Stages", "Around them"

app = typer.Typer(
    name="llmctl",
    help="Raw text to a served language model: prep, pretrain, finetune, eval, export, serve, chained by "
    "artifacts on disk.",
    epilog="Start here:  llmctl init FOLDER   then   llmctl run FOLDER.toml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
benches = typer.Typer(help="Measure this machine on a recipe's or a model's own work.", no_args_is_help=True)
app.add_typer(benches, name="bench", rich_help_panel=AROUND)


@dataclass(frozen=True)
class Call:
    """The flags that mean the same with every command."""

    set_: list[str]
    run_dir: Path | None
    device: str
    dry_run: bool
    rebuild: bool
    upstream: bool
    wait_lock: bool
    max_time: str
    json: bool
    events: Path | None
    verbose: bool
    quiet: bool

    def target(self, name: str | None, *aliases: str) -> Target:
        """What the target names, said before anything else. `aliases` are flags of this command, as the key they
        stand for.
        """
        from llmctl import target

        found = target.resolve(name, run_dir=self.run_dir, overrides=(*aliases, *self.set_), dry_run=self.dry_run)
        console.debug(found.said) if name is not None and name.endswith(".toml") else console.say(
            found.said, style="dim"
        )
        return found

    def options(self, *aliases: str, until_step: int | None = None) -> Options:
        """The flags as the chain takes them."""
        from llmctl.chain import Options

        deadline = time.monotonic() + _seconds(self.max_time) if self.max_time else None
        overrides = (*aliases, *self.set_)
        return Options(
            self.device, self.rebuild, self.upstream, self.dry_run, self.wait_lock, deadline, until_step, overrides
        )


Target_ = Annotated[
    str | None,
    typer.Argument(
        metavar="[TARGET]", help="A recipe (.toml), a run or an artifact; default: the current run.", show_default=False
    ),
]

UntilStep = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Stop after step N with the state saved; the schedule stays.", show_default=False
    ),
]

Nproc = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Train with N processes here: one a GPU, or a share of the CPU's threads."),
]


def _option(kind: Any, default: Any, help_: str, *names: str, **more: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, help=help_, **more)], default


_COMMON: dict[str, tuple[Any, Any]] = {
    "set_": _option(list[str] | None, None, "Override a key of the recipe (repeatable).", "--set", metavar="KEY=VALUE"),
    "run_dir": _option(Path | None, None, "The run's folder, instead of runs/<name>.", "--run-dir", show_default=False),
    "device": _option(str, "auto", "auto, cpu or cuda.", "--device"),
    "dry_run": _option(bool, False, "Say what would be done, and why; do nothing.", "--dry-run"),
    "rebuild": _option(bool, False, "Make it again, dropping what is unfinished.", "--rebuild"),
    "no_upstream": _option(bool, False, "Refuse to run missing stages before this one.", "--no-upstream"),
    "wait_lock": _option(bool, False, "Wait for a run that another process holds.", "--wait-lock"),
    "max_time": _option(str, "", "Stop, with the state saved, after e.g. 30m.", "--max-time", metavar="TIME"),
    "json": _option(bool, False, "One JSON document on stdout; the rest to stderr.", "--json"),
    "events": _option(Path | None, None, "JSON lines as it happens.", "--events", metavar="FILE", show_default=False),
    "verbose": _option(bool, False, "More, and tracebacks.", "--verbose", "-v"),
    "quiet": _option(bool, False, "Warnings and errors only.", "--quiet", "-q"),
}


def command(
    panel: str | None, *, name: str | None = None, group: typer.Typer = app
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Registers a command whose function takes a `Call` first; the common flags are added to its signature."""

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        common = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for key, (kind, default) in _COMMON.items()
        ]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            flags = {key: given.pop(key) for key in _COMMON}
            call = Call(upstream=not flags.pop("no_upstream"), **{**flags, "set_": flags["set_"] or []})
            raise typer.Exit(_guarded(functools.partial(function, call, **given), call))

        run.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
        return group.command(name, rich_help_panel=panel)(run)

    return register


Outcome = dict[str, Any] | tuple[dict[str, Any], int] | None  # a command's document, and its exit code where not 0


def _guarded(work: Callable[[], Outcome], call: Call) -> int:
    """Runs a command's work; whatever happens becomes one message, one document and an exit code."""
    try:
        console.configure(json=call.json, quiet=call.quiet, verbose=call.verbose, events=call.events)
        signal.signal(signal.SIGTERM, _terminate)
        if launch.rank():
            console.mute()
        made = work()
    except LlmctlError as problem:
        return _failed(problem, call.verbose)
    except KeyboardInterrupt:
        stopped = Interrupted("interrupted; what was finished is kept", hint="the same command again goes on")
        return _failed(stopped, call.verbose)
    except Exception as bug:
        return _failed(_of_the_disk(bug) or _of_memory(bug) or _bug(bug), call.verbose, bug)
    document, code = made if isinstance(made, tuple) else (made, 0)
    if document is not None:
        console.result({"ok": True, "error": None, **document})
    console.close()
    return code


# What the system refuses, and the mend: no bug of ours wherever it happens.
_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend its rights, or name another folder (--run-dir)"),
}


def _of_the_disk(reason: Exception) -> LlmctlError | None:
    if not isinstance(reason, OSError) or reason.errno not in _DISK:
        return None
    hint = f"{_DISK[reason.errno]}; what was published before is whole"
    return RunError(f"cannot write: {reason.strerror}", file=reason.filename, hint=hint)


def _of_memory(reason: Exception) -> LlmctlError | None:
    """Python's error, torch's on a CPU and torch's on a GPU."""
    of_torch = type(reason).__name__ == "OutOfMemoryError" or "allocate memory" in str(reason)
    if not isinstance(reason, MemoryError) and not (isinstance(reason, RuntimeError) and of_torch):
        return None
    return RunError("out of memory", hint="a smaller model, batch or context; llmctl doctor shows the memory")


def _bug(reason: Exception) -> LlmctlError:
    hint = "this is a bug in llmctl; -v shows where. Please report it."
    return LlmctlError(f"{type(reason).__name__}: {reason}", hint=hint)


def _failed(problem: LlmctlError, verbose: bool, cause: BaseException | None = None) -> int:
    if verbose:
        import traceback

        traceback.print_exception(cause or problem)
    console.error(problem)
    error = {
        "code": problem.code,
        "message": problem.message,
        "hint": problem.hint,
        "file": problem.file,
        "line": problem.line,
    }
    console.result({"ok": False, "error": error, "artifact": None, "identity": None, "metrics": {}})
    console.close()
    return problem.exit_code


def _terminate(signum: int, frame: object) -> None:
    raise Interrupted("terminated; what was finished is kept", hint="the same command again goes on", signum=signum)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smh]?)", text)
    if found is None:
        raise UsageError(f"--max-time {text}: expected a time", hint="for example 90s, 30m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _document(artifact: Artifact | None, **more: Any) -> dict[str, Any]:
    if artifact is None:
        return {"artifact": None, "identity": None, "metrics": {}, **more}
    return {"artifact": str(artifact.path), "identity": artifact.identity, "metrics": dict(artifact.metrics), **more}


def _make(
    call: Call,
    target: Target,
    goal: list[Step],
    *aliases: str,
    asked: Sequence[str] | None = None,
    until_step: int | None = None,
) -> dict[str, Any]:
    """Makes `goal`, says what was up to date, and gives the JSON document. `asked`: see `chain.make`."""
    from llmctl import chain

    done = chain.make(target.recipe, target.run, goal, call.options(*aliases, until_step=until_step), asked)
    for step, artifact, fresh in done:
        if not fresh and step is goal[-1]:
            console.say(f"{step.place} is up to date: {artifact.path} {artifact.short} (--rebuild makes it again)")
    return _document(
        done[-1][1] if done else None,
        stages={step.place: {"identity": made.identity, "made": fresh} for step, made, fresh in done},
    )


def _train(
    call: Call, name: str | None, place: str, *aliases: str, until_step: int | None = None, nproc: int = 1
) -> dict[str, Any]:
    """A stage of the target `name` and what is missing before it, on so many ranks."""
    with _ranks(call, nproc):
        return _upto(call, call.target(name, *aliases), place, *aliases, until_step=until_step)


def _ranks(call: Call, nproc: int) -> contextlib.AbstractContextManager[None]:
    return launch.processes(nproc, functools.partial(_failed, verbose=call.verbose))


def _upto(call: Call, target: Target, name: str, *aliases: str, until_step: int | None = None) -> dict[str, Any]:
    from llmctl import chain

    every = chain.steps(target.recipe, target.run)
    place = next((step.place for step in every if step.place == name), None)
    if place is None:
        raise UsageError(
            f"{target.recipe.file} has no [{name}] section", hint=f"add one; its keys: llmctl init --keys {name}"
        )
    goal = chain.upstream(every, place)
    if not call.upstream:
        for step, state in chain.states(target.recipe, target.run, goal).values():
            if step.place != place and not state.usable:
                raise UsageError(
                    f"{step.place} is {state.word}, and --no-upstream was given", hint=f"llmctl {step.stage.name} first"
                )
        goal = [step for step in goal if step.place == place]
    try:
        return _make(call, target, goal, *aliases, asked=[place], until_step=until_step)
    except Paused as paused:
        console.say(f"{paused} (the same command without --until-step goes on)")
        return _document(None, paused={"stage": paused.stage, "step": paused.step, "steps": paused.steps})


# ------------------------------------------------------------------------------------------------------------- stages


@command(STAGES)
def prep(
    call: Call,
    target: Target_ = None,
    preview: Annotated[int, typer.Option(metavar="N", help="Show N documents as they will be; write nothing.")] = 0,
) -> dict[str, Any]:
    """Clean, deduplicate and tokenise text."""
    found = call.target(target)
    if preview:
        from llmctl.prep import stage

        stage.preview(found.recipe, preview)
        return _document(None)
    return _upto(call, found, "prep")


@command(STAGES)
def pretrain(call: Call, target: Target_ = None, until_step: UntilStep = None, nproc: Nproc = 1) -> dict[str, Any]:
    """Train a model on the tokens of prep."""
    return _train(call, target, "pretrain", until_step=until_step, nproc=nproc)


@command(STAGES)
def finetune(
    call: Call,
    target: Target_ = None,
    method: Annotated[str, typer.Option(help="full or lora; alias of finetune.method.", show_default=False)] = "",
    until_step: UntilStep = None,
    nproc: Nproc = 1,
) -> dict[str, Any]:
    """Teach the model to chat."""
    aliases = [f'finetune.method="{method}"'] * bool(method)
    return _train(call, target, "finetune", *aliases, until_step=until_step, nproc=nproc)


@command(STAGES, name="eval")
def evaluate(
    call: Call,
    target: Target_ = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table in Markdown on stdout, for a CI summary.")
    ] = False,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="EVALUATION",
            help="An earlier evaluation: fail (exit 5) where this is significantly worse.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Measure the last model, beside the one it was made from."""
    from llmctl import chain
    from llmctl.eval import compare

    if markdown and call.json:
        raise UsageError("--markdown and --json both want stdout", hint="choose one")
    found = call.target(target)
    before = compare.read(baseline) if baseline is not None else None  # now: it may be what is about to be replaced
    if markdown:
        console.configure(json=False, quiet=call.quiet, verbose=call.verbose, events=call.events, to_stderr=True)
    place = found.model().place
    chain.warn_if_behind(found.recipe, found.run, place)
    made = _make(call, found, [chain.eval_step(found.recipe, place)])
    if made["artifact"] and markdown:
        compare.markdown(Path(made["artifact"]))
    if made["artifact"] and before is not None and baseline is not None:
        compare.against(Path(made["artifact"]), before, baseline)
    return made


@command(STAGES)
def export(
    call: Call,
    target: Target_ = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help='A graph for ONNX Runtime; alias of export.formats = ["onnx"].')
    ] = False,
    hf: Annotated[
        bool, typer.Option("--hf", help='The clean Hugging Face folder; alias of export.formats = ["hf"].')
    ] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help='One file for llama.cpp; alias of export.formats = ["gguf"].')
    ] = False,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help='An engine for NVIDIA GPUs; alias of export.formats = ["tensorrt"].')
    ] = False,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="ort or portable; alias of export.profile.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="fp32, fp16 or bf16; alias of export.dtype.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="TYPE", help="int4, int8 or int8-dynamic; alias of export.quantize."),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option("--target-bits", metavar="N", help="Mixed 4 and 8 bits; alias of export.target_bits."),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option("--max-ppl-increase", metavar="SHARE", help="E.g. 2%; alias of export.max_ppl_increase."),
    ] = None,
    gguf_type: Annotated[
        str | None,
        typer.Option("--gguf-type", metavar="TYPE", help="f16, q8_0, q4_0 ...; alias of export.gguf_type."),
    ] = None,
    debug_parity: Annotated[
        bool, typer.Option("--debug-parity", help="Name the node that is to blame; alias of export.debug_parity.")
    ] = False,
) -> dict[str, Any]:
    """Bring the last model into the form another runtime takes, and prove that it is the same model."""
    from llmctl import chain

    formats = (("onnx", onnx), ("hf", hf), ("gguf", gguf or gguf_type is not None), ("tensorrt", tensorrt))
    keys = {
        "formats": [name for name, flag in formats if flag] or None,
        "profile": profile,
        "dtype": dtype,
        "quantize": quantize,
        "target_bits": target_bits,
        "max_ppl_increase": max_ppl_increase,
        "gguf_type": gguf_type,
        "debug_parity": debug_parity or None,
    }
    aliases = [f"export.{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]
    found = call.target(target, *aliases)
    place = found.model().place
    chain.warn_if_behind(found.recipe, found.run, place)
    return _make(call, found, chain.export_steps(found.recipe, place), *aliases)


@command(STAGES)
def serve(
    call: Call,
    target: Target_ = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = "",
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.", show_default="8000")] = None,
    api_key: Annotated[
        str, typer.Option(envvar="LLMCTL_API_KEY", help="Clients must send it.", show_default=False)
    ] = "",
    served_model_name: Annotated[str, typer.Option(help="The name clients ask for.", show_default="the run's")] = "",
    max_model_len: Annotated[
        int, typer.Option(help="Cap on prompt and answer together.", show_default="the context")
    ] = 0,
    execute: Annotated[
        str,
        typer.Option(
            "--exec", metavar="CMD", help="Run CMD against the server when it is ready, then stop; its exit code."
        ),
    ] = "",
) -> Outcome:
    """Serve it over HTTP, as OpenAI's API does, with a chat page."""
    from llmctl import device
    from llmctl.serve import stage

    if execute:  # stdout belongs to CMD
        console.configure(quiet=call.quiet, verbose=call.verbose, events=call.events, to_stderr=True)
    found = call.target(target)
    flags = {
        "host": host,
        "port": port,
        "api_key": api_key,
        "served_model_name": served_model_name,
        "max_model_len": max_model_len,
    }
    given = {key: value for key, value in flags.items() if value not in ("", None) and (value or key == "port")}
    settings = found.recipe.section("serve").model_copy(update=given)
    served, chosen = found.runnable(), device.pick(call.device)
    if call.dry_run:
        console.say(f"would serve {served.path}")
        return _document(served)
    code = int(stage.serve(served, settings, chosen, name=found.run.name, command=execute or None))
    return {**_document(served), "ok": code == 0}, code


# -------------------------------------------------------------------------------------------------------- around them


@command(AROUND)
def run(call: Call, target: Target_ = None, nproc: Nproc = 1) -> dict[str, Any]:
    """Everything from prep to export that is not up to date."""
    from llmctl import status

    with _ranks(call, nproc):
        return status.run(call.target(target), call.options())


@command(AROUND, name="import")
def bring_in(
    call: Call,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A Hugging Face folder, a .gguf file, a run or artifact, or hf:org/name@revision."
        ),
    ],
    name: Annotated[
        str, typer.Option("--as", metavar="NAME", help="The run it becomes: runs/NAME.", show_default="SRC's name")
    ] = "",
    convert_pickle: Annotated[
        bool,
        typer.Option(
            "--convert-pickle", help="Take pickled weights (.bin) too, tensors alone; alias of model.convert_pickle."
        ),
    ] = False,
) -> dict[str, Any]:
    """Bring in a model from elsewhere, for every stage to use."""
    from llmctl import chain, target

    found = target.bring_in(
        source, name, run_dir=call.run_dir, overrides=tuple(call.set_), convert_pickle=convert_pickle
    )
    console.say(found.said, style="dim")
    was_there = found.run.path.exists()
    try:
        return _make(call, found, chain.import_steps(found.recipe, found.run))
    except DataError:
        if not was_there and not (found.run.path / "import").exists():  # a bad source leaves no empty run behind
            shutil.rmtree(found.run.path, ignore_errors=True)
        raise


@command(AROUND)
def status(
    call: Call,
    target: Target_ = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit 1 if anything is stale, missing or unfinished.")
    ] = False,
) -> Outcome:
    """What there is, what is stale, and why."""
    from llmctl import status as room

    document, behind = room.show(call.target(target))
    return document, 1 if exit_code and behind else 0


@command(AROUND)
def verify(call: Call, target: Target_ = None) -> dict[str, Any]:
    """Hash every file of the run again."""
    from llmctl import status

    return status.verify(call.target(target))


@command(AROUND)
def chat(
    call: Call,
    target: Target_ = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="One question; the answer alone goes to stdout.")] = "",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
) -> Outcome:
    """Talk to a model in the terminal."""
    console.configure(json=call.json, quiet=call.quiet, verbose=call.verbose, events=call.events, to_stderr=True)
    from llmctl import device
    from llmctl.serve import chat as room

    if call.json and not prompt and sys.stdin.isatty():
        raise UsageError("--json answers one question", hint='llmctl chat --json -p "..."')
    found = call.target(target)
    model, chosen = found.runnable(), device.pick(call.device)
    if call.dry_run:
        console.say(f"would talk to {model.path}")
        return _document(model)
    talk = functools.partial(
        room.chat, model, chosen, prompt=prompt or None, system=system, temperature=temperature, max_tokens=max_tokens
    )
    if not call.json:
        return _document(model), int(talk())
    with contextlib.redirect_stdout(io.StringIO()) as answer:
        code = int(talk())
    return {**_document(model), "answer": answer.getvalue().strip()}, code


@command(AROUND)
def plan(
    call: Call,
    target: Target_ = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="Plan for this GPU (h100, a100-80, l4, ...) instead of this machine.")
    ] = "",
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Plan for N processes, one a GPU.")] = 1,
    mfu: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the device's peak to expect.", show_default="0.4")
    ] = 0.0,
) -> dict[str, Any]:
    """What a training will cost: parameters, operations, memory, time; whether it fits, and what would make it fit."""
    from llmctl import device
    from llmctl import plan as room

    found = room.plan_of(call.target(target), device.pick(call.device), gpu=gpu, nproc=nproc, mfu=mfu)
    return _document(None, plan=found)


@command(None, name="train", group=benches)
def bench_train(call: Call, target: Target_ = None) -> dict[str, Any]:
    """How fast a recipe's training step is here: tokens a second, and its share of the best matrix product."""
    from llmctl import device
    from llmctl.bench import train as room

    found, chosen = call.target(target), device.pick(call.device)
    if call.dry_run:
        console.say(f"would train {found.recipe.file} on random tokens for some seconds")
        return _document(None)
    measured = room.train(found.recipe, chosen)
    room.show(measured)
    return {"artifact": None, "identity": None, "metrics": measured, **measured}


@command(None, name="decode", group=benches)
def bench_decode(call: Call, target: Target_ = None) -> dict[str, Any]:
    """How fast a model writes here, in torch and in every form it was exported in, against the memory's bandwidth."""
    from llmctl import device
    from llmctl.bench import decode as room

    found, chosen = call.target(target), device.pick(call.device)
    model = found.model()
    if call.dry_run:
        console.say(f"would measure {', '.join(variant.name for variant in room.variants(model, found.run, chosen))}")
        return _document(None)
    measured = room.decode(model, found.run, chosen)
    room.show(measured)
    return {"artifact": str(model.path), "identity": model.identity, "metrics": measured, **measured}


@command(AROUND)
def init(
    call: Call,
    folder: Annotated[Path | None, typer.Argument(help="A folder or file of your text.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The recipe to write.", show_default="FOLDER's name + .toml")
    ] = None,
    keys: Annotated[str, typer.Option("--keys", metavar="SECTION", help="List the keys of a section instead.")] = "",
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON Schema instead.")] = False,
) -> dict[str, Any] | None:
    """Look at a folder of text and write a recipe for it."""
    from llmctl import init as room

    if schema or keys:
        from llmctl import recipe

        if schema:
            console.document(recipe.json_schema())
            return None
        rows = recipe.reference(keys)
        console.columns(rows)
        return _document(
            None, keys=[dict(zip(("key", "kind", "default", "meaning"), row, strict=True)) for row in rows]
        )
    if folder is None:
        raise UsageError(
            "which folder?", hint="llmctl init FOLDER · llmctl init --keys pretrain · llmctl init --schema"
        )
    if call.dry_run:
        raise UsageError("init writes one file, and --dry-run writes nothing", hint="leave --dry-run out")
    path = room.init(folder, out, force=call.rebuild)
    return {"artifact": str(path), "identity": None, "metrics": {}}


@command(AROUND)
def report(call: Call, target: Target_ = None) -> dict[str, Any]:
    """One self-contained page about the run, to show a colleague."""
    from llmctl import report as room

    found = call.target(target)
    if call.dry_run:
        console.say(f"would write {found.run.path / room.NAME}")
        return _document(None)
    path = room.write(found.run)
    console.say(f"{path}")
    return {"artifact": str(path), "identity": None, "metrics": {}}


@command(AROUND)
def doctor(call: Call) -> dict[str, Any]:
    """What is installed, which devices there are, and what each would enable."""
    from llmctl import doctor as room

    found = room.doctor()
    room.show(found)
    return {"artifact": None, "identity": None, "metrics": {}, "doctor": found}


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    if version:
        console.raw(f"llmctl {llmctl.__version__}\n")
        raise typer.Exit


def main() -> None:
    """The console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # say it, or tokenizers warns after a fork
    # OpenMP's threads spin while they wait. Beside another busy process that made a small model's step 15 to 30 times
    # slower on two cores. They sleep instead, after a look of some microseconds, which gives a tiny model a tenth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        sys.exit(app(standalone_mode=False))
    except BrokenPipeError:
        sys.exit(141)
    except Exception as problem:
        if not hasattr(problem, "format_message"):  # Click's own errors, whichever Click typer brings
            raise
        sys.exit(_misused(problem))


def _misused(problem: Any) -> int:
    """A command line that can't be read: our words, and the document where --json asks for it."""
    if len(sys.argv) < 2:
        problem.show()  # the help
        return 2
    console.configure(json="--json" in sys.argv)
    where = problem.ctx.command_path if getattr(problem, "ctx", None) else "llmctl"
    return _failed(UsageError(problem.format_message(), hint=f"{where} --help"), verbose=False)


if __name__ == "__main__":
    main()
