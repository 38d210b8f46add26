"""What every registered loss promises, on small batches; a loss of your own must pass it too.

A loss listed in `SETTINGS` is compared with its float64 oracle; any other is held to the promises that need none: a
gradient that is the derivative, finite at the extremes, blind to what it may not see, mistakes refused in one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from embeddings.evaluation.suite import KINDS
from embeddings.training import losses
from embeddings.training.losses import LOSSES, LossEntry, Targets
from merging.errors import CuveeError
from tests.oracles.losses import ORACLES, oracle

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

CONTRASTS = [
    {"temperature": 0.05},
    {"temperature": 0.2, "symmetric": True},
    {"temperature": 0.05, "false_negative_margin": 0.3},
    {"temperature": 0.05, "false_negative_margin": 0.1, "false_negative_mode": "relative", "matryoshka": [6, 3]},
]
#: Parameters under which a loss is compared with its oracle.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "infonce": CONTRASTS,
    "disj": CONTRASTS,
    "conj": CONTRASTS,
    "cosent": [{"scale": 20.0}, {"scale": 5.0, "matryoshka": [6, 2], "matryoshka_weights": [1, 0.25]}],
    "angle": [{"scale": 20.0}, {"scale": 5.0, "matryoshka": [5, 2]}],
    "contrastive": [{"margin": 0.5}, {"margin": 1.2, "matryoshka": [6, 3]}],
    "distill_kl": [
        {"temperature": 0.05}, {"temperature": 0.5, "teacher_temperature": 2.0, "rescale": True, "matryoshka": [6, 4]}
    ],
    "margin_mse": [{"scale": 1.0}, {"scale": 7.0, "matryoshka": [6, 3]}],
}  # fmt: skip
DIMENSIONS = 6


def every(wanted: Callable[[LossEntry], bool] = lambda entry: True) -> pytest.MarkDecorator:
    """Parametrises a test over the registered losses, or those of them that are `wanted`."""
    return pytest.mark.parametrize("entry", [pytest.param(e, id=n) for n, e in LOSSES.items() if wanted(e)])


def with_settings() -> pytest.MarkDecorator:
    cases = [
        pytest.param(LOSSES[name], given, id=f"{name}-{i}")
        for name, several in SETTINGS.items()
        for i, given in enumerate(several)
    ]
    return pytest.mark.parametrize(("entry", "given"), cases)


def batch(entry: LossEntry, seed: int = 0, queries: int = 5, dtype: Any = None) -> tuple[Any, Any, Targets]:
    """Queries, candidates and targets of the form that the loss needs; rows of different length, not normalised."""
    random = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float64
    count = queries if entry.needs == "scores" else 3 * queries
    q, c = (3 * torch.randn(n, DIMENSIONS, generator=random, dtype=dtype) for n in (queries, count))
    positive = torch.zeros(queries, count, dtype=torch.bool)
    positive[range(queries), range(queries)] = True
    positive |= torch.rand(positive.shape, generator=random) < (0.1 if count > queries else 0)
    allowed = positive | (torch.rand(positive.shape, generator=random) < 0.7)
    scores = None
    if entry.needs == "scores":
        scores = torch.randint(0, 2, (queries,), generator=random).to(dtype)  # 0 and 1, which all of them take
        scores[:2] = torch.tensor([0.0, 1.0])
    if entry.needs == "teacher":
        scores = 4 * torch.randn(positive.shape, generator=random, dtype=dtype)
        scores[~allowed] = torch.nan
        scores[-1] = torch.nan  # one query that nobody scored
    return q, c, Targets(positive, allowed, scores)


def build(entry: LossEntry, **parameters: Any) -> Any:
    needed = SETTINGS.get(entry.name, [{}])[0]
    return losses.build(entry.name, {**needed, **parameters})


# ---- the entry itself ----


@every()
def test_entry_says_all_that_others_need(entry: LossEntry) -> None:
    assert entry.title
    assert entry.summary
    assert entry.source
    assert entry.needs in ("positives", "scores", "teacher")
    assert set(entry.default_of) <= set(KINDS)
    assert all(parameter.help for parameter in entry.parameters.values())
    assert not entry.in_batch or entry.needs == "positives"


def test_every_type_of_task_has_one_default() -> None:
    for kind in KINDS:
        assert sum(kind in entry.default_of for entry in LOSSES.values()) <= 1
        assert losses.default_of(kind) in LOSSES
    assert LOSSES[losses.default_of("Retrieval", "teacher")].needs == "teacher"


def test_every_loss_of_ours_has_an_oracle_and_settings() -> None:
    ours = {name for name, entry in LOSSES.items() if entry.function.__module__ == "embeddings.training.losses"}
    assert ours == set(SETTINGS) == set(ORACLES)


# ---- the oracle ----


@with_settings()
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_float64_oracle(entry: LossEntry, given: dict[str, Any], seed: int) -> None:
    q, c, targets = batch(entry, seed)
    masks = targets.positive.numpy(), targets.allowed.numpy()
    scores = None if targets.scores is None else targets.scores.numpy()
    truth = oracle(entry.name, q.numpy(), c.numpy(), *masks, scores, **given)
    assert losses.build(entry.name, given)(q, c, targets).item() == pytest.approx(truth, rel=1e-9, abs=1e-12)
    single = losses.build(entry.name, given)(q.float(), c.float(), targets)
    assert single.dtype == torch.float32
    assert single.shape == ()
    assert single.item() == pytest.approx(truth, rel=2e-5, abs=1e-6)


@with_settings()
def test_gradient_is_the_derivative(entry: LossEntry, given: dict[str, Any]) -> None:
    q, c, targets = batch(entry, seed=7, queries=4)
    run = losses.build(entry.name, {key: value for key, value in given.items() if not key.startswith("false_negative")})
    assert torch.autograd.gradcheck(lambda q, c: run(q, c, targets), (q.requires_grad_(), c.requires_grad_()))


# ---- properties ----


@every()
def test_lengths_of_the_embeddings_do_not_matter(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    lengths = torch.linspace(0.1, 50, len(c), dtype=c.dtype)[:, None]
    loss = build(entry)(q, c, targets)
    torch.testing.assert_close(build(entry)(4 * q, lengths * c, targets), loss)


@every()
def test_order_of_the_queries_does_not_matter(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    turn = torch.randperm(len(q), generator=torch.Generator().manual_seed(1))
    scores = None if targets.scores is None else targets.scores[turn]
    turned = Targets(targets.positive[turn], targets.allowed[turn], scores)
    if entry.needs == "scores":  # its candidate goes with a query
        c_turned, turned = c[turn], Targets(turned.positive[:, turn], turned.allowed[:, turn], scores)
    else:
        c_turned = c
    torch.testing.assert_close(build(entry)(q[turn], c_turned, turned), build(entry)(q, c, targets))


@every(lambda entry: entry.needs != "scores")
def test_order_of_the_candidates_does_not_matter(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    turn = torch.randperm(len(c), generator=torch.Generator().manual_seed(1))
    scores = None if targets.scores is None else targets.scores[:, turn]
    turned = Targets(targets.positive[:, turn], targets.allowed[:, turn], scores)
    torch.testing.assert_close(build(entry)(q, c[turn], turned), build(entry)(q, c, targets))


@every(lambda entry: entry.needs != "scores")
def test_candidates_that_are_not_allowed_do_not_exist(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    targets.positive[:, -2:] = targets.allowed[:, -2:] = False
    if targets.scores is not None:
        targets.scores[:, -2:] = torch.nan
    c.requires_grad_()
    loss = build(entry)(q, c, targets)
    (gradient,) = torch.autograd.grad(loss, c)
    assert not gradient[-2:].any()
    scores = None if targets.scores is None else targets.scores[:, :-2]
    without = build(entry)(q, c[:-2], Targets(targets.positive[:, :-2], targets.allowed[:, :-2], scores))
    torch.testing.assert_close(loss, without)


@every()
def test_a_step_against_the_gradient_lowers_the_loss(entry: LossEntry) -> None:
    q, c, targets = batch(entry, seed=3)
    q.requires_grad_(), c.requires_grad_()
    before = build(entry)(q, c, targets)
    steps = torch.autograd.grad(before, (q, c))
    length = torch.sqrt(sum((step**2).sum() for step in steps))
    with torch.no_grad():
        after = build(entry)(q - 1e-4 * steps[0] / length, c - 1e-4 * steps[1] / length, targets)
    assert after < before


@every()
@pytest.mark.parametrize("kind", ["zeros", "equal", "opposite", "huge"])
def test_extremes_are_finite(entry: LossEntry, kind: str) -> None:
    """With gradients, in float32: vectors that vanish, agree, oppose each other or overflow when squared twice."""
    q, c, targets = batch(entry, dtype=torch.float32)
    if kind == "zeros":
        q, c = torch.zeros_like(q), torch.zeros_like(c)
    elif kind == "huge":
        q, c = 1e15 * q, 1e15 * c
    else:
        q, c = q[:1].expand_as(q).clone(), (q[:1] if kind == "equal" else -q[:1]).expand_as(c).clone()
    q.requires_grad_(), c.requires_grad_()
    loss = build(entry)(q, c, targets)
    gradients = torch.autograd.grad(loss, (q, c))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@every(lambda entry: entry.needs == "positives")
def test_without_negatives_nothing_is_learnt_and_nothing_breaks(entry: LossEntry) -> None:
    q, c, targets = batch(entry, dtype=torch.float32)
    alone = torch.zeros_like(targets.positive)
    alone[range(len(q)), range(len(q))] = True
    q.requires_grad_()
    loss = build(entry)(q, c, Targets(alone, alone))
    (gradient,) = torch.autograd.grad(loss, q)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e-6


@every(lambda entry: entry.needs == "positives")
def test_a_positive_counts_whether_or_not_it_is_marked_allowed(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    for symmetric in (False, True):
        run = build(entry, **({"symmetric": symmetric} if "symmetric" in entry.parameters else {}))
        unmarked = Targets(targets.positive, targets.allowed & ~targets.positive)
        torch.testing.assert_close(run(q, c, unmarked), run(q, c, targets))


@every(lambda entry: entry.needs == "positives")
@pytest.mark.parametrize("gap", [0.5, 1.0, 1.9])
def test_a_pair_that_is_learnt_still_has_a_gradient(entry: LossEntry, gap: float) -> None:
    """Where the positive's share rounds to 1, the loss is the negative's share, not 0."""
    positive = torch.tensor([[True, False]])
    q, c = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1 - gap, (1 - (1 - gap) ** 2) ** 0.5]])
    c.requires_grad_()
    loss = losses.build(entry.name, {"temperature": 0.04})(q, c, Targets(positive, torch.ones_like(positive)))
    (gradient,) = torch.autograd.grad(loss, c)
    if entry.name in ("infonce", "disj"):
        assert loss.item() == pytest.approx(torch.tensor(-gap / 0.04).exp().item(), rel=1e-2, abs=1e-30)
        assert gradient.any()
    assert 0 <= loss < 1e-4


@every()
def test_low_precision_is_lifted_and_autocast_is_kept_out(entry: LossEntry) -> None:
    q, c, targets = batch(entry, dtype=torch.float32)
    q, c = q.bfloat16(), c.bfloat16()
    loss = build(entry)(q, c, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, build(entry)(q.float(), c.float(), targets), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(build(entry)(q.float(), c.float(), targets), loss, rtol=0, atol=0)


@every()
def test_repeats_to_the_bit_and_leaves_its_inputs(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    copies = q.clone(), c.clone(), targets.positive.clone(), targets.allowed.clone()
    scores = None if targets.scores is None else targets.scores.clone()
    run = build(entry, matryoshka=[DIMENSIONS, 2])
    assert torch.equal(run(q, c, targets), run(q, c, targets))
    assert all(map(torch.equal, copies, (q, c, targets.positive, targets.allowed)))
    if scores is not None:
        torch.testing.assert_close(scores, targets.scores, rtol=0, atol=0, equal_nan=True)


@every()
def test_matryoshka_sums_over_the_first_dimensions(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    both = build(entry, matryoshka=[DIMENSIONS, 4], matryoshka_weights=[1, 0.5])(q, c, targets)
    parts = build(entry)(q, c, targets) + 0.5 * build(entry)(q[:, :4], c[:, :4], targets)
    torch.testing.assert_close(both, parts)
    with pytest.raises(CuveeError, match="'matryoshka' has 9 dimensions, the embeddings 6"):
        build(entry, matryoshka=[9])(q, c, targets)


# ---- false negatives ----


@every(lambda entry: entry.needs == "positives")
def test_false_negatives_are_judged_by_the_lowest_positive_on_all_dimensions(entry: LossEntry) -> None:
    unit = torch.eye(4, dtype=torch.float64)
    q = unit[:1]
    cosines = torch.tensor([0.8, 0.6, 0.7, 0.56, 0.54, -0.3], dtype=torch.float64)  # two positives, four negatives
    c = cosines[:, None] * unit[0] + (1 - cosines**2).sqrt()[:, None] * unit[1]
    positive = torch.tensor([[True, True, False, False, False, False]])
    targets = Targets(positive, torch.ones_like(positive))
    for margin, mode, kept in [
        (0.0, "absolute", 3), (0.05, "absolute", 2), (-0.2, "absolute", 4), (0.08, "relative", 2), (1.0, "absolute", 0)
    ]:  # fmt: skip
        masked = losses.without_false_negatives(q, c, targets, margin, relative=mode == "relative")
        assert masked.allowed[0, :2].all()
        assert masked.allowed[0, 2:].sum() == kept
        expected = build(entry)(q, c, masked)
        judged = build(entry, false_negative_margin=margin, false_negative_mode=mode)(q, c, targets)
        torch.testing.assert_close(judged, expected)
    short = build(entry, false_negative_margin=0.05, matryoshka=[1])(q, c, targets)  # all cosines are ±1 there
    torch.testing.assert_close(
        short, build(entry, matryoshka=[1])(q, c, losses.without_false_negatives(q, c, targets, 0.05))
    )


# ---- mistakes ----


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("MultipleNegativesRankingLoss", "'{name: infonce, temperature: 0.05}'"),
        ("CachedMultipleNegativesRankingLoss", "'gradient_cache: 4096'"),
        ("MultipleNegativesSymmetricRankingLoss", "symmetric: true"),
        ("CoSENTLoss", "write 'cosent'"),
        ("AnglELoss", "write 'angle'"),
        ("CosineSimilarityLoss", "the nearest is 'cosent'"),
        ("DistillKLDivLoss", "distill_kl"),
        ("MarginMSELoss", "margin_mse"),
        ("MatryoshkaLoss", "matryoshka: [384, 128]"),
    ],
)
def test_the_classes_of_sentence_transformers_are_told_by_our_names(theirs: str, ours: str) -> None:
    from sentence_transformers.sentence_transformer import losses as classes

    assert hasattr(classes, theirs)
    with pytest.raises(CuveeError) as error:
        losses.build(theirs, where="a.yml:3")
    assert str(error.value).startswith(f"a.yml:3: no loss '{theirs}'; ") and ours in error.value.mend
    for written in re.findall(r"\{.*?\}", error.value.mend):  # what is advised can be written
        parameters = yaml.safe_load(written)
        losses.build(parameters.pop("name"), parameters)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(CuveeError, match=r"a.yml:3: no loss 'infonse'; did you mean 'infonce'\?"):
        losses.build("infonse", where="a.yml:3")
    with pytest.raises(CuveeError, match=r"'temprature' is no parameter of 'disj'; did you mean 'temperature'\?"):
        losses.build("disj", {"temprature": 0.1})
    with pytest.raises(CuveeError, match=r"'false_negative_margin' is no parameter of 'cosent'; it takes 'scale'"):
        losses.build("cosent", {"false_negative_margin": 0.1})


@every()
def test_rows_of_another_form_are_refused(entry: LossEntry) -> None:
    fits = {"positives": ["positives", "teacher"], "scores": ["scores"], "teacher": ["teacher"]}[entry.needs]
    for has in ("positives", "scores", "teacher"):
        if has in fits:
            losses.refuse_unfit(entry, has, "faq")
            continue
        with pytest.raises(CuveeError, match=f"a.yml:3: the loss '{entry.name}' needs .*, and 'faq' has") as caught:
            losses.refuse_unfit(entry, has, "faq", "a.yml:3")
        assert losses.default_of("Retrieval" if has == "positives" else "STS", has) in str(caught.value)


@every()
def test_mistakes_are_refused_in_one_line(entry: LossEntry) -> None:
    wrong: list[dict[str, Any]] = [
        {"matryoshka": 0}, {"matryoshka": [64, "many"]}, {"matryoshka": {"64": 1}}, {"matryoshka": []}, {"nothing": 1},
        {"matryoshka": [6, 3], "matryoshka_weights": [1]}, {"matryoshka": [6], "matryoshka_weights": [-1]},
    ]  # fmt: skip
    for name, parameter in entry.parameters.items():
        wrong += [{name: {"a": 1}}, {name: float("nan")}]
        if not isinstance(parameter.default, tuple):
            wrong.append({name: [1, 2]})
        if parameter.low is not None:
            wrong.append({name: parameter.low - 1})
        if parameter.high is not None:
            wrong.append({name: parameter.high + 1})
        if parameter.type is not str:
            wrong.append({name: "a lot"})
    for given in wrong:
        with pytest.raises(CuveeError) as caught:
            losses.build(entry.name, given, where="a.yml:3")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("a.yml:3")


@every()
def test_absent_values_are_the_defaults(entry: LossEntry) -> None:
    q, c, targets = batch(entry)
    plain, none = losses.build(entry.name), losses.build(entry.name, dict.fromkeys(entry.parameters))
    assert torch.equal(plain(q, c, targets), none(q, c, targets))


def test_defaults_of_a_run_go_where_they_are_known() -> None:
    run = {"temperature": 0.05, "matryoshka": [4], "scale": 10.0}
    assert losses.combined("infonce", {"temperature": 0.1}, run) == {"temperature": 0.1, "matryoshka": [4]}
    assert losses.combined("cosent", {}, run) == {"matryoshka": [4], "scale": 10.0}
    with pytest.raises(CuveeError, match=r"'temperatur' is no parameter of any loss; did you mean 'temperature'\?"):
        losses.combined("infonce", {}, {"temperatur": 1})


def test_a_loss_of_ones_own_is_registered_once() -> None:
    before = dict(LOSSES)
    try:

        @losses.loss("mine", title="Mine", needs="positives", source="here")
        def mine(queries: Any, candidates: Any, targets: Targets, *, power: float = 2.0) -> Any:
            """The positives' distances."""
            return (1 - losses.cosines(queries, candidates))[targets.positive].pow(power).mean()

        q, c, targets = batch(LOSSES["mine"])
        square, cube = losses.build("mine")(q, c, targets), losses.build("mine", {"power": 3})(q, c, targets)
        assert square != cube
        with pytest.raises(CuveeError, match="registered already"):
            losses.loss("mine", title="Mine", needs="positives", source="here")(mine)
    finally:
        LOSSES.clear()
        LOSSES.update(before)
