"""The error tree: every error has a code for scripts, an exit code for shells, and words for people."""

from __future__ import annotations

import signal

import pytest

from llmctl import errors
from llmctl.errors import DataError, Interrupted, LlmctlError, RecipeError

EXITS = {
    "UsageError": 2,
    "RecipeError": 2,
    "DataError": 3,
    "RunError": 4,
    "GateError": 5,
    "UnavailableError": 6,
    "BusyError": 75,
    "TimeUp": 75,
}


@pytest.mark.parametrize(("name", "code"), EXITS.items())
def test_exit_codes_are_those_of_the_design(name: str, code: int) -> None:
    problem = getattr(errors, name)("what")
    assert isinstance(problem, LlmctlError)
    assert problem.exit_code == code


def test_every_error_has_its_own_word_for_scripts() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LlmctlError)]
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert {kind.__name__ for kind in kinds} == {*EXITS, "LlmctlError", "Interrupted"}


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_exits_as_shells_expect(signum: signal.Signals, code: int) -> None:
    assert Interrupted("stopped", signum=signum).exit_code == code


def test_says_where_before_what() -> None:
    assert str(DataError("bad", file="a.txt", line=3)) == "a.txt:3: bad"
    assert str(DataError("bad", file="a.txt")) == "a.txt: bad"
    assert str(RecipeError("bad", hint="mend it")) == "bad"
