"""losses: methods.md sections 4, 7 and 9, formula by formula, and the facts that preference_loss relies on."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import losses
from fastpref.losses import LOSSES, Logistic, LossTraits, Pairs

NAN = float("nan")
REFERENCE = frozenset({"reference"})


def vector(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def golden_pairs(**fields) -> Pairs:
    """The batch of methods.md 9.3."""
    return Pairs(
        chosen_logps=vector(-10, -25, -7.5),
        rejected_logps=vector(-12, -20, -7.4),
        ref_chosen_logps=vector(-11, -24, -7),
        ref_rejected_logps=vector(-11.5, -22, -8),
        chosen_length=torch.tensor([5, 10, 4]),
        rejected_length=torch.tensor([8, 5, 4]),
        rating_gap=vector(2, 0.5, -1),
        chosen_score=vector(0.8, 0.8, 0.8),
        rejected_score=vector(0.2, 0.2, 0.2),
    )._replace(**fields)


def random_pairs(seed=0, size=8, dtype=torch.float64, **fields) -> Pairs:
    """Every field given: lengths differ, pair 2 is not rated, log-ratios average above 0, some gaps are below 0."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return torch.tensor(rng.uniform(low, high, size), dtype=dtype)

    gap, score = draw(-2, 2), draw(0.05, 0.95)
    gap[2] = score[2] = NAN
    return Pairs(
        chosen_logps=draw(-30, -5),
        rejected_logps=draw(-30, -5),
        ref_chosen_logps=draw(-35, -10),
        ref_rejected_logps=draw(-35, -10),
        chosen_length=torch.tensor(rng.integers(3, 20, size)),
        rejected_length=torch.tensor(rng.integers(3, 20, size)),
        rating_gap=gap,
        chosen_tail_logratios=draw(-3, 3),
        rejected_tail_logratios=draw(-3, 3),
        chosen_wpo_log_weight=draw(-2, 0.5),
        rejected_wpo_log_weight=draw(-2, 0.5),
        chosen_score=score,
        rejected_score=draw(0.05, 0.95),
    )._replace(**fields)


# name -> options under which every general property is tested; a new loss without an entry fails the test below.
CASES = {
    "sigmoid": [{}, {"label_smoothing": 0.1}],
    "robust": [{}, {"label_smoothing": 0.3}],
    "hinge": [{}],
    "ipo": [{}, {"length_normalize": False}],
    "exo_pair": [{}],
    "nca_pair": [{}],
    "bco_pair": [{}, {"delta": 0.3}, {"delta": "batch_mean"}],
    "sppo_hard": [{}],
    "sppo": [{}],
    "aot": [{}, {"label_smoothing": 0.1}],
    "aot_unpaired": [{}],
    "apo_zero": [{}],
    "apo_down": [{}],
    "discopop": [{}, {"tau": 1.0}],
    "sigmoid_norm": [{}],
    "simpo": [{}, {"label_smoothing": 0.1}],
    "cpo": [{}, {"alpha": 0.0}],
    "orpo": [{}],
    "alphapo": [{}, {"alpha": 0.0}, {"alpha": -0.5}],
    "kto": [{}, {"z0": 0.2, "lambda_undesirable": 2.0}],
    "beta_dpo": [{"a": 0.05}, {"a": 0.03, "keep": 0.5}],  # a small enough for gaps of ±10 to stay off the floor of β
    "wpo": [{}, {"base": "ipo"}, {"base": "aot"}, {"base": "bco_pair", "options": {"delta": "batch_mean"}}],
    "ld_dpo": [{}],
    "length_dpo": [{}],
    "dpop": [{}],
    "dpo_shift": [{}],
    "mmpo": [{}],
    "odpo": [{}, {"score_ratio": True}],
    "modpo": [{}, {"weights": (0.6, 0.4)}],
    "cal_dpo": [{}],
    "rpo": [{}, {"mode": "fwd"}, {"mode": "sq", "eta": 2.0}],
    "rdpo": [{}],
    "ripo": [{}],
    "ml_rdpo": [{}, {"variance": 3.0}],
    "ddpo": [{}],
    "mixdpo": [{}, {"label_smoothing": 0.1}],
    "sft": [{}],
}
F_DIVERGENCES = ("sigmoid", "hinge", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "robust", "ipo")
ALL_CASES = [(name, options) for name, cases in CASES.items() for options in cases]
F_CASES = [
    (name, {"f_divergence": kind})
    for name, kind in itertools.product(F_DIVERGENCES, ("forward_kl", "js_divergence", "alpha_divergence"))
]


def case_id(value):
    return value if isinstance(value, str) else ",".join(f"{key}={option}" for key, option in value.items()) or "-"


each_case = pytest.mark.parametrize(("name", "options"), ALL_CASES, ids=case_id)
each_case_and_divergence = pytest.mark.parametrize(("name", "options"), ALL_CASES + F_CASES, ids=case_id)


def evaluate(name, pairs, options):
    seeded = {"generator": torch.Generator().manual_seed(1)} if name == "beta_dpo" else {}
    return LOSSES[name](pairs, **options, **seeded)


def values_and_gradients(function, pairs):
    leaves = [pairs.chosen_logps.clone().requires_grad_(), pairs.rejected_logps.clone().requires_grad_()]
    values = function(pairs._replace(chosen_logps=leaves[0], rejected_logps=leaves[1]))
    gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    return values.detach(), [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)
    ]


# ---- the table


def test_every_loss_has_a_case():
    assert set(CASES) == set(LOSSES)


def test_the_table_holds_the_functions_themselves():
    for name, function in LOSSES.items():
        assert getattr(losses, name) is function
        assert function.name == function.__name__ == name
        assert function.__doc__


def test_signature_shows_pairs_then_options():
    parameters = inspect.signature(losses.rdpo).parameters
    assert list(parameters) == ["pairs", "beta", "beta_rating", "reference_free"]
    assert parameters["beta_rating"].default == 0.3
    assert list(inspect.signature(losses.hinge).parameters)[-2:] == ["f_divergence", "f_alpha"]


# ---- values


GOLDEN = [
    ("sigmoid", {}, (0.62095705, 0.85435524, 0.74965892)),
    ("sigmoid", {"label_smoothing": 0.1}, (0.63595705, 0.82435524, 0.73865892)),
    ("robust", {"label_smoothing": 0.1}, (0.60220705, 0.89185524, 0.76340892)),
    ("hinge", {}, (0.85, 1.30, 1.11)),
    ("ipo", {"length_normalize": False}, (12.25, 64.0, 37.21)),
    ("ipo", {}, (22.44390625, 30.25, 27.825625)),
    ("exo_pair", {"label_smoothing": 1e-3}, (2.50551656, 3.28651161, 2.95248539)),
    ("nca_pair", {}, (1.35082481, 1.46566442, 1.41448803)),
    ("bco_pair", {}, (1.31285631, 1.54253553, 1.44205676)),
    ("bco_pair", {"delta": "batch_mean"}, (1.31270098, 1.54204944, 1.44216779)),
    ("sppo_hard", {}, (36.25, 85.0, 61.61)),
    ("sppo", {}, (5.125, 20.5, 12.605)),
    ("aot", {}, (0.85435524, 0.72359711, 0.64439666)),
    ("aot_unpaired", {}, (0.71845965, 0.74965892, 0.74439666)),
    ("apo_zero", {}, (0.96252342, 1.07481318, 1.0274929)),
    ("apo_down", {}, (0.98754934, 1.04946333, 1.01497491)),
    ("discopop", {"tau": 0.05}, (0.84933758, 0.85558044, 0.78622936)),
    ("sigmoid_norm", {}, (0.68010831, 0.71845965, 0.70699171)),
    ("simpo", {"beta": 2.0, "gamma": 0.5}, (1.70141328, 0.07888973, 1.00549248)),
    ("cpo", {"alpha": 0.0}, (0.59813887, 0.97407698, 0.69815968)),
    ("dpop", {"lam": 50.0}, (0.62095705, 5.30497918, 2.68095652)),
    ("dpo_shift", {"shift": 0.75}, (0.6267586, 0.82593942, 0.74177488)),
    ("mmpo", {"gamma": 1.0}, (0.63883749, 0.74109304, 0.66924247)),
    ("cal_dpo", {}, (18.32641328, 45.54858735, 32.19233533)),
    ("rdpo", {"beta_rating": 0.3}, (0.9844839, 0.95345925, 0.58770232)),
    ("ripo", {"beta_rating": 0.3}, (1.03361111, 0.93444444, 0.07654444)),
    ("ml_rdpo", {"variance": 1.0}, (2.33220705, 1.17435524, 1.14570892)),
    ("ddpo", {}, (3.4225, 0.64, 0.7921)),
    ("mixdpo", {"tau": 0.5}, (0.62095705, 0.85435524, 1.875)),
    ("kto", {"z0": 0.2, "lambda_desirable": 2.0, "lambda_undesirable": 0.0}, (0.48001066, 0.52996405, 0.51749286)),
    ("kto", {"z0": 0.2, "lambda_desirable": 0.0, "lambda_undesirable": 2.0}, (0.48250714, 0.54487889, 0.50999867)),
    ("sigmoid", {"f_divergence": "forward_kl"}, (0.63115438, 0.83061094, 0.74965415)),
    # methods.md prints 0.72033850 for the third; −ls(0.1(ls(−0.5) − ls(0.6))) is 0.7203364988.
    ("sigmoid", {"f_divergence": "js_divergence"}, (0.66065216, 0.75422207, 0.72033650)),
    ("sigmoid", {"f_divergence": "alpha_divergence", "f_alpha": 0.5}, (0.62769095, 0.82941181, 0.74894255)),
]


@pytest.mark.parametrize(("name", "options", "expected"), GOLDEN)
def test_golden_values(name, options, expected):
    torch.testing.assert_close(LOSSES[name](golden_pairs(), **options), vector(*expected), rtol=0, atol=1e-7)


def test_golden_values_of_odpo():
    found = losses.odpo(golden_pairs(rating_gap=vector(2, 0.5, 0.1)), alpha=1.0)
    torch.testing.assert_close(found, vector(1.00115232, 0.51577102, 0.10582543), rtol=0, atol=1e-7)


def test_golden_values_of_the_orpo_penalty():
    pairs = golden_pairs()
    penalty = losses.orpo(pairs) - losses.sft(pairs)
    torch.testing.assert_close(penalty, vector(0.10420578, 0.01894923, 0.07080546), rtol=0, atol=1e-7)
    torch.testing.assert_close(losses.sft(pairs), vector(2.0, 2.5, 1.875))


def sp(z):
    return np.logaddexp(0, z)


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def expit(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        # Of the second golden pair: lr = −1, 2; L = −0.3; lengths 10, 5; g = 0.5.
        ("length_dpo", {"alpha": 0.02}, sp(-(-0.3 + 0.02 * (10 - 5)))),
        ("ld_dpo", {"ld_alpha": 0.25}, sp(-0.1 * ((-1 - 0.75 * 0.4) - (2 - 0.75 * -0.8)))),
        ("modpo", {"weights": (0.5, 0.3)}, sp(-(-0.3 - 0.3 * 0.5) / 0.5)),
        ("modpo", {"weights": (0.5, 2.0), "margins": [vector(9, -1, 9)]}, sp(-(-0.3 + 2.0) / 0.5)),
        ("rpo", {"mode": "bwd", "eta": 2.0}, bernoulli_kl(expit(1.0), expit(-0.3))),
        ("rpo", {"mode": "fwd", "eta": 2.0}, bernoulli_kl(expit(-0.3), expit(1.0))),
        ("rpo", {"mode": "sq", "eta": 2.0}, 1.3**2),
        ("alphapo", {"alpha": 0.25, "gamma": 0.5}, sp(0.5 - 0.1 * (math.exp(1.0) - math.exp(0.625)) / 0.25)),
        ("cpo", {"alpha": 0.5}, sp(0.5) + 0.5 * 2.5),
        ("odpo", {"score_ratio": True, "alpha": 0.5}, sp(-(-0.3 - 0.5 * math.log(4)))),
        ("wpo", {}, math.exp(-0.7 - 0.1) * sp(0.3)),
        ("wpo", {"base": "rdpo", "options": {"beta_rating": 1.0}}, math.exp(-0.8) * sp(0.3 + 0.05)),
        # z0 is the mean log-ratio of the golden batch, 1.6/6
        ("kto", {}, 0.5 * (expit(0.1 * (0.8 / 3 + 1)) + expit(0.1 * (2 - 0.8 / 3)))),
    ],
)
def test_formulas_without_a_golden_row(name, options, formula):
    pairs = golden_pairs(
        chosen_tail_logratios=vector(0, 0.4, 0),
        rejected_tail_logratios=vector(0, -0.8, 0),
        chosen_wpo_log_weight=vector(0, -0.7, 0),
        rejected_wpo_log_weight=vector(0, -0.1, 0),
    )
    assert LOSSES[name](pairs, **options)[1].item() == pytest.approx(formula, rel=1e-12)


def test_wpo_weight_is_capped_at_max_weight():
    pairs = golden_pairs(chosen_wpo_log_weight=vector(1, 1, -1), rejected_wpo_log_weight=vector(0.5, -2, 0))
    base = losses.sigmoid(pairs)
    torch.testing.assert_close(losses.wpo(pairs), base * vector(1, math.exp(-1), math.exp(-1)))
    torch.testing.assert_close(losses.wpo(pairs, max_weight=None), base * vector(1.5, -1, -1).exp())


# ---- corners: one loss is another


@pytest.mark.parametrize(
    ("name", "options", "other", "other_options"),
    [
        ("rdpo", {"beta_rating": 1e12}, "sigmoid", {}),
        ("ml_rdpo", {"variance": 1e15}, "sigmoid", {}),
        ("robust", {"label_smoothing": 0.0}, "sigmoid", {}),
        ("dpo_shift", {"shift": 1.0}, "sigmoid", {}),
        ("ld_dpo", {"ld_alpha": 1.0}, "sigmoid", {}),
        ("length_dpo", {"alpha": 0.0}, "sigmoid", {}),
        ("dpop", {"lam": 0.0}, "sigmoid", {}),
        ("odpo", {"alpha": 0.0}, "sigmoid", {}),
        ("modpo", {"weights": (1.0,), "margins": ()}, "sigmoid", {}),
        ("mixdpo", {"tau": -100.0}, "sigmoid", {}),
        ("mixdpo", {"tau": 100.0}, "sft", {}),
        ("alphapo", {"alpha": 0.0}, "simpo", {}),
        ("alphapo", {"alpha": 1e-9}, "simpo", {}),
        ("rpo", {"mode": "sq"}, "ddpo", {}),
        ("sigmoid", {"f_divergence": "alpha_divergence", "f_alpha": 1.0}, "sigmoid", {}),
        ("hinge", {"f_divergence": "alpha_divergence", "f_alpha": 0.0}, "hinge", {"f_divergence": "forward_kl"}),
    ],
)
def test_corners(name, options, other, other_options):
    pairs = random_pairs(rating_gap=vector(2, 0.5, 1.5, 0.1, 3, 0.3, 4, 1))
    torch.testing.assert_close(
        LOSSES[name](pairs, **options), LOSSES[other](pairs, **other_options), rtol=1e-6, atol=1e-9
    )


def test_scaled_corners():
    pairs = random_pairs(rating_gap=torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(losses.kto(pairs, z0=0.0), 0.5 * losses.apo_zero(pairs))
    torch.testing.assert_close(losses.ripo(pairs, beta=0.2), 0.04 * losses.ipo(pairs, beta=0.2, length_normalize=False))
    torch.testing.assert_close(2e-9 * losses.ml_rdpo(pairs, variance=1e-9), losses.ddpo(pairs), rtol=1e-6, atol=1e-8)


def test_equal_policy_and_reference_give_ln_2():
    logps = vector(-500.3, -17.9, -1234.5, dtype=torch.float32)
    pairs = Pairs(logps, 2 * logps, logps, 2 * logps)
    for name in ("sigmoid", "aot", "aot_unpaired", "robust", "dpo_shift", "dpop"):
        torch.testing.assert_close(LOSSES[name](pairs), torch.full((3,), math.log(2)), rtol=0, atol=1e-6)


# ---- the Logistic family


@pytest.mark.parametrize(
    ("name", "options", "record"),
    [
        ("sigmoid", {}, Logistic()),
        ("sigmoid", {"label_smoothing": 0.25}, Logistic(a=0.75, b=0.25)),
        ("robust", {"label_smoothing": 0.25}, Logistic(a=1.5, b=-0.5)),
        ("ipo", {"length_normalize": False, "beta": 0.5}, Logistic(a=0.0, c=8.0, m0=0.5)),
        ("rdpo", {"beta": 0.5, "beta_rating": 2.0}, Logistic(offset=0.25)),
        ("ripo", {"beta": 0.5, "beta_rating": 2.0}, Logistic(a=0.0, c=2.0, m0=0.5, m1=0.25)),
        ("ml_rdpo", {"variance": 4.0}, Logistic(c=0.25, m1=1.0, drop_square_when_unrated=True)),
        ("ddpo", {}, Logistic(a=0.0, c=2.0, m1=1.0, drop_square_when_unrated=True)),
        ("rpo", {"mode": "sq", "eta": 3.0}, Logistic(a=0.0, c=2.0, m1=3.0, drop_square_when_unrated=True)),
        ("sigmoid", {"reference_free": True}, Logistic()),
        ("sigmoid", {"f_divergence": "js_divergence"}, None),
        ("ipo", {}, None),
        ("rpo", {}, None),
    ],
)
def test_logistic_records(name, options, record):
    assert LOSSES[name].logistic(**options) == record
    if record is not None and "reference_free" not in options:
        beta = options.get("beta", 0.1)
        pairs = random_pairs()
        torch.testing.assert_close(losses.logistic_pair_loss(pairs, beta, record), LOSSES[name](pairs, **options))
        torch.testing.assert_close(family(pairs, beta, record), LOSSES[name](pairs, **options))


def test_only_family_members_have_a_record():
    members = {name for name, function in LOSSES.items() if function.logistic is not None}
    assert members == {"sigmoid", "robust", "ipo", "rpo", "rdpo", "ripo", "ml_rdpo", "ddpo"}


def family(pairs, beta, record):
    """The docstring of Logistic in numpy, pair by pair."""
    expected = []
    for chosen, rejected, ref_chosen, ref_rejected, gap in zip(
        *(np.asarray(x) for x in (*pairs[:4], pairs.rating_gap)), strict=True
    ):
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        rating = 0.0 if np.isnan(gap) else gap
        z, target = margin - record.offset * rating, record.m0 + record.m1 * rating
        square = 0.5 * record.c * (margin - target) ** 2
        if np.isnan(gap) and record.drop_square_when_unrated:
            square = 0.0
        expected.append(record.a * sp(-z) + record.b * sp(z) + square)
    return vector(*expected)


coefficient = st.floats(-3, 3)


@settings(deadline=None, max_examples=60)
@given(
    record=st.builds(Logistic, *[coefficient] * 6, st.booleans()),
    beta=st.floats(0.01, 5),
    seed=st.integers(0, 2**16),
)
def test_logistic_family_is_its_formula(record, beta, seed):
    pairs = random_pairs(seed)
    torch.testing.assert_close(
        losses.logistic_pair_loss(pairs, beta, record), family(pairs, beta, record), rtol=1e-9, atol=1e-9
    )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16), smoothing=st.floats(0, 0.49), beta=st.floats(0.01, 2), beta_rating=st.floats(0.1, 10)
)
def test_gradients_are_bounded_and_opposite(seed, smoothing, beta, beta_rating):
    pairs = random_pairs(seed)
    for name, options in (("sigmoid", {"label_smoothing": smoothing}), ("rdpo", {"beta_rating": beta_rating})):
        _, (chosen, rejected) = values_and_gradients(lambda p, n=name, o=options: LOSSES[n](p, beta=beta, **o), pairs)
        torch.testing.assert_close(chosen, -rejected)
        assert (chosen.abs() <= beta).all()
        if name == "rdpo":
            assert (chosen <= 0).all()


def test_zero_coefficients_are_not_evaluated():
    # 0·softplus(inf) would be NaN.
    pairs = golden_pairs(rating_gap=vector(1e308, 1e308, 1e308))
    assert torch.equal(losses.logistic_pair_loss(pairs, 0.1, Logistic(m1=1e10)), losses.sigmoid(pairs))
    square = Logistic(a=0.0, c=200.0, m0=0.5, offset=1e10)
    torch.testing.assert_close(losses.logistic_pair_loss(pairs, 0.1, square), losses.ipo(pairs, length_normalize=False))


# ---- section 4: the optimum of RDPO


@pytest.mark.parametrize(("name", "options"), [("rdpo", {"beta_rating": 0.8}), ("sigmoid", {})])
def test_the_optimum_of_the_bandit_is_the_tilted_reference(name, options):
    generator = torch.Generator().manual_seed(0)
    reward, noise, prior = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    rating, beta = reward + 0.7 * noise, 0.5
    log_ref = prior.log_softmax(0)
    chosen, rejected = torch.tensor(list(itertools.permutations(range(5), 2))).T
    preference = (reward[chosen] - reward[rejected]).sigmoid()
    theta = log_ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logps = theta.log_softmax(0)
        pairs = Pairs(logps[chosen], logps[rejected], log_ref[chosen], log_ref[rejected])
        pairs = pairs._replace(rating_gap=rating[chosen] - rating[rejected])
        loss = (preference * LOSSES[name](pairs, beta=beta, **options)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    tilt = rating / options["beta_rating"] if options else 0.0
    expected = (log_ref + reward / beta + tilt).softmax(0)
    torch.testing.assert_close(theta.detach().softmax(0), expected, rtol=0, atol=1e-7)


# ---- gradients


@each_case_and_divergence
def test_gradients(name, options):
    # What is detached (a batch mean, a running mean) is held fixed: finite differences would see it move.
    options = dict(options)
    if options.get("delta") == "batch_mean":
        options["delta"] = -0.2
    if "options" in options:
        options["options"] = {"delta": -0.2}
    if name == "kto":
        options.setdefault("z0", 0.4)
    if name == "beta_dpo":
        options.update(a=0.0, running_mean=0.0, running_std=1e6)
    pairs = random_pairs(seed=3)
    leaves = ("chosen_logps", "rejected_logps", "chosen_tail_logratios", "rejected_tail_logratios")

    def function(*values):
        return evaluate(name, pairs._replace(**dict(zip(leaves, values, strict=True))), options)

    inputs = [getattr(pairs, field).clone().requires_grad_() for field in leaves]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(function(*inputs).sum(), inputs, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)


def test_batch_statistics_are_detached():
    pairs = random_pairs()
    lr = torch.cat((pairs.chosen_logps - pairs.ref_chosen_logps, pairs.rejected_logps - pairs.ref_rejected_logps))
    assert lr.mean() > 0
    for name, coupled, fixed in (
        ("bco_pair", {"delta": "batch_mean"}, {"delta": 0.1 * lr.mean().item()}),
        ("kto", {}, {"z0": lr.mean().item()}),
        ("bco_pair", {"delta": (0.1 * lr.mean()).requires_grad_()}, {"delta": 0.1 * lr.mean().item()}),
    ):
        found = values_and_gradients(lambda p, n=name, o=coupled: LOSSES[n](p, **o), pairs)
        expected = values_and_gradients(lambda p, n=name, o=fixed: LOSSES[n](p, **o), pairs)
        torch.testing.assert_close(found, expected)


def test_wpo_weights_are_detached():
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    pairs = golden_pairs(chosen_wpo_log_weight=weight, rejected_wpo_log_weight=weight)
    assert not losses.wpo(pairs).requires_grad


def test_beta_dpo_does_not_learn_its_beta():
    pairs = random_pairs()
    options = {"keep": 1.0, "a": 0.05, "running_mean": 0.0}
    mean = (pairs.chosen_logps - pairs.ref_chosen_logps - pairs.rejected_logps + pairs.ref_rejected_logps).mean().item()
    beta_used = 0.1 * (1 + 0.05 * mean)
    found = values_and_gradients(lambda p: losses.beta_dpo(p, **options), pairs)
    torch.testing.assert_close(found, values_and_gradients(lambda p: losses.sigmoid(p, beta=beta_used), pairs))


def test_kto_reference_point_is_not_below_zero():
    pairs = random_pairs()
    lower = pairs._replace(chosen_logps=pairs.chosen_logps - 40)
    torch.testing.assert_close(losses.kto(lower), losses.kto(lower, z0=0.0))
    assert not torch.allclose(losses.kto(pairs), losses.kto(pairs, z0=0.0))


# ---- missing ratings


@pytest.mark.parametrize(
    ("name", "options", "fallback"),
    [
        ("rdpo", {}, "sigmoid"),
        ("ml_rdpo", {}, "sigmoid"),
        ("mmpo", {}, "sigmoid"),
        ("odpo", {}, "sigmoid"),
        ("odpo", {"score_ratio": True}, "sigmoid"),
        ("mixdpo", {}, "sigmoid"),
        ("ddpo", {}, None),
        ("rpo", {"mode": "bwd"}, None),
        ("rpo", {"mode": "fwd"}, None),
        ("rpo", {"mode": "sq"}, None),
        ("sppo", {}, None),
    ],
)
def test_a_pair_without_rating_falls_back(name, options, fallback):
    pairs = random_pairs()
    values, gradients = values_and_gradients(lambda p: LOSSES[name](p, **options), pairs)
    expected, expected_gradients = (
        values_and_gradients(losses.sigmoid, pairs) if fallback else (torch.zeros(8), [torch.zeros(8)] * 2)
    )
    for found, wanted in zip((values, *gradients), (expected, *expected_gradients), strict=True):
        assert found.isfinite().all()
        assert found[2].item() == pytest.approx(wanted[2].item(), rel=1e-12)
    rated = torch.arange(8) != 2
    assert not torch.allclose(values[rated], expected[rated].to(values.dtype))


def test_ripo_without_rating_takes_a_zero_gap():
    pairs = random_pairs()
    unrated = pairs._replace(rating_gap=torch.full_like(pairs.rating_gap, NAN))
    zero = pairs._replace(rating_gap=torch.zeros_like(pairs.rating_gap))
    assert torch.equal(losses.ripo(unrated), losses.ripo(zero))


def test_odpo_asks_no_margin_of_a_gap_that_is_not_positive():
    found = losses.odpo(golden_pairs(rating_gap=vector(0, -1, 1e-300)))
    assert found[:2].tolist() == [0, 0]
    assert found[2].item() == pytest.approx(0, abs=1e-12)  # the limit it continues


def test_odpo_without_usable_scores_is_dpo():
    pairs = golden_pairs(chosen_score=vector(-0.1, 0.5, 0.5), rejected_score=vector(0.5, 0.0, NAN))
    assert torch.equal(losses.odpo(pairs, score_ratio=True), losses.sigmoid(pairs))


# ---- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_case_and_divergence
def test_extreme_log_probs_stay_finite(name, options, dtype):
    extremes = (0.0, -1e-30, -1e-3, -1e4)
    chosen, rejected, ref_chosen, ref_rejected = (
        torch.tensor(column, dtype=dtype) for column in zip(*itertools.product(extremes, repeat=4), strict=True)
    )
    pairs = random_pairs(size=len(chosen), dtype=dtype)
    one = torch.ones(len(chosen), dtype=torch.int64)
    pairs = pairs._replace(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_length=one,
        rejected_length=one - 1,  # an empty completion
        rating_gap=50 * pairs.rating_gap,
    )
    values, gradients = values_and_gradients(lambda p: evaluate(name, p, options), pairs)
    assert values.dtype == dtype
    for tensor in (values, *gradients):
        assert tensor.isfinite().all()


def test_large_margins_keep_their_relative_precision():
    zero = vector(0.0)
    values, (gradient, _) = values_and_gradients(losses.sigmoid, Pairs(vector(-1.0), vector(-301.0), zero, zero))
    assert values.item() == pytest.approx(math.exp(-30), rel=1e-12, abs=0)
    assert gradient.item() == pytest.approx(-0.1 * math.exp(-30), rel=1e-12, abs=0)
    # F.softplus turns linear at 20 and would lose e^-21 here.
    reverse = losses.sigmoid(Pairs(vector(-211.0), vector(-1.0), zero, zero))
    assert reverse.item() - 21 == pytest.approx(math.exp(-21), rel=1e-5, abs=0)


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_odds_near_certainty(certain):
    near, far, one = -1e-12, -1.0, vector(1)
    chosen, rejected = (near, far) if certain == "chosen" else (far, near)
    log_odds = {near: near - math.log(-math.expm1(near)), far: far - math.log1p(-math.exp(far))}
    found = losses.orpo(Pairs(vector(chosen), vector(rejected), chosen_length=one, rejected_length=one))
    expected = -chosen + 0.1 * sp(log_odds[rejected] - log_odds[chosen])
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=0)


@each_case_and_divergence
def test_no_value_is_read_by_the_host(name, options):
    # A meta tensor has no values: reading one, or mixing in a tensor of another device, raises.
    pairs = Pairs(*(None if field is None else field.to("meta") for field in random_pairs()))
    found = LOSSES[name](pairs, **options)
    assert (found.device.type, found.shape, found.dtype) == ("meta", (8,), torch.float64)


# ---- facts


@each_case
def test_separable_is_the_truth(name, options):
    pairs = random_pairs()
    moved = Pairs(*(None if field is None else field.clone() for field in pairs))
    for field, by in zip(moved, (7, -2, -4, 1, 2, 3, 1, 0, 0, 1, 2, -1, -2, 0.01, 0.02), strict=True):
        if field is not None:
            field[3] += by
    others = torch.arange(8) != 3
    before, after = evaluate(name, pairs, options), evaluate(name, moved, options)
    assert torch.equal(before[others], after[others]) == losses.traits(name, options).separable


@each_case_and_divergence
def test_delta_only_is_the_truth(name, options):
    """A start common to both completions, whose log-probs differ from pair to pair."""
    pairs = random_pairs()
    policy, reference = vector(*range(-8, 0)), vector(-1, -9, -3, -2, -8, -1, -7, -2)
    tokens = torch.arange(1, 9)
    longer = pairs._replace(
        chosen_logps=pairs.chosen_logps + policy,
        rejected_logps=pairs.rejected_logps + policy,
        ref_chosen_logps=pairs.ref_chosen_logps + reference,
        ref_rejected_logps=pairs.ref_rejected_logps + reference,
        chosen_length=pairs.chosen_length + tokens,
        rejected_length=pairs.rejected_length + tokens,
        chosen_wpo_log_weight=pairs.chosen_wpo_log_weight * 0.9,
        rejected_wpo_log_weight=pairs.rejected_wpo_log_weight * 0.9,
    )
    unchanged = torch.allclose(evaluate(name, pairs, options), evaluate(name, longer, options), rtol=1e-9, atol=1e-12)
    assert unchanged == losses.traits(name, options).delta_only


FIELDS_OF = {
    "reference": ("ref_chosen_logps", "ref_rejected_logps"),
    "length": ("chosen_length", "rejected_length"),
    "rating_gap": ("rating_gap",),
    "tail": ("chosen_tail_logratios", "rejected_tail_logratios"),
    "wpo": ("chosen_wpo_log_weight", "rejected_wpo_log_weight"),
    "score": ("chosen_score", "rejected_score"),
}


@each_case
def test_needs_are_what_is_read(name, options):
    needs = losses.traits(name, options).needs
    given = {field for need in needs for field in FIELDS_OF[need]} | {"chosen_logps", "rejected_logps"}
    full = random_pairs()
    minimal = Pairs(**{field: value for field, value in full._asdict().items() if field in given})
    assert torch.equal(evaluate(name, minimal, options), evaluate(name, full, options))
    for field in given - {"chosen_logps", "rejected_logps"}:
        with pytest.raises(ValueError, match=rf"needs {field} \(.+\); got None\. Pass "):
            evaluate(name, minimal._replace(**{field: None}), options)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_attributes_are_the_traits_of_the_default_options(name):
    function = LOSSES[name]
    own = LossTraits(function.needs, function.separable, function.delta_only)
    assert own == function.traits() == losses.traits(name)


def test_traits_follow_the_options():
    length = frozenset({"reference", "length"})
    assert losses.traits("ipo") == LossTraits(length)
    assert losses.traits("ipo", {"length_normalize": False}) == LossTraits(REFERENCE, delta_only=True)
    assert losses.traits("wpo", {"base": "ipo"}) == LossTraits(length | {"wpo"})
    assert losses.traits("wpo", {"base": "ipo", "reference_free": True}) == LossTraits(frozenset({"length", "wpo"}))
    assert losses.traits("sigmoid", {"f_divergence": "js_divergence"}) == LossTraits(REFERENCE)
    assert losses.traits("sigmoid", {"reference_free": True, "beta": 0.5}) == LossTraits(delta_only=True)
    assert losses.traits(["sigmoid", "sft"]) == LossTraits(length)
    assert losses.traits(["ipo", "rdpo"], [{"length_normalize": False}, None]) == LossTraits(
        frozenset({"reference", "rating_gap"}), delta_only=True
    )
    assert not losses.traits(["sigmoid", "aot"]).separable


def test_a_vector_option_is_not_separable():
    # It would not be sliced along with the pairs.
    assert not losses.traits("kto", {"z0": vector(0, 0)}).separable
    assert losses.traits("kto", {"z0": torch.tensor(0.0)}).separable
    assert not losses.traits("bco_pair", {"delta": vector(0, 0)}).separable
    assert not losses.traits("modpo", {"weights": (0.5, 0.5), "margins": [vector(0, 0)]}).separable


# ---- reference-free and given log-ratios


@each_case_and_divergence
def test_reference_free_is_a_zero_reference(name, options):
    pairs = random_pairs()
    zero = torch.zeros_like(pairs.chosen_logps)
    without = pairs._replace(ref_chosen_logps=None, ref_rejected_logps=None)
    found = evaluate(name, without, {**options, "reference_free": True})
    expected = evaluate(name, pairs._replace(ref_chosen_logps=zero, ref_rejected_logps=zero), options)
    assert torch.equal(found, expected)
    assert torch.equal(evaluate(name, pairs, {**options, "reference_free": True}), expected)


def test_given_log_ratios_come_before_the_difference():
    pairs = golden_pairs()
    ratios = {"chosen_logratios": vector(1, 2, 3), "rejected_logratios": vector(0, 0, 0)}
    expected = torch.log1p(torch.exp(-0.1 * vector(1, 2, 3)))
    torch.testing.assert_close(losses.sigmoid(pairs._replace(**ratios)), expected)
    torch.testing.assert_close(losses.sigmoid(Pairs(*pairs[:2], **ratios)), expected)
    free = losses.sigmoid(pairs._replace(**ratios), reference_free=True)
    assert torch.equal(free, losses.sigmoid(pairs, reference_free=True))


# ---- beta_dpo


def test_beta_dpo_draws_pairs_near_the_mean():
    delta = vector(1, 1.2, 0.8, 500, 1.1)
    zero = torch.zeros_like(delta)
    pairs = Pairs(-zero, -delta, zero, zero)
    found = losses.beta_dpo(pairs, running_mean=1.0, running_std=0.5)
    beta_used = 0.1 * (1 + 0.6 * (1.025 - 1.0))
    expected = torch.log1p(torch.exp(-beta_used * delta))
    expected[3] = 0
    torch.testing.assert_close(found, expected)


def test_beta_dpo_is_reproducible_and_keeps_a_share():
    pairs = random_pairs(size=100)
    draws = [losses.beta_dpo(pairs, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert (draws[0] > 0).sum() == 80
    assert (losses.beta_dpo(pairs, keep=0.001) > 0).sum() == 1
    floor = losses.beta_dpo(pairs, keep=1.0, running_mean=1e6)
    torch.testing.assert_close(floor, losses.sigmoid(pairs, beta=1e-3))


def test_beta_dpo_draws_with_the_authors_weights():
    # One of two is kept: with probability w0 / (w0 + w1).
    pairs = Pairs(vector(0, -1.0), vector(0, 0), vector(0, 0), vector(0, 0))
    generator = torch.Generator().manual_seed(0)
    options = {"keep": 0.5, "running_mean": 0.0, "running_std": 1.0, "generator": generator}
    first = sum((losses.beta_dpo(pairs, **options)[0] > 0).item() for _ in range(2000)) / 2000
    assert first == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.04)


# ---- names, mixtures and the user's own losses


def test_unknown_names_list_the_nearest():
    message = (
        r"^loss must be a name in fastpref\.losses\.LOSSES or a callable, got 'rdop'; nearest names: 'rdpo', .+ "
        r"\(plain DPO is 'sigmoid'; sorted\(fastpref\.losses\.LOSSES\) shows all\)$"
    )
    with pytest.raises(ValueError, match=message):
        losses.get_loss("rdop")
    with pytest.raises(ValueError, match="got 'zzzzzz'; nearest names: none"):
        losses.get_loss("zzzzzz")
    with pytest.raises(ValueError, match=r"got \['sigmoid'\]"):
        losses.get_loss(["sigmoid"])
    assert losses.get_loss("rdpo") is losses.get_loss(losses.rdpo) is losses.rdpo


def test_a_mixture_is_the_weighted_sum():
    pairs = golden_pairs()
    found = losses.mixture(pairs, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], beta=0.3)
    expected = 0.8 * losses.sigmoid(pairs, beta=0.3) + 0.2 * losses.bco_pair(pairs, beta=0.3) + losses.sft(pairs)
    torch.testing.assert_close(found, expected)
    found = losses.mixture(pairs, ["rdpo", losses.hinge], options=[{"beta_rating": 2.0, "beta": 0.5}, None], beta=0.3)
    expected = losses.rdpo(pairs, beta=0.5, beta_rating=2.0) + losses.hinge(pairs, beta=0.3)
    torch.testing.assert_close(found, expected)


def test_bad_mixtures():
    pairs = golden_pairs()
    with pytest.raises(ValueError, match="losses must be a non-empty list of names or callables, got 'sigmoid'"):
        losses.mixture(pairs, "sigmoid")
    with pytest.raises(ValueError, match=r"losses must be a non-empty list of names or callables, got \[\]"):
        losses.mixture(pairs, [])
    with pytest.raises(ValueError, match=r"loss_weights must be a list with one entry per loss \(2\), got \[1.0\]"):
        losses.mixture(pairs, ["sigmoid", "sft"], [1.0])
    with pytest.raises(
        ValueError, match=r"loss_options must be a list with one entry per loss \(1\), got \{'beta': 1\}"
    ):
        losses.mixture(pairs, ["sigmoid"], options={"beta": 1})


def test_a_users_loss_works_wherever_a_name_does():
    @losses.pair_separable
    def squared(pairs, scale=1.0):
        return scale * (pairs.chosen_logratios - pairs.rejected_logratios) ** 2

    pairs = golden_pairs(chosen_wpo_log_weight=vector(0, 0, 0), rejected_wpo_log_weight=vector(0, 0, 0))
    delta = vector(1.5, -3, -1.1)
    torch.testing.assert_close(losses.pair_loss(pairs, squared, options={"scale": 2.0}), 2 * delta**2)
    torch.testing.assert_close(
        losses.mixture(pairs, [squared, "hinge"], [0.5, 1.0]), 0.5 * delta**2 + losses.hinge(pairs)
    )
    torch.testing.assert_close(losses.wpo(pairs, base=squared), delta**2)
    assert losses.traits(squared) == LossTraits(separable=True)
    assert losses.traits(["hinge", squared]) == LossTraits(REFERENCE, separable=True)


def test_an_unmarked_loss_is_batch_coupled_and_may_declare_its_needs():
    def rated(pairs):
        return pairs.rating_gap * pairs.chosen_logps

    assert losses.traits(rated) == LossTraits(separable=False)
    rated.needs = {"rating_gap"}
    assert losses.traits(rated).needs == {"rating_gap"}
    message = r"rated needs rating_gap \(one float per pair\); got None. Pass preference_loss\(..., rating_gap=...\)"
    with pytest.raises(ValueError, match=message):
        losses.pair_loss(golden_pairs(rating_gap=None), rated)


@pytest.mark.parametrize(
    ("result", "got"), [(torch.tensor(1.0), r"\[\]"), (torch.zeros(3, 1), r"\[3, 1\]"), (0.5, "float")]
)
def test_a_users_loss_of_another_shape_is_refused(result, got):
    def reduced(pairs):
        return result

    with pytest.raises(ValueError, match=rf"reduced must return one loss per pair, a tensor of shape \[3\], got {got}"):
        losses.pair_loss(golden_pairs(), reduced)


# ---- errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoid", {"beta": 0.0}, r"beta must be a positive number, got 0\.0"),
        ("sft", {"beta": -1}, "beta must be a positive number, got -1"),
        ("rdpo", {"beta": NAN}, "beta must be a positive number, got nan"),
        ("rdpo", {"beta": torch.tensor(0.1)}, r"beta must be a positive number, got tensor\(0\.1000\)"),
        ("rdpo", {"beta_rating": 0.0}, r"beta_rating must be a positive number, got 0\.0"),
        ("ripo", {"beta_rating": -2.0}, r"beta_rating must be a positive number, got -2\.0"),
        ("ml_rdpo", {"variance": 0}, "variance must be a positive number, got 0"),
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ("sigmoid", {"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 0\.5\), got -0\.1"),
        ("aot", {"label_smoothing": 0.7}, r"label_smoothing must be in \[0, 0\.5\), got 0\.7"),
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing must be in \(0, 0\.5\), got 0\.0"),
        ("discopop", {"tau": 0.0}, r"tau must be in \(0, 1\], got 0\.0"),
        ("ld_dpo", {"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1\.5"),
        ("dpo_shift", {"shift": 0.0}, r"shift must be in \(0, 1\], got 0\.0"),
        ("beta_dpo", {"keep": 0.0}, r"keep must be in \(0, 1\], got 0\.0"),
        ("wpo", {"max_weight": 0.0}, r"max_weight must be a positive number, got 0\.0"),
        ("wpo", {"base": "sigmod"}, "got 'sigmod'; nearest names: 'sigmoid'"),
        ("rpo", {"mode": "kl"}, "mode must be 'bwd', 'fwd' or 'sq', got 'kl'"),
        ("rpo", {"eta": -1.0}, r"eta must be a positive number, got -1\.0"),
        ("bco_pair", {"delta": "mean"}, "delta must be a number, a tensor or 'batch_mean', got 'mean'"),
        ("kto", {"z0": torch.zeros(3)}, r"z0 must have shape \[8\] to match chosen_logps, got \[3\]"),
        (
            "modpo",
            {"weights": (0.5,)},
            r"weights must be 1 \+ 1 numbers, one per margin after the first, got \(0\.5,\)",
        ),
        ("modpo", {"weights": (0.0, 1.0)}, r"weights\[0\] must be a positive number, got 0\.0"),
        ("modpo", {"margins": [torch.zeros(3)]}, r"margins must have shape \[8\] to match chosen_logps, got \[3\]"),
        ("rdpo", {"f_divergence": "forward_kl"}, "f_divergence must be 'reverse_kl' for rdpo, got 'forward_kl'"),
        (
            "hinge",
            {"f_divergence": "kl"},
            "f_divergence must be 'reverse_kl', 'forward_kl', 'js_divergence' or 'alpha_divergence', got 'kl'",
        ),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](random_pairs(), **options)


@pytest.mark.parametrize(("name", "option"), [("rdpo", "betarating"), ("hinge", "label_smoothing"), ("wpo", "bases")])
def test_unknown_options_are_type_errors(name, option):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{option}'"):
        LOSSES[name](random_pairs(), **{option: 0.1})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "rdpo",
            {"rating_gap": None},
            r"^rdpo needs rating_gap \(one float per pair\); got None\. "
            r"Pass preference_loss\(\.\.\., rating_gap=\.\.\.\)$",
        ),
        (
            "sigmoid",
            {"ref_rejected_logps": None},
            r"^sigmoid needs ref_rejected_logps \(summed reference log-probs\); got None\. "
            r"Pass preference_loss\(\.\.\., ref_logps=\.\.\.\)$",
        ),
        (
            "simpo",
            {"chosen_length": None},
            r"^simpo needs chosen_length \(scored tokens per completion\); got None\. "
            r"Pass losses\.Pairs\(\.\.\., chosen_length=\.\.\.\)$",
        ),
        ("sft", {"rating_gap": torch.zeros(2)}, r"^rating_gap must have shape \[3\] to match chosen_logps, got \[2\]$"),
        (
            "sft",
            {"rejected_logps": torch.zeros(3, 1)},
            r"^rejected_logps must have shape \[3\] to match chosen_logps, got",
        ),
        ("sft", {"rejected_logps": None}, r"^rejected_logps must be a tensor of shape \[3\], got NoneType$"),
        ("rdpo", {"rating_gap": [1.0, 2.0, 3.0]}, r"^rating_gap must be a tensor of shape \[3\], got list$"),
        ("sft", {"chosen_logps": torch.zeros(3, 4)}, r"^chosen_logps must be a tensor of shape \[B\], got \[3, 4\]$"),
        ("sft", {"chosen_logps": -1.0}, r"^chosen_logps must be a tensor of shape \[B\], got float$"),
    ],
)
def test_bad_pairs(name, fields, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](golden_pairs(**fields))


# ---- torch.compile


@pytest.mark.parametrize(
    "function",
    [
        losses.sigmoid,
        lambda pairs: losses.rdpo(pairs, beta_rating=2.0),
        losses.ml_rdpo,
        losses.ipo,
        losses.orpo,
        losses.aot,
        losses.kto,
        lambda pairs: losses.sppo_hard(pairs, f_divergence="alpha_divergence"),
        lambda pairs: losses.sigmoid(pairs, reference_free=True),
        lambda pairs: losses.wpo(pairs, base="mixdpo"),
        lambda pairs: losses.mixture(pairs, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
    ],
)
def test_compiles_without_a_graph_break(function):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    pairs = random_pairs()
    torch.testing.assert_close(values_and_gradients(compiled, pairs), values_and_gradients(function, pairs))


# ---- rating_scale


def test_rating_scale_suggests_what_it_says():
    gap = [3.0, -1.0, NAN, 8.0, 0.0, 2.0]
    scale = losses.rating_scale(gap, beta=0.2)
    assert scale.median == 2.5
    assert scale.std == pytest.approx(np.std([3, -1, 8, 0, 2]))
    assert scale.initial_offset == pytest.approx(0.2 / 0.3 * 2.5)
    rated = np.array([3.0, -1, 8, 2])
    offset = losses.rdpo.logistic(beta=0.2, beta_rating=scale.suggested_beta_rating).offset
    assert np.median(offset * np.abs(rated)) == pytest.approx(0.5)
    # At the start L = 0: the loss is ln 2 plus the square term, over the five rated pairs.
    zero = torch.zeros(6, dtype=torch.float64)
    start = losses.ml_rdpo(Pairs(zero, zero, zero, zero, rating_gap=vector(*gap)), variance=scale.suggested_variance)
    assert (start - math.log(2)).sum().item() / 5 == pytest.approx(0.5)


def test_rating_scale_of_logit_gaps():
    scale = losses.rating_scale([19.9], beta=0.1)
    assert scale.initial_offset == pytest.approx(6.6, abs=0.05)
    assert scale.suggested_beta_rating == pytest.approx(3.98)


def test_rating_scale_takes_arrays_lists_and_tensors():
    values = [[1, 2], [4, 9]]
    array = np.array(values, dtype=np.float32)
    array.flags.writeable = False
    tensor = torch.tensor(values)
    expected = losses.RatingScale(3.0, np.std([1, 2, 4, 9]), 0.6, 25.5, 1.0)
    for gap in (values, array, tensor, tensor.half().requires_grad_()):
        scale = losses.rating_scale(gap, 0.1)
        assert scale == pytest.approx(expected)
        assert all(type(number) is float for number in scale)


@pytest.mark.parametrize(
    ("gap", "beta", "message"),
    [
        ([], 0.1, "gap must hold at least one rating that is neither NaN nor 0, got 0 values: 0 NaN, 0 zero"),
        ([NAN, NAN], 0.1, "got 2 values: 2 NaN, 0 zero"),
        ([NAN, 0.0, 0.0], 0.1, "got 3 values: 1 NaN, 2 zero"),
        ([1.0, math.inf], 0.1, "gap must be finite or NaN, got 'an infinite value'"),
        ([1.0], 0.0, r"beta must be a positive number, got 0\.0"),
    ],
)
def test_rating_scale_refuses_what_has_no_scale(gap, beta, message):
    with pytest.raises(ValueError, match=message):
        losses.rating_scale(gap, beta)


def test_an_unknown_option_names_the_nearest():
    pairs = losses.Pairs(*torch.zeros(4, 2), rating_gap=torch.ones(2))
    expected = (
        r"rdpo\(\) got an unexpected keyword argument 'beta_rate'; nearest is 'beta_rating'; it has beta, beta_rating"
    )
    with pytest.raises(TypeError, match=expected):
        losses.pair_loss(pairs, "rdpo", options={"beta_rate": 0.3})
    with pytest.raises(TypeError, match=expected):
        losses.traits("rdpo", {"beta_rate": 0.3})
