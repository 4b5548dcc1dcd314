"""``fedmq compress`` as a user meets it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedmq.compress import DEFAULTS
from tests.support.commands import ROOT, Done, assert_one_message, fedmq
from tests.support.vectors import vector

#: The first two are for codecs.
TENSORS = {
    "embedding": vector("normal", 30_000, seed=1).reshape(100, 300),
    "half": vector("normal", 2048, seed=2).astype(ml_dtypes.bfloat16),
    "bias": vector("normal", 100, seed=3),
    "ids": np.arange(5000),
}
CHOSEN_BYTES = 4 * 30_000 + 2 * 2048


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    return file


def compress(*arguments: object) -> Done:
    return fedmq(ROOT, "compress", *map(str, arguments), url=None)


def rows(done: Done) -> dict[str, dict[str, Any]]:
    assert done.code == 0, done.err
    return {row["codec"]: row for row in json.loads(done.out)["codecs"]}


def test_every_codec_is_a_row_in_bytes_and_error(model: Path) -> None:
    done = compress(model, "--json")

    found = json.loads(done.out)
    assert {key: found[key] for key in ("tensors", "chosen", "values", "bytes")} == {
        "tensors": 4,
        "chosen": 2,
        "values": 32_048,
        "bytes": CHOSEN_BYTES,
    }
    by_codec = rows(done)
    assert tuple(by_codec) == DEFAULTS
    assert by_codec["bf16"]["bytes"] == 2 * 32_048
    assert by_codec["bf16"]["ratio"] == CHOSEN_BYTES / (2 * 32_048)
    assert by_codec["bf16"]["vnmse"] < 1e-5
    assert by_codec["eden:4"]["vnmse"] == pytest.approx(0.0096, rel=0.1)
    assert by_codec["eden:1"]["cosine"] == pytest.approx((2 / np.pi) ** 0.5, rel=0.02)
    assert by_codec["topk:0.01"]["bytes_per_value"] < 0.05
    errors = [by_codec[name]["vnmse"] for name in ("fp16", "bf16", "int8", "eden:4", "eden:3", "eden:2", "topk:0.1")]
    assert errors == sorted(errors)
    assert all({"encode_gb_s", "decode_gb_s"} <= row.keys() for row in by_codec.values())


def test_the_table_has_the_codecs_that_were_asked_for(model: Path) -> None:
    done = compress(model, "--codec", "eden:2", "--codec", "int8", "--codec", "eden:2")

    assert done.code == 0, done.err
    first, head, *lines = done.out.splitlines()
    assert first == "2 of 4 tensors, 32,048 values, 124,096 bytes; the others travel as they are"
    assert head.split()[:4] == ["codec", "bytes", "a", "value"]
    assert [line.split()[0] for line in lines] == ["eden:2", "int8"]


def test_a_model_of_zeros_has_no_error_and_no_cosine(tmp_path: Path) -> None:
    save_file({"w": np.zeros((64, 64), np.float32)}, tmp_path / "zeros.safetensors")

    (row,) = rows(compress(tmp_path / "zeros.safetensors", "--codec", "int8", "--json")).values()

    assert row["vnmse"] is None
    assert row["cosine"] is None
    assert compress(tmp_path / "zeros.safetensors", "--codec", "int8").code == 0


def test_a_codec_that_is_unknown_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    done = compress(tmp_path / "absent", "--codec", "zip")

    assert_one_message(done, 2, "eden:1 to eden:4")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = compress(tmp_path / "absent.safetensors")

    assert_one_message(done, 2, "absent.safetensors")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"a model, of sorts",
        struct.pack("<Q", 2**40) + b"{}",
        # Whole, but for its last tensor.
        struct.pack("<Q", 60) + b'{"w":{"dtype":"F32","shape":[4096],"data_offsets":[0,16384]}'.ljust(60) + bytes(100),
    ],
    ids=["empty", "text", "endless header", "truncated"],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "file").write_bytes(body)

    done = compress(tmp_path / "file")

    assert_one_message(done, 2, "no safetensors file")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    done = compress(tmp_path)

    assert_one_message(done, 2)


def test_a_model_without_large_tensors_is_told_so(tmp_path: Path) -> None:
    save_file({"b": np.ones(10, np.float32), "n": np.arange(4096)}, tmp_path / "small.safetensors")

    done = compress(tmp_path / "small.safetensors")

    assert_one_message(done, 2, "at least 1024 values, and none of its 2 is one")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_tensor_that_is_not_finite_in_float32_is_named(tmp_path: Path, value: float) -> None:
    save_file({"w": np.full(2000, value)}, tmp_path / "broken.safetensors")

    done = compress(tmp_path / "broken.safetensors")

    assert_one_message(done, 2, "'w'")
