"""`llmctl import`: a model from elsewhere becomes an artifact that every stage takes.

The weights stay what they were, bit for bit, in the dtype and under the names they were stored in: files are copied
after their headers were checked against config.json. What is no safetensors (a GGUF file, a pickle that may be opened)
is written as such, one tensor at a time. Nothing that a model's folder holds is ever run.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmctl import console
from llmctl.artifact import MANIFEST, Artifact, Job
from llmctl.errors import DataError
from llmctl.importing import hub, pickled
from llmctl.model import gguf, hf, origin, storage
from llmctl.model.config import Config
from llmctl.model.families.stated import config_from_json
from llmctl.model.jsonfile import read_json, write_json
from llmctl.model.origin import Origin
from llmctl.text.chat import ChatTemplate
from llmctl.text.tokenizer import Tokenizer

DTYPES = {dtype: name for name, dtype in hf.KINDS.items()}
SHOWN = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
STATED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # in config.json
# What sentence-transformers puts behind an encoder, as far as it changes what comes out.
SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")
Told = dict[str, str]  # what is kept of a source beside its digest
FRONT_MATTER = re.compile(r"---\n(.*?)\n---", re.DOTALL)


def import_model(job: Job) -> Artifact:
    """Publishes `import`: what `[model] from` names.

    Raises:
        DataError: an architecture or a switch that llmctl does not build, code that the model wants run, tensors that
            do not fit the config (each by name), a tokenizer that does not fit the embedding, damage.
        UnavailableError, RunError: of a hub, see hub.py.
    """
    section, started = job.recipe.section("model"), time.monotonic()
    found = origin.find(section.source, job.recipe.root)
    console.stage("import", shown(found))
    with job.publishing() as staging:
        if found.kind == "gguf":
            pieces, told = from_gguf(found.path, staging.path)
        else:
            pieces, told = from_folder(found, staging.path, convert_pickle=section.convert_pickle)
        config, tensors = hf.read_config(staging.path), storage.headers(hf.tensor_files(staging.path))
        hf.check(hf.build(config), Path(found.spec), {name: stored.shape for name, stored in tensors.items()})
        template = ChatTemplate.load(staging.path)
        artifact = staging.seal(
            {"parameters": config.parameters, "bytes": sum(stored.end - stored.start for stored in tensors.values())},
            told={section.source: told},
        )
    weights = f"{config.family}, {console.count(config.parameters)} parameters in {dtypes(tensors)}"
    line = [
        weights + (f" of {told['quantised']}" if "quantised" in told else ""),
        f"{pieces:,} pieces",
        ("chat template" if template else "no chat template") if config.kind == "decoder" else config.task,
        told.get("licence", "a licence file" if any(artifact.path.glob("LICEN[CS]E*")) else "no licence named"),
    ]
    console.detail(" · ".join(line), console.duration(time.monotonic() - started))
    return artifact


def shown(found: Origin) -> str:
    """What is brought in, as people call it."""
    if found.kind == "hub":
        return f"{found.repository} at {found.revision[:8]}"
    return str(found.path.relative_to(Path.cwd()) if found.path.is_relative_to(Path.cwd()) else found.path)


def dtypes(tensors: Mapping[str, storage.Stored]) -> str:
    """How the weights are stored: `bf16`, or `fp16 and fp32`; the one of most bytes first."""
    sizes: Counter[str] = Counter()
    for stored in tensors.values():
        sizes[stored.dtype] += stored.end - stored.start
    return " and ".join(SHOWN[dtype] for dtype, _ in sizes.most_common() if dtype in SHOWN)


# ------------------------------------------------------------------------------------------------ a Hugging Face folder


def from_folder(found: Origin, staging: Path, *, convert_pickle: bool = False) -> tuple[int, Told]:
    """Brings a folder in: its own, or the one that a hub's repository was fetched into.

    Returns:
        The pieces of its vocabulary, and what is told of it: `licence`, of a repository also `repository` and
        `commit`, of an artifact `identity`.
    """
    folder, told = found.path, {}
    if found.kind == "hub":
        folder = hub.small(found.repository, found.revision)
        told = {"repository": found.repository, "commit": found.revision}
    elif (folder / MANIFEST).is_file():
        artifact = Artifact.open(folder)
        artifact.verify()
        told = {"identity": artifact.identity, "licence": artifact.licence()}
    check_folder(folder)
    small, tokenizer = origin.files(folder), Tokenizer.load(folder)
    if found.kind == "hub":
        hub.weights(found.repository, found.revision, pickled=convert_pickle)
        if not convert_pickle and not origin.has_safetensors(folder):
            hint = "its weights may be pickled (.bin): --convert-pickle reads the tensors alone; nothing in them is run"
            raise DataError(f"{found.spec} has no model.safetensors", hint=hint)
    config = hf.read_config(folder)
    hf.check_vocabulary(config, len(tokenizer), folder, tokenizer.special_ids)
    for path in small:
        target = staging / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if not (staging / "tokenizer.json").is_file():  # made of its older files
        tokenizer.save(staging)
    if origin.has_safetensors(folder):
        copy_weights(folder, staging, config)
    else:
        convert_weights(folder, staging, config, allowed=convert_pickle)
    told.setdefault("licence", licence_of(folder))
    return len(tokenizer), {key: value for key, value in told.items() if value}


def check_folder(folder: Path) -> None:
    """Whether llmctl can be what the folder asks for, as far as names tell.

    Raises:
        DataError: it wants code of its own to be run, or names an architecture that llmctl does not build.
    """
    for name in ("config.json", "tokenizer_config.json"):
        stated = read_json(folder / name) if (folder / name).is_file() else {}
        if stated.get("auto_map"):
            wanted = stated["auto_map"]
            key, code = next(iter(wanted.items())) if isinstance(wanted, dict) else ("", wanted)
            raise DataError(
                f"auto_map{f'.{key}' if key else ''} asks for code of the model's own ({code})",
                file=folder / name,
                hint="llmctl never runs it; look for the same model under an architecture that transformers has itself",
            )
    if not (folder / "config.json").is_file():
        raise DataError("holds no config.json, so it is no model's folder", file=folder)
    config_from_json(read_json(folder / "config.json"), folder / "config.json")
    if (folder / "modules.json").is_file():
        check_modules(folder / "modules.json")


def check_modules(path: Path) -> None:
    """Raises DataError where sentence-transformers would put what llmctl does not build behind the encoder."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise DataError(f"is not JSON ({reason})", file=path) from None
    for module in modules if isinstance(modules, list) else [modules]:
        kind = str(module.get("type") if isinstance(module, dict) else module)
        if kind not in {f"sentence_transformers.models.{name}" for name in SENTENCE_MODULES}:
            built = ", ".join(SENTENCE_MODULES)
            raise DataError(
                f"asks for the module {kind}, which llmctl does not build", file=path, hint=f"it builds {built}"
            )


def copy_weights(folder: Path, staging: Path, config: Config) -> None:
    """The safetensors files as they are; without the copies of tied weights, which are stored once."""
    files = [origin.inside(folder, path) for path in hf.tensor_files(folder)]
    tensors = storage.headers(files)
    expected = hf.check(hf.build(config), folder, {name: stored.shape for name, stored in tensors.items()})
    copies = {name for name in hf.aside(config, tensors, expected) if is_copy(name, tensors)}
    if copies:
        kept = {name: stored for name, stored in tensors.items() if name not in copies}
        layout = {name: (stored.dtype, stored.shape) for name, stored in kept.items()}
        storage.write(staging, layout, reported(((name, stored.chunks()) for name, stored in kept.items()), layout))
        return
    index = folder / origin.INDEX
    if files != [folder / origin.WEIGHTS]:
        shutil.copyfile(check_index(origin.inside(folder, index), tensors), staging / origin.INDEX)
    total, done = sum(path.stat().st_size for path in files), 0
    with console.progress("import", total=total, unit="bytes") as live:
        for path in files:
            with path.open("rb") as read, (staging / path.name).open("wb") as write:
                while raw := read.read(storage.BUFFER):
                    done += write.write(raw)
                    live.update(done, f"{console.size(done)} of {console.size(total)}")


def check_index(index: Path, tensors: Mapping[str, storage.Stored]) -> Path:
    """The index, if it says of every tensor where it lies: other readers believe it."""
    stated = read_json(index)["weight_map"]
    wrong = next((name for name, stored in tensors.items() if stated.get(name) != stored.path.name), None)
    wrong = wrong or next((name for name in stated if name not in tensors), None)
    if wrong is not None:
        lies = tensors[wrong].path.name if wrong in tensors else "nowhere"
        raise DataError(f"says that {wrong} is in {stated.get(wrong)}, but it is in {lies}", file=index)
    return index


def is_copy(name: str, tensors: Mapping[str, storage.Stored]) -> bool:
    """Whether a tensor that is no weight of its own has the bytes of another: a tied weight's second copy."""
    one = tensors[name]
    return any(
        (one.dtype, one.shape) == (other.dtype, other.shape)
        and all(a == b for a, b in zip(one.chunks(), other.chunks(), strict=True))
        for original, other in tensors.items()
        if original != name and len(one.shape) == 2
    )


def licence_of(folder: Path) -> str:
    """The licence that the model card's front matter names; empty where it names none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace")[: 1 << 16] if card.is_file() else ""
    if (front := FRONT_MATTER.match(text.replace("\r\n", "\n"))) is not None:
        for key in ("license_name", "license"):  # the first stands beside `license: other`
            if named := re.search(rf"^{key}: *[\"']?([\w.+-]+)", front[1], re.MULTILINE):
                return named[1]
    return ""


# --------------------------------------------------------------------------------------------------- pickles and GGUF


def convert_weights(folder: Path, staging: Path, config: Config, *, allowed: bool) -> None:
    """Pickled weights as safetensors, where that was asked for."""
    files = [origin.inside(folder, path) for path in pickled.files(folder)]
    if not files:
        hf.tensor_files(folder)  # raises that there are no weights at all
    if not allowed:
        raise DataError(
            f"its weights are pickled ({files[0].name}), and there is no model.safetensors",
            file=folder,
            hint="--convert-pickle reads the tensors alone and keeps them as safetensors; nothing in the file is run",
        )
    state: dict[str, Tensor] = {}
    for path in files:
        found = pickled.read(path)
        if twice := state.keys() & found.keys():
            raise DataError(f"tensor {min(twice)} is also in another file", file=path)
        state |= found
    ignored = hf.aside(config, state, hf.layout(hf.build(config)))
    copies = {name for name in ignored if any(other != name and same(state[name], state[other]) for other in state)}
    kept = {name: tensor for name, tensor in state.items() if name not in copies}
    layout = {name: (_dtype(name, tensor, folder), tuple(tensor.shape)) for name, tensor in kept.items()}
    storage.write(
        staging, layout, reported(((name, hf.chunks(tensor.detach())) for name, tensor in kept.items()), layout)
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether a matrix is another one's copy."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape) and one.dim() == 2
    return alike and torch.equal(one, other)


def from_gguf(path: Path, staging: Path) -> tuple[int, Told]:
    """Brings a GGUF file in: F32, F16 and BF16 as they are, what is quantised as fp32, which alone holds it exactly.

    Returns:
        The pieces of its vocabulary, and what is told of it: `licence`, and how most of it was `quantised`.
    """
    model = gguf.read(path)
    layout = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in model.layout().items()}
    config, files = config_from_json(model.config, path), model.tokenizer_files()
    hf.check(hf.build(config), path, {name: shape for name, (_, shape) in layout.items()})
    tokenizer = Tokenizer({name: content for name, content in files.items() if name.endswith(".json")}, path)
    hf.check_vocabulary(config, len(tokenizer), path, tokenizer.special_ids)
    sizes: Counter[str] = Counter()
    for dtype, shape in layout.values():
        sizes[dtype] += storage.size(dtype, shape)
    stated = STATED[sizes.most_common(1)[0][0]]
    write_json(staging / "config.json", {**model.config, "dtype": stated, "torch_dtype": stated})
    write_json(staging / "generation_config.json", model.generation_config)
    for name, content in files.items():
        (staging / name).write_bytes(content)
    tensors = ((name, hf.chunks(tensor)) for name, tensor in model.tensors())
    storage.write(staging, layout, reported(tensors, layout))
    types = Counter(stored.type for stored in model.file.tensors.values() if stored.type not in DTYPES.values())
    told = {"quantised": types.most_common(1)[0][0]} if types else {}
    return len(tokenizer), told | ({"licence": model.licence} if re.fullmatch(r"[\w.+-]+", model.licence) else {})


def reported(
    tensors: Iterable[tuple[str, Iterable[bytes | memoryview]]], layout: storage.Layout
) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
    """The same tensors, while a line says how far they are."""
    total = sum(storage.size(*stored) for stored in layout.values())
    with console.progress("import", total=total, unit="bytes") as live:
        done = 0
        for name, content in tensors:
            yield name, content
            done += storage.size(*layout[name])
            live.update(done, f"{console.size(done)} of {console.size(total)}")


def _dtype(name: str, tensor: Tensor, folder: Path) -> str:
    if tensor.dtype not in DTYPES:
        raise DataError(f"{name} is stored as {tensor.dtype}, which safetensors does not hold", file=folder)
    return DTYPES[tensor.dtype]
