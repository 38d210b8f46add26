"""PIM against the paper's numbers, a float64 loop and what is known of its optimum."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from merging.node import Node
from search.objectives.pim import EPSILON, information
from search.objectives.prior import Prior, binned, mixture, prior_of

#: Betas of the scores of ASAP's eight prompts, as the authors' code states them.
ASAP = (
    (5.955649, 3.382022),
    (6.299643, 6.705283),
    (2.946433, 2.048692),
    (1.788883, 1.907319),
    (3.143006, 2.238585),
    (3.320065, 1.880322),
    (5.617391, 4.916857),
    (14.596006, 9.161141),
)


def test_the_eight_sources_of_asap_make_the_published_mixture() -> None:
    assert mixture(ASAP) == pytest.approx((3.6022, 2.7090), abs=1e-4)
    shares = [0.0122, 0.1006, 0.2389, 0.3195, 0.2557, 0.0731]
    assert binned(mixture(ASAP), 6) == pytest.approx(shares, abs=5.1e-5)


def test_so_do_the_seven_without_the_first_prompt() -> None:
    assert mixture(ASAP[1:]) == pytest.approx((3.4596, 2.7052), abs=1e-4)
    shares = [0.0021, 0.0177, 0.0499, 0.0914, 0.1325, 0.1630, 0.1744, 0.1614, 0.1238, 0.0685, 0.0154]
    assert binned(mixture(ASAP[1:]), 11) == pytest.approx(shares, abs=5.1e-5)


def test_a_mixture_has_the_moments_of_its_parts() -> None:
    rng = np.random.default_rng(0)
    parts = [(2.0, 5.0), (6.0, 1.5), (1.0, 1.0)]
    drawn = np.concatenate([rng.beta(*part, 400_000) for part in parts])
    alpha, beta = mixture(parts)
    assert alpha / (alpha + beta) == pytest.approx(drawn.mean(), abs=1e-3)
    assert alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1)) == pytest.approx(drawn.var(), abs=1e-3)
    assert mixture([(2.0, 5.0)]) == pytest.approx((2.0, 5.0))
    assert binned((1.0, 1.0), 4) == pytest.approx([0.25] * 4)


def test_information_equals_a_float64_loop() -> None:
    rng = np.random.default_rng(1)
    p, prior = rng.dirichlet(np.ones(5), 9), rng.dirichlet(np.ones(5))
    entropy = 0.0
    for row in p:
        for share in row:
            entropy -= share * math.log(share + 1e-8) / len(p)
    divergence = 0.0
    for k in range(5):
        mean = sum(row[k] for row in p) / len(p)
        divergence += (prior[k] + 1e-8) * math.log((prior[k] + 1e-8) / (mean + 1e-8))
    found = float(information(torch.tensor(p), torch.tensor(prior)))
    assert found == pytest.approx(-entropy - divergence, rel=1e-12) and EPSILON == 1e-8


def test_it_is_greatest_where_every_input_is_sure_and_all_are_as_expected() -> None:
    sure = torch.eye(4, dtype=torch.float64)
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert float(information(sure, uniform)) == pytest.approx(0, abs=1e-6)
    one_for_all = sure[[0, 0, 0, 0]]
    assert float(information(one_for_all, uniform)) < -10, "a collapse is worse than doubt"
    doubt = torch.full((4, 4), 0.25, dtype=torch.float64)
    assert float(information(doubt, uniform)) == pytest.approx(-math.log(4), abs=1e-6)
    assert float(information(one_for_all, sure[0])) == pytest.approx(0, abs=1e-6), "unless it is expected"


def said(prior: object) -> Prior:
    return prior_of(Node.of({"prior": prior}), Path())


def test_priors_of_categories() -> None:
    names = ("a", "b", "c")
    assert said("uniform").over(names, 3) == pytest.approx([1 / 3] * 3)
    assert said([1, 2, 1]).over(names, 3) == pytest.approx([0.25, 0.5, 0.25])
    assert said({"c": 3, "a": 1}).over(names, 3) == pytest.approx([0.25, 0, 0.75])
    assert said({"beta": [2, 2]}).over(("1", "2"), 2) == pytest.approx([0.5, 0.5])
    assert said({"beta": [list(each) for each in ASAP]}).over(tuple("123456"), 6)[0] == pytest.approx(0.0122, abs=5e-5)
