"""What wrongly labelled pairs cost: 0 to 30 % of the labels flipped."""

from task import Claim, Outcome, draw_pool, evaluate, flipped, logps, rng, train

TITLE = "Accuracy against the share of flipped labels"
RATES = (0.0, 0.1, 0.2, 0.3)
PROMPTS = 2048
SOURCE = "Chowdhury et al. 2024 (robust DPO)"


def lost(rate, arm="sigmoid") -> Claim:
    return Claim(
        f"{100 * rate:.0f} % of flipped labels cost accuracy on held-out pairs",
        "commonly held",
        lambda arms: 100 * (arms["accuracy sigmoid 0 %"] - arms[f"accuracy sigmoid {100 * rate:.0f} %"]),
        least=1.0,
        unit="points",
    )


CLAIMS = [
    *(lost(rate) for rate in RATES[1:]),
    *(
        Claim(
            f"30 % of flipped labels: {loss} told the rate beats DPO in {what}",
            SOURCE,
            lambda arms, loss=loss, key=key, factor=factor: (
                factor * (_number(arms[f"{key}{loss} 30 %"]) - _number(arms[f"{key}sigmoid 30 %"]))
            ),
            least=least,
            unit=unit,
        )
        for loss in ("robust",)
        for what, key, factor, least, unit in (
            ("accuracy", "accuracy ", 100, 1.0, "points"),
            ("reward", "", 1, 0.1, "σ"),
        )
    ),
]


def _number(value) -> float:
    return value.mean if isinstance(value, Outcome) else value


def arms(setting) -> dict:
    pool = draw_pool(setting, setting.size.scaled(PROMPTS), 2)
    held_out = draw_pool(setting, setting.size.scaled(PROMPTS), 2, "held-out pairs")
    first = pool.reward[:, 0] > pool.reward[:, 1]
    found = {}
    for rate in RATES:
        label = flipped(first, rate, rng(setting.seed, "flips"))  # the pairs flipped at 10 % are among those at 20 %
        pairs = pool.pairs((~label).astype(int), label.astype(int))
        for loss in ("sigmoid", "robust") if rate == RATES[-1] else ("sigmoid",):
            options = {"label_smoothing": rate} if loss == "robust" else None
            policy = train(setting, pairs, loss=loss, options=options)
            name = f"{loss} {100 * rate:.0f} %"
            found[name] = evaluate(setting, policy)
            found[f"accuracy {name}"] = accuracy(setting, policy, held_out)
    return found


def accuracy(setting, policy, pool) -> float:
    """Share of pairs of two responses whose implicit rewards are ordered like the true ones."""
    margins = [
        logps(policy, pool.prompts, pool.responses[:, side])
        - logps(setting.reference, pool.prompts, pool.responses[:, side])
        for side in (0, 1)
    ]
    implicit = (margins[0] - margins[1]).numpy()
    true = pool.reward[:, 0] - pool.reward[:, 1]
    return float(((implicit > 0) == (true > 0))[true != 0].mean())
