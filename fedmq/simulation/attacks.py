"""What a bad worker sends, and how it spoils its labels: pure functions, for the simulator and the benchmarks.

The attackers are the strongest that the literature has: they know what all honest workers send, and they agree on
what they do. Each formula is for one attacker; several of them call it with the same ``honest`` rows.

=================== ========================================================= ========================================
name                what is sent, with honest mean m and deviation s          source
=================== ========================================================= ========================================
``none``            its own update                                            the baseline
``sign-flip``       minus its own update; knows nothing of others             Li et al. 2019 (RSA), arXiv 1811.03761
``scaled-flip:A``   -A m (10 if not given)                                    Blanchard et al. 2017, arXiv 1703.02757
``gaussian:S``      its own update plus noise of S deviations (30) for        Blanchard et al. 2017
                    each element
``zero``            zeros: a free rider
``ipm:E``           -E m (0.1): inner-product manipulation                    Xie et al. 2019, arXiv 1903.03936
``alie``,           m - z s; z as in the paper from the number of workers,    Baruch et al. 2019, arXiv 1902.06156
``alie:Z``          or Z
``mimic:I``         what honest worker I (0) sends                            Karimireddy et al. 2022, arXiv 2006.09365
``label-flip``      its own update, trained on labels c - 1 - y               Karimireddy et al. 2022
=================== ========================================================= ========================================

``ipm`` and ``scaled-flip`` are one formula: a small factor hides among the honest, a large one does harm at once.
Where the paper picks whom to mimic by the honest updates' principal direction, here it is a number; the harm, that
one worker's data counts several times, is the same. ``alie`` without Z is no attack at all where the majority needs
no help (z = 0, as for 2 of 10); give Z there, 1.5 is usual.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import ConfigError

__all__ = ["ATTACKS", "Scene", "alie_deviations", "attack_of", "bad_workers", "flip_labels", "flips_labels"]

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Scene:
    """What an attacker knows."""

    own: Array
    """What it would send if it were honest, of shape (d,)."""
    honest: Array
    """What the honest workers send, of shape (h, d), always in the same order of workers; h of at least 1."""
    bad: int
    """Attackers beside those h, this one included."""
    generator: np.random.Generator
    """Its own source of randomness."""


Attack = Callable[[Scene], Array]


def _none(scene: Scene) -> Array:
    return scene.own


def _sign_flip(scene: Scene) -> Array:
    return np.negative(scene.own)


def _against_mean(scene: Scene, *, factor: float) -> Array:
    return (-factor * _mean(scene)).astype(scene.own.dtype)


def _gaussian(scene: Scene, *, deviation: float) -> Array:
    noise = scene.generator.standard_normal(scene.own.shape)
    return (scene.own + deviation * noise).astype(scene.own.dtype)


def _zero(scene: Scene) -> Array:
    return np.zeros_like(scene.own)


def _alie(scene: Scene, *, deviations: float | None) -> Array:
    z = alie_deviations(len(scene.honest), scene.bad) if deviations is None else deviations
    spread: Array = scene.honest.std(axis=0, dtype=np.float64)
    return (_mean(scene) - z * spread).astype(scene.own.dtype)


def _mimic(scene: Scene, *, whom: float) -> Array:
    return np.array(scene.honest[int(whom) % len(scene.honest)], scene.own.dtype)


def _mean(scene: Scene) -> Array:
    mean: Array = scene.honest.mean(axis=0, dtype=np.float64)
    return mean


def alie_deviations(honest: int, bad: int) -> float:
    """The z of ALIE's equation 2: so far from the mean that enough honest workers are further away.

    With n workers of which m are bad, s = floor(n/2 + 1) - m honest ones must be won over, and z is the quantile
    of (n - m - s) / (n - m) of the normal distribution; 0 where no quantile above one half is left.

    Args:
        honest: n - m, at least 1.
        bad: m.
    """
    workers = honest + bad
    needed = workers // 2 + 1 - bad
    share = (honest - needed) / honest
    return NormalDist().inv_cdf(min(share, 1 - 1e-9)) if share > 0.5 else 0.0


def flip_labels(labels: Array, classes: int) -> Array:
    """Labels ``classes - 1 - y``, of the same shape and dtype: 9 - y for ten digits."""
    return (classes - 1 - labels).astype(labels.dtype)


def _plain(attack: Attack) -> Callable[[str], Attack]:
    def make(argument: str) -> Attack:
        if argument:
            raise ValueError("it takes no number")
        return attack

    return make


def _with_number(attack: Callable[..., Array], name: str, default: float | None) -> Callable[[str], Attack]:
    def make(argument: str) -> Attack:
        value = float(argument) if argument else default
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError("its number is finite and not below 0")
        return partial(attack, **{name: value})

    return make


#: Name, and what makes the attack from the text after the colon, which may be empty.
ATTACKS: Mapping[str, Callable[[str], Attack]] = {
    "alie": _with_number(_alie, "deviations", None),
    "gaussian": _with_number(_gaussian, "deviation", 30.0),
    "ipm": _with_number(_against_mean, "factor", 0.1),
    "label-flip": _plain(_none),
    "mimic": _with_number(_mimic, "whom", 0.0),
    "none": _plain(_none),
    "scaled-flip": _with_number(_against_mean, "factor", 10.0),
    "sign-flip": _plain(_sign_flip),
    "zero": _plain(_zero),
}


def attack_of(text: str) -> Attack:
    """The attack that ``text`` names, like ``sign-flip``, ``ipm:1.5`` or ``alie``.

    The result has the shape and dtype of ``Scene.own``. ``label-flip`` acts on the data (:func:`flips_labels`): what
    is trained on them is sent as it is.

    Raises:
        ConfigError: there is none; says which there are.
    """
    name, colon, argument = text.partition(":")
    if name not in ATTACKS or (colon and not argument):
        near = difflib.get_close_matches(name, ATTACKS, 1)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(ATTACKS)}"
        raise ConfigError(f"no attack is called {text!r}; {known}")
    try:
        return ATTACKS[name](argument)
    except ValueError as error:
        raise ConfigError(f"attack {text!r}: {error}") from None


def bad_workers(share: float, count: int) -> range:
    """The numbers of the bad ones, the highest, among ``count`` workers of which ``share``, rounded down, are bad."""
    return range(count - int(share * count + 1e-9), count)  # 0.29 of 100 are 29, and not 28.999999999999996


def flips_labels(text: str) -> bool:
    """Whether the attack that ``text`` names acts on its labels (:func:`flip_labels`)."""
    return text == "label-flip"
