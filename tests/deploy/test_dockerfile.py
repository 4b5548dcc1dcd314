"""The Dockerfile makes two images, small and large, both without root."""

from __future__ import annotations

import re

import pytest

from tests.deploy import compose

ROOT = compose.ROOT
IMAGES = ("aggregator", "worker")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_fedmq_as_nobody_in_particular(image: str) -> None:
    instructions = compose.lineage(image)
    users = [rest for instruction, rest in instructions if instruction == "USER"]
    owner = re.search(r"--uid (\d+)", " ".join(rest for _, rest in instructions))

    assert owner is not None
    assert users[-1] == f"{owner[1]}:{owner[1]}"
    assert int(owner[1]) > 999
    assert ("ENTRYPOINT", '["fedmq"]') in instructions


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_based_on_a_slim_python_and_says_what_it_is(image: str) -> None:
    instructions = compose.lineage(image)

    assert instructions[0] == ("FROM", "python:${PYTHON}-slim")
    labels = " ".join(rest for instruction, rest in instructions if instruction == "LABEL")
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_python_has_a_version() -> None:
    assert ("ARG", "PYTHON=3.12") in compose.stages()[""]


def test_torch_is_in_the_worker_only() -> None:
    def copied(image: str) -> list[str]:
        return [source for _, rest in compose.lineage(image) for source in re.findall(r"--from=(\S+)", rest)]

    def runs(stage: str) -> str:
        return " ".join(rest for instruction, rest in compose.lineage(stage) if instruction == "RUN")

    assert copied("aggregator") == ["aggregator-venv"]
    assert copied("worker") == ["worker-venv"]
    assert "torch" not in runs("aggregator-venv")
    assert '--index-url "$TORCH_INDEX" torch' in runs("worker-venv")
    assert "whl/cpu" in " ".join(rest for _, rest in compose.stages()["worker-venv"])


def test_only_torch_itself_is_taken_from_its_index_which_may_lack_pinned_releases() -> None:
    places = {"Dockerfile": '--index-url "$TORCH_INDEX" torch', "Makefile": "--index-url '$(TORCH_INDEX)' torch"}
    for place, words in places.items():
        (line,) = [line for line in (ROOT / place).read_text().splitlines() if words in line]
        assert "--no-deps" in line


def test_everything_that_is_copied_exists_and_is_let_in_and_nothing_else() -> None:
    sources = set()
    for instructions in compose.stages().values():
        for instruction, rest in instructions:
            if instruction == "COPY" and "--from" not in rest:
                sources |= set(rest.split()[:-1])
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}

    assert "*" in lines
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_nothing_is_fetched_by_address_and_no_secret_is_in_a_layer() -> None:
    for instructions in compose.stages().values():
        for instruction, rest in instructions:
            assert instruction != "ADD"
            if instruction in {"ARG", "ENV", "COPY"}:
                assert not re.search(r"(?i)password|secret|token|_key|amqp", rest)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    # All is kept out, but for what is named: secrets/, runs/ and .git/ are not.
    assert lines[0 if lines[0] == "*" else 1] == "*"
    assert not {"!secrets", "!runs", "!.git", "!deploy"} & set(lines)
