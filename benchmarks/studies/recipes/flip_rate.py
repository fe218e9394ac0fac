"""What wrongly labelled pairs cost: 0 to 30 % of the labels flipped."""

from studies.recipes.task import Claim, draw_pool, evaluate, flipped, gain, logps, rng, train

TITLE = "Accuracy against the share of flipped labels"
RATES = (0.0, 0.1, 0.2, 0.3)
PROMPTS = 2048
SOURCE = "Chowdhury et al. 2024 (robust DPO)"


def points(better, worse):
    return lambda arms: 100 * (arms[f"accuracy {better}"] - arms[f"accuracy {worse}"])


CLAIMS = [
    *(
        Claim(
            f"{100 * rate:.0f} % of flipped labels cost accuracy on held-out pairs",
            "commonly held",
            points("sigmoid 0 %", f"sigmoid {100 * rate:.0f} %"),
            least=1.0,
            unit="points",
        )
        for rate in RATES[1:]
    ),
    Claim(
        "30 % of flipped labels: robust told the rate beats DPO in accuracy",
        SOURCE,
        points("robust 30 %", "sigmoid 30 %"),
        least=1.0,
        unit="points",
    ),
    Claim(
        "30 % of flipped labels: robust told the rate beats DPO in reward",
        SOURCE,
        gain("robust 30 %", "sigmoid 30 %"),
    ),
]


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
