"""Turns the demo's measurements into estimates with intervals, and those into one screen of text."""

import math

import numpy as np

BOOTSTRAP_DRAWS = 1000
COLUMNS = 100


# ---- estimates


def accuracy(margins, generator) -> dict:
    """Returns the share of margins > 0; a tie counts half. margins: [seeds, pairs].

    The 95 % interval is the wider of Wilson's over the pairs and a bootstrap over pairs and seeds. The first stays wide
    for few pairs that all agree, the second covers seeds that disagree.
    """
    wins = (margins > 0) + 0.5 * (margins == 0)
    if not margins.size:
        return estimate(None, None, margins)
    draws = bootstrap(lambda seeds, pairs: wins[np.ix_(seeds, pairs)].mean(), margins.shape, generator)
    low, high = wilson(wins.mean(), margins.shape[1])
    interval = [min(low, np.quantile(draws, 0.025)), max(high, np.quantile(draws, 0.975))]
    return estimate(wins.mean(), interval, margins) | {"ties": int((margins == 0).sum())}


def spearman(margins, gap, generator) -> dict:
    """Returns the rank correlation of margins [seeds, pairs] with gap [pairs], mean over seeds, bootstrap interval."""

    def mean_correlation(seeds, pairs):
        return np.mean([rank_correlation(margins[seed, pairs], gap[pairs]) for seed in seeds])

    value = mean_correlation(range(len(margins)), np.arange(len(gap)))
    if math.isnan(value):
        return estimate(None, None, margins)
    draws = bootstrap(mean_correlation, margins.shape, generator)
    return estimate(value, np.nanquantile(draws, [0.025, 0.975]), margins)


def estimate(value, interval, margins) -> dict:
    """value and interval are None (null in JSON) where there is nothing to estimate from."""
    seeds, pairs = margins.shape
    if value is not None:
        value, interval = float(value), [float(bound) for bound in interval]
    return {"value": value, "interval": interval, "n": pairs, "seeds": seeds}


def bootstrap(statistic, shape, generator) -> np.ndarray:
    """Returns [BOOTSTRAP_DRAWS] values of statistic(seeds, pairs), both drawn with replacement."""
    seeds, pairs = shape
    return np.array(
        [
            statistic(generator.integers(seeds, size=seeds), generator.integers(pairs, size=pairs))
            for _ in range(BOOTSTRAP_DRAWS)
        ]
    )


def wilson(share, n) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a proportion."""
    z = 1.959964  # 97.5 % point of the normal
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def rank_correlation(x, y) -> float:
    """Returns Spearman's rank correlation, ties at their average rank; NaN where one side is constant."""
    x, y = average_ranks(x), average_ranks(y)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / size) if size else math.nan


def average_ranks(values) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def verdict(trained, other) -> str:
    """Compares two estimates; intervals that overlap count as no difference."""
    if trained["value"] is None or other["value"] is None:
        return "no data"
    if trained["interval"][0] > other["interval"][1]:
        return "trained is better"
    if trained["interval"][1] < other["interval"][0]:
        return "trained is worse"
    return "no difference"


# ---- the screen


def screen(results) -> str:
    """Returns two blocks of text, at most 24 lines of at most 100 columns."""
    blocks = [heading(results), training_block(results["training"]), cost_block(results["cost"])]
    return "\n\n".join("\n".join(line[:COLUMNS] for line in block) for block in blocks)


def heading(results) -> list[str]:
    data, pairs, versions = results["data"], results["pairs"], results["versions"]
    read = f" of {data['prompts_read']}" if data["prompts"] < data["prompts_read"] else ""
    clamped = f", {pairs['clamped_scores']} of exactly 0 or 1 clamped" if pairs["clamped_scores"] else ""
    dropped = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in pairs["dropped"].items()) or "none"
    return [
        f"fastpref {versions['fastpref']}, torch {versions['torch']}, {count(results['threads'], 'CPU thread')}, "
        f"{results['seconds']:.0f} s in all",
        f"Data    {shorten_path(data['source'], 30)}: {data['prompts']}{read} prompts, {data['responses']} responses, "
        f"{count(data['malformed_rows'], 'malformed row')}",
        f"        {pairs['cut_share']:.0%} of the responses cut at {pairs['max_tokens']} tokens; "
        f"{pairs['score_scale']} scores{clamped}",
        f"Pairs   {pairs['train']} to train on, {pairs['held_out']} held out; prompts without a pair: {dropped}",
        f"        chosen = max, rejected nearest to mean - 2 std; that lies below the pool's minimum in "
        f"{pairs['target_below_min']:.0%}",
        f"        rejected is the minimum in {pairs['rejected_is_min']:.0%}; one text is the chosen one "
        f"{count(pairs['most_frequent_chosen'], 'time')}",
    ]


def training_block(training) -> list[str]:
    trained, matched = training["held_out_accuracy"], training["length_matched_accuracy"]
    longest, longest_matched = training["longest_wins"], training["length_matched_longest_wins"]
    untouched = training["untouched_model"]
    return [
        f"Training: RDPO, {training['steps']} steps of {training['pairs_per_step']} pairs, beta {training['beta']:g}, "
        f"beta_rating {training['beta_rating']:.3g} (suggested)",
        f"{'':<30}{'value':>6}  {'95 % interval':<16}{'N':>5} {'seeds':>6}   trained against it",
        row("held-out accuracy", trained),
        row("  longest wins", longest, verdict(trained, longest)),
        row("  untouched model, log-prob", untouched, verdict(trained, untouched)),
        row("length-matched accuracy", matched),
        row("  longest wins", longest_matched, verdict(matched, longest_matched)),
        row("Spearman(margin, rating gap)", training["spearman_margin_gap"]),
        "intervals: bootstrap over pairs and seeds, Wilson's where wider; overlapping ones: no difference",
    ]


def row(name, estimate, remark="") -> str:
    if estimate["value"] is None:
        numbers = f"{'-':>6}  {'-':<16}"
    else:
        low, high = estimate["interval"]
        numbers = f"{estimate['value']:>6.3f}  {f'[{low:.3f}, {high:.3f}]':<16}"
    return f"{name:<30}{numbers}{estimate['n']:>5} {estimate['seeds']:>6}   {remark}".rstrip()


def cost_block(cost) -> list[str]:
    """Compares plain PyTorch, fastpref from logits and from hidden states; ratios and differences are to the first."""
    plain, methods = cost["plain"], {"": cost["fastpref"], "linear_": cost["linear"]}
    times, peaks, margins, differences = [], [], [], []
    for prefix, own in methods.items():
        low, high = cost[f"{prefix}step_time_ratio_range"]
        ratio = f"ratio {cost[f'{prefix}step_time_ratio']:.2f} ({low:.2f}-{high:.2f})"
        times.append(f"{own['step_seconds'] * 1e3:>8.0f} {ratio}")
        if None not in (plain["peak_mb"], own["peak_mb"]):
            peaks.append(f"{own['peak_mb']:>8.0f} ratio {own['peak_mb'] / plain['peak_mb']:.2f}")
        margins.append(f"{own['margin_error']:>8.1e}")
        apart, gradient_apart = cost[f"{prefix}loss_difference"], cost[f"{prefix}gradient_difference"]
        differences.append(f"{apart:>8.1e}, gradient {gradient_apart:.1e}")
    equal = "equal" if cost["losses_equal"] else "NOT EQUAL"
    return [
        f"Cost: {cost['steps']} identical steps, logits [{cost['sequences']}, up to {cost['tokens']}, "
        f"{cost['vocabulary']}] = hidden [.., {cost['width']}] x head, fp32",
        cost_row("", "plain PyTorch", ["   fastpref, logits", "   fastpref, hidden"]),
        cost_row("step time, ms", f"{plain['step_seconds'] * 1e3:.0f}", times),
        cost_row("peak memory, MB", f"{plain['peak_mb']:.0f}", peaks)
        if len(peaks) == len(methods)
        else f"{'peak memory, MB':<25}this system does not tell",
        cost_row("largest margin error", f"{plain['margin_error']:.1e}", margins),
        cost_row(f"losses {equal} to {cost['loss_tolerance']:g}", "", differences),
        "differences are relative to plain PyTorch, margin errors against float64 from the hidden states on",
    ]


def cost_row(name, plain, cells) -> str:
    return f"{name:<25}{plain:>13}{''.join(f'{cell:<31}' for cell in cells)}".rstrip()


def count(number, thing) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def shorten_path(text, width) -> str:
    """Cuts a long path at its start: its end says which file it is."""
    return text if len(text) <= width else "..." + text[3 - width :]
