"""Models of a hub (huggingface.co, or what HF_ENDPOINT names): the only module that opens a connection to another host.

The package huggingface_hub (`pip install 'llmctl[hub]'`) does the work, and with it come its variables: HF_ENDPOINT,
HF_TOKEN, HF_HOME for the cache, HF_HUB_OFFLINE. Of a repository only the files that a model needs are fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmctl import console
from llmctl.errors import DataError, LlmctlError, RunError, UnavailableError
from llmctl.model.origin import COMMIT, CONFIGS, HUB, INDEX, PICKLED, PICKLED_INDEX, SMALL, WEIGHTS


def commit(repository: str, revision: str) -> str:
    """The commit that a branch or a tag stands for now; offline, when it was last looked at.

    Raises:
        UnavailableError: huggingface_hub is not installed, or offline with nothing in the cache.
        DataError: no such repository or revision, or one that asks for a token.
        RunError: the hub can't be reached.
    """
    if COMMIT.fullmatch(revision):
        return revision
    library = _library()
    with _explained(repository, revision):
        return _fetch(library, repository, revision, CONFIGS).name  # a snapshot's folder is called by its commit


def small(repository: str, revision: str) -> Path:
    """The folder in the cache with a commit's config, tokenizer, licence and model card; no weights yet.

    Raises:
        As `commit`.
    """
    library = _library()
    with _explained(repository, revision):
        return _fetch(library, repository, revision, [*SMALL, "README.md", INDEX])


def weights(repository: str, revision: str, *, pickled: bool = False) -> Path:
    """The same folder with the weights; what is there is not fetched again.

    Args:
        revision: a commit.
        pickled: fetch pytorch_model.bin where there is no safetensors.

    Raises:
        As `commit`.
    """
    library = _library()
    with _explained(repository, revision):
        for single, index in ((WEIGHTS, INDEX), *(((PICKLED, PICKLED_INDEX),) if pickled else ())):
            folder = _fetch(library, repository, revision, [single, index])
            if (folder / index).is_file() and not (folder / single).is_file():
                _fetch(library, repository, revision, _shards(folder / index))
            if (folder / index).is_file() or (folder / single).is_file():
                break
        return folder


def _shards(index: Path) -> list[str]:
    """The files that an index names; what it names wrongly is found when they are opened."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted({name for name in found if isinstance(name, str) and Path(name).name == name and "*" not in name})


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as reason:
        raise UnavailableError(
            f"models of a hub need the package huggingface_hub ({reason})", hint="pip install 'llmctl[hub]'"
        ) from None
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def _fetch(library: Any, repository: str, revision: str, names: Sequence[str]) -> Path:
    with console.progress("import", unit="bytes") as live:
        bar = _bar(live)
        return Path(
            library.snapshot_download(
                repository, revision=revision, allow_patterns=list(names), tqdm_class=bar, max_workers=4
            )
        )


def _bar(live: console.Progress) -> type:
    """What huggingface_hub reports its progress to, instead of a bar of its own."""
    from tqdm import tqdm

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self.of_bytes, self.done = options.get("unit") == "B", float(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            self.done += n or 0
            if self.of_bytes:
                live.update(self.done, f"{console.size(self.done)} fetched")

    return Told


@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """What the library raises, as our own errors. Below its own kinds lie those of whichever HTTP client it uses."""
    name, where = f"{HUB}{repository}@{revision}", os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    errors = _library().errors
    try:
        yield
    except LlmctlError:
        raise
    except errors.GatedRepoError as reason:
        hint = "accept its terms on its page, and set HF_TOKEN to a token of your account"
        raise DataError(f"{name}: its owner gives it to those who ask ({_first(reason)})", hint=hint) from reason
    except errors.RepositoryNotFoundError as reason:
        hint = "check the name; a private one needs HF_TOKEN"
        raise DataError(f"{name}: no such repository at {where}", hint=hint) from reason
    except errors.RevisionNotFoundError as reason:
        raise DataError(f"{name}: the repository has no such revision", hint="name a branch, tag or commit") from reason
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as reason:
        if os.environ.get("HF_HUB_OFFLINE"):
            hint = "unset HF_HUB_OFFLINE, or import it once while online"
            raise UnavailableError(f"{name}: offline, and not in the cache", hint=hint) from reason
        raise RunError(f"{name}: {where} cannot be reached ({_first(reason)})", hint="try again later") from reason
    except errors.HFValidationError as reason:
        raise DataError(f"{name}: {_first(reason)}", hint=f"{HUB}org/name@revision") from reason
    except Exception as reason:
        if getattr(getattr(reason, "response", None), "status_code", 0) in (401, 403):
            hint = "set HF_TOKEN to a token of an account that may read it"
            raise DataError(f"{name}: {where} does not let you in ({_first(reason)})", hint=hint) from reason
        hint = "the same command again fetches what is missing"
        raise RunError(f"{name}: from {where}: {_first(reason)}", hint=hint) from reason


def _first(reason: Exception) -> str:
    return str(reason).strip().partition("\n")[0] or type(reason).__name__
