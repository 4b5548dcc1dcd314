"""Updates in the plan's code, and the residual that a sparse code leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broker.errors import ConfigError
from broker.messages import Array, ModelSpec, ParametersHead, Plan, TensorSpec, whole
from worker_client.compression import MOST_VERSIONS, Compressor
from worker_client.training import Trained

MODEL = ModelSpec((TensorSpec("w", (40, 50), "float32"), TensorSpec("b", (3,), "float32")))


def head(version: int = 0, codec: str = "topk:0.1") -> ParametersHead:
    return ParametersHead(run="r", epoch=1, version=version, plan=Plan(codec=codec), digest="0" * 64)


def trained(seed: int = 0) -> Trained:
    random = np.random.default_rng(seed)
    tensors = {t.name: random.normal(size=t.shape).astype(np.float32) for t in MODEL.tensors}
    return Trained(tensors=tensors, examples=1, metrics={}, seconds=0.0)


def sent(result: Trained) -> Array:
    assert result.encoded is not None
    return whole(result.encoded["w"])


def test_without_a_codec_an_update_stays_as_it_is() -> None:
    update = trained()
    assert Compressor(None, "w i", MODEL)(update, head(codec=""), 0) is update


def test_large_parameters_are_encoded_and_small_ones_travel_as_they_are() -> None:
    update = trained()
    result = Compressor(None, "w i", MODEL)(update, head(codec="int8"), 0)
    assert (result.codec, result.tensors) == ("int8", {})
    assert result.encoded is not None
    assert result.encoded["b"] is update.tensors["b"]
    assert np.abs(sent(result) - update.tensors["w"]).max() < 0.05


def test_two_updates_draw_from_different_seeds() -> None:
    compress = Compressor(None, "w i", MODEL)
    seeds = {compress(trained(), head(version, "eden:1"), ordinal).seed for version in (0, 1) for ordinal in (0, 1)}
    assert len(seeds) == 4


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_left_out_comes_with_later_updates(tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path if on_disk else None
    compress, total, given = Compressor(folder, "w i", MODEL), np.zeros((40, 50)), np.zeros((40, 50))
    for number in range(60):
        if on_disk and number == 30:
            compress = Compressor(folder, "w another", MODEL)
        update = trained(number)
        total += update.tensors["w"]
        given += sent(compress(update, head(number), 0))
    # What is missing is one residual, which does not grow with the number of updates.
    assert np.linalg.norm(total - given) < np.linalg.norm(total)


def test_given_and_residual_are_what_was_trained() -> None:
    compress, update = Compressor(None, "w i", MODEL), trained()
    first = sent(compress(update, head(0), 0))
    second = sent(compress(replace(update, tensors={n: a * 0 for n, a in update.tensors.items()}), head(1), 0))
    # The second update is nothing but the largest of what the first left out.
    assert np.count_nonzero(first) == np.count_nonzero(second) == 200
    assert not np.any((first != 0) & (second != 0))
    np.testing.assert_allclose(second[second != 0], update.tensors["w"][second != 0], rtol=0.02)


def test_a_residual_that_is_too_stale_is_dropped() -> None:
    nothing = replace(trained(), tensors={n: a * 0 for n, a in trained().tensors.items()})
    for version, is_kept in ((MOST_VERSIONS, True), (MOST_VERSIONS + 1, False)):
        compress = Compressor(None, "w i", MODEL)
        compress(trained(), head(0), 0)
        assert np.any(sent(compress(nothing, head(version), 0))) == is_kept


def test_a_damaged_residual_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Compressor(tmp_path, "w i", MODEL)(trained(), head(), 0)
    (tmp_path / "residual.safetensors").write_bytes(b"damaged")
    Compressor(tmp_path, "w i", MODEL)(trained(), head(1), 0)
    assert "cannot be read" in caplog.text


def test_what_is_not_finite_is_sent_as_it_is() -> None:
    update = trained()
    update.tensors["w"][3, 3] = np.nan
    assert Compressor(None, "w i", MODEL)(update, head(codec="int8"), 0) is update


def test_an_unknown_codec_says_what_is_known() -> None:
    with pytest.raises(ConfigError, match="int8"):
        Compressor(None, "w i", MODEL)(trained(), head(codec="magic"), 0)
