"""A sentence encoder behind HTTP: the real openai client against a server process, and every way to ask wrongly."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from llmctl import device
from llmctl.artifact import Artifact
from llmctl.errors import UsageError
from llmctl.inference.encode import Embedder
from llmctl.serve import limits
from llmctl.serve.chat import chat
from llmctl.serve.model import Model, load
from tests.inference.encoders import CONTEXT, TEXTS, write
from tests.serve.conftest import Running, running, until
from tests.serve.test_stage import serving

CPU = device.pick("cpu")
FIT = TEXTS[:-1]  # the last one does not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    write(made, "bert")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, CPU)


@pytest.fixture(scope="module")
def encoder(model: Model) -> Iterator[Running]:
    with running(model) as server:
        yield server


@pytest.fixture(scope="module")
def vectors(folder: Path) -> np.ndarray:
    return Embedder(folder, CPU).embed(FIT)[0]


def ask(server: Running, **body: Any) -> Any:
    response = server.post("/v1/embeddings", body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_process_and_the_openai_client(folder: Path, vectors: np.ndarray) -> None:
    with serving(folder, api_key="sk-key") as (process, url):
        client = OpenAI(base_url=url + "/v1", api_key="sk-key", max_retries=0, timeout=60)
        assert client.models.list().data[0].id == "tiny"
        for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            made = client.embeddings.create(model="tiny", input=FIT, **encoding)  # type: ignore[call-overload]
            found = [entry.embedding for entry in made.data]
            if encoding == {"encoding_format": "base64"}:  # asked for by name, the client leaves it as it came
                found = [np.frombuffer(base64.b64decode(text), "<f4") for text in found]
            assert [entry.index for entry in made.data] == list(range(len(FIT)))
            np.testing.assert_allclose(found, vectors, atol=1e-6)
            assert made.usage.prompt_tokens == made.usage.total_tokens > 0
        with pytest.raises(openai.BadRequestError, match=r"sentence encoder.*v1/embeddings"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.BadRequestError, match=r"sentence encoder.*v1/embeddings"):
            client.completions.create(model="tiny", prompt="hi")
        with pytest.raises(openai.NotFoundError, match="'other' does not exist here"):
            client.embeddings.create(model="other", input="hi")
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=url + "/v1", api_key="wrong").embeddings.create(model="tiny", input="hi")
        process.terminate()
        assert process.wait(20) == 0


def test_every_form_of_input_gives_the_same(encoder: Running, vectors: np.ndarray) -> None:
    ids = encoder.post("/tokenize", {"prompt": FIT[0]}).json()["tokens"]
    for given in (FIT[0], [FIT[0]], ids, [ids]):
        answer = ask(encoder, input=given, model="tiny", user="someone")
        np.testing.assert_allclose(answer["data"][0]["embedding"], vectors[0], atol=1e-6)
        assert answer["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}
        assert (answer["object"], answer["model"], len(answer["data"])) == ("list", "tiny", 1)
        assert "truncated" not in answer


def test_dimensions_are_the_models_or_refused(encoder: Running) -> None:
    assert len(ask(encoder, input="a", dimensions=48)["data"][0]["embedding"]) == 48
    error = encoder.post("/v1/embeddings", {"input": "a", "dimensions": 8}).json()["error"]
    assert (error["param"], error["code"]) == ("dimensions", "unsupported_parameter")
    assert "48" in error["message"]


def test_a_text_that_does_not_fit_is_refused_or_cut_where_asked_for(encoder: Running, folder: Path) -> None:
    long = "a " * CONTEXT
    for given in (["a", long], [[5], [5] * (CONTEXT + 1)]):
        error = encoder.post("/v1/embeddings", {"input": given}).json()["error"]
        assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
        assert "`input` 1 (" in error["message"]
        assert f"{CONTEXT} tokens" in error["message"]
        assert "truncate_prompt_tokens" in error["message"]
    whole = ask(encoder, input=["a", long], truncate_prompt_tokens=-1)
    assert whole["truncated"] == [1]
    assert whole["usage"]["total_tokens"] == 3 + CONTEXT
    expected, cut = Embedder(folder, CPU).embed(["a", long])
    np.testing.assert_allclose([entry["embedding"] for entry in whole["data"]], expected, atol=1e-6)
    assert cut == [1]
    for given in (["a", "a a a a"], [[5, 6, 7], [5] * 6]):
        short = ask(encoder, input=given, truncate_prompt_tokens=4)
        assert (short["truncated"], short["usage"]["total_tokens"]) == ([1], 7)
    assert encoder.post("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": CONTEXT + 1}).status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a", 7]}, "input"),
        ({"input": ["a", [5]]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [[5], [True]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [5.0]}, "input"),
        ({"input": ["a"] * (limits.MAX_INPUTS + 1)}, "input"),
        ({"input": [[5] * CONTEXT] * (limits.MAX_INPUT_TOKENS // CONTEXT + 1)}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_asked(body: dict[str, Any], param: str, encoder: Running) -> None:
    response = encoder.post("/v1/embeddings", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_bad_request_changes_nothing_for_its_neighbour(encoder: Running) -> None:
    body = {"input": FIT, "encoding_format": "base64"}
    golden = ask(encoder, **body)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, encoder, **body) for _ in range(4)]
        for bad in ([10**6], [], "a " * CONTEXT, ["a"] * 3000):
            assert encoder.post("/v1/embeddings", {"input": bad}).status_code == 400
        assert [answer.result() for answer in answers] == [golden] * 4


def test_many_texts_in_many_batches(encoder: Running, vectors: np.ndarray) -> None:
    answer = ask(encoder, input=FIT * 40)
    found = np.array([entry["embedding"] for entry in answer["data"]])
    np.testing.assert_allclose(found, np.tile(vectors, (40, 1)), atol=1e-6)


def test_a_client_that_leaves_ends_its_request_within_a_batch(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(model.folder, CPU)
    seen: list[int] = []
    goes_on = threading.Event()
    forward = embedder._forward
    monkeypatch.setattr(embedder, "_forward", lambda rows: (seen.append(1), goes_on.wait(20), forward(rows))[2])
    with running(Model("tiny", model.folder, embedder, model.tokenizer, None, CONTEXT)) as server:
        body = json.dumps({"input": [[5] * CONTEXT] * 100}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            assert until(lambda: len(seen) == 1)
        assert until(lambda: server.engine.stats().cancelled == 1)
        goes_on.set()
        assert server.settled()
        assert len(seen) == 1
        assert "llmctl_requests_cancelled_total 1" in httpx.get(server.url + "/metrics").text


def test_a_full_queue_says_when_to_come_again(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder, held = Embedder(model.folder, CPU), threading.Event()
    forward = embedder._forward
    monkeypatch.setattr(embedder, "_forward", lambda rows: (held.wait(20), forward(rows))[1])
    made = Model("tiny", model.folder, embedder, model.tokenizer, None, CONTEXT)
    with running(made, slots=1, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, server, input="a")
        assert until(lambda: server.engine.stats().active == 1)
        second = pool.submit(ask, server, input=["a"] * 100)
        assert until(lambda: server.engine.stats().waiting == 1)
        refused = server.post("/v1/embeddings", {"input": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        held.set()
        assert len(first.result()["data"]) + len(second.result()["data"]) == 101


def test_the_card_says_what_it_is(encoder: Running) -> None:
    (card,) = httpx.get(encoder.url + "/v1/models").json()["data"]
    assert (card["kind"], card["max_model_len"]) == ("embedding", CONTEXT)
    assert httpx.get(encoder.url + "/health").json() == {"status": "ok"}


def test_a_model_that_writes_gives_no_embeddings(server: Running) -> None:
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="'tiny-chat' is a chat model: it writes text"):
        client.embeddings.create(model="tiny-chat", input="hi")


def test_chat_in_the_terminal_says_what_the_model_is(folder: Path) -> None:
    with pytest.raises(UsageError, match=f"{folder} is a sentence encoder") as problem:
        chat(Artifact(folder, {}), CPU, prompt="hi")
    assert "/v1/embeddings" in problem.value.hint


def test_max_model_len_may_go_to_what_the_model_has_positions_for(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.*"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert load(tmp_path, CPU).max_length == 20
    assert load(tmp_path, CPU, max_model_len=CONTEXT).max_length == CONTEXT
    with pytest.raises(UsageError, match=f"{CONTEXT + 1}.*{CONTEXT}"):
        load(tmp_path, CPU, max_model_len=CONTEXT + 1)
