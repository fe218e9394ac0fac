"""Compared pairs: collected from comparisons in both presentation orders, or from the scores of several judges."""

import warnings

import torch
from torch import Tensor

from fastpref import _checks
from fastpref.preference_matrix._refusals import NothingToClean, constant_columns, refuse_disagreement
from fastpref.preference_matrix._table import CHUNK, JudgeReport, Preferences, as_column, as_indices

DECISIVE, ONE_ORDER = 3.0, 0.1  # |z| of a judge's order effect; share of its pairs shown in one order


def from_comparisons(
    i, j, wins, *, votes=1.0, prompt=None, judge=None, num_items: int | None = None, num_prompts: int | None = None
) -> Preferences:
    """Collects comparisons; both presentation orders are balanced, and reported per judge before that.

    Args:
        i, j: [C] integers, the item shown first and the one shown second.
        wins: [C] how often i was preferred, out of `votes`: 0 to votes, ties 1/2, a judge's probability as it is. NaN:
            no comparison.
        votes: [C] or a number > 0.
        prompt, judge: [C] integers from 0; default 0. Pairs of different prompts are never mixed. There is room for
            all numbers up to the largest: np.unique(ids, return_inverse=True) makes small ones of others.
        num_items, num_prompts: default the largest index + 1.

    Returns:
        Preferences. For each judge and pair the win shares of the two orders count the same, so that an order effect
        cancels. Their mean is as certain as 4 n m / (n + m) votes, n and m those of the two orders: these are kept,
        n + m where n = m, less elsewhere (99 and 1: 3.96). The votes of the judges are then added. `judges` is a
        JudgeReport.

    Raises:
        TypeError, ValueError: naming the argument and the first wrong entry.

    Warns:
        RuntimeWarning: for judges that favour an order (|z| > 3) and saw more than 10 % of their pairs in one order.
    """
    i = as_indices("i", i, None)
    j = as_indices("j", j, i)
    prompt = as_indices("prompt", prompt if prompt is not None else torch.zeros_like(i), i)
    judge = as_indices("judge", judge if judge is not None else torch.zeros_like(i), i)
    if (own := i == j).any():
        at = int(own.nonzero()[0])
        raise ValueError(f"i and j must be different items, got {int(i[at])} against itself at {at}")
    items = _number_of("num_items", num_items, torch.cat([i, j]))
    prompts = _number_of("num_prompts", num_prompts, prompt)
    judges = int(judge.max()) + 1 if len(judge) else 0
    if prompts * items**2 * max(judges, 1) * 2 >= 2**63:
        raise ValueError(f"prompts * items^2 * judges must fit 62 bits, got {prompts} * {items}^2 * {judges}")
    votes = as_column("votes", votes, i)
    wins = as_column("wins", wins, i)
    there = ~wins.isnan()
    if (bad := there & ~((votes > 0) & votes.isfinite())).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"votes must be positive and finite, got {votes[at].item()} at {at}")
    if (bad := there & ~((wins >= 0) & (wins <= votes))).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"wins must lie between 0 and votes, got {wins[at].item()} of {votes[at].item()} at {at}")
    i, j, prompt, judge, wins, votes = (given[there] for given in (i, j, prompt, judge, wins, votes))

    first = i < j  # the lower item was shown first
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    key = ((prompt * items + low) * items + high) * max(judges, 1) + judge
    pairs, place = torch.unique(key, return_inverse=True)
    slot = place * 2 + (~first).long()
    lost = votes - wins
    won = wins.new_zeros(2 * len(pairs)).index_add_(0, slot, torch.where(first, wins, lost)).view(-1, 2)
    lost = wins.new_zeros(2 * len(pairs)).index_add_(0, slot, torch.where(first, lost, wins)).view(-1, 2)
    cast = won + lost
    share = won / cast  # P(lower item wins) when it is shown first, second; NaN: that order was not shown
    report = _judge_report(share, cast, pairs % max(judges, 1), judges)
    _warn_of_order(report)
    # the mean of two shares, of n and m votes, varies as the share of 4 n m / (n + m) votes does
    both = (cast > 0).all(1, keepdim=True)
    weight = torch.where(both, 2 * cast.flip(1) / cast.sum(1, keepdim=True), 1)

    pairs, place = torch.unique(pairs // max(judges, 1), return_inverse=True)
    wins_low = wins.new_zeros(len(pairs)).index_add_(0, place, (won * weight).sum(1))
    wins_high = wins.new_zeros(len(pairs)).index_add_(0, place, (lost * weight).sum(1))
    low, high = pairs // items % max(items, 1), pairs % max(items, 1)
    return Preferences(pairs // max(items, 1) ** 2, low, high, wins_low, wins_high, prompts, items, report)


def _number_of(name: str, given: int | None, index: Tensor) -> int:
    least = int(index.max()) + 1 if len(index) else 0
    if given is None:
        return least
    _checks.natural(name, given)
    if given < least:
        raise ValueError(f"{name} must be at least {least}, the largest index + 1, got {given}")
    return given


def _judge_report(share: Tensor, cast: Tensor, judge: Tensor, judges: int) -> JudgeReport:
    """share, cast: [pairs of a judge, 2 orders], of the lower item; judge: [pairs]."""

    def total(values):
        return values.new_zeros(judges).index_add_(0, judge, values)

    both = (~share.isnan()).all(1)
    shown_first, shown_second = share.nan_to_num(0.5).unbind(1)
    number = total(both.double())
    none = torch.where(number > 0, 1.0, torch.nan)
    opposite = both & ((shown_first - 0.5) * (shown_second - 0.5) < 0)
    gain = torch.where(both, (shown_first - shown_second) / 2, 0)  # of being shown first
    mean = total(gain) / number
    variance = (total(gain.square()) / number - mean.square()).clamp(min=0) / (number - 1)
    # ratio of "the first wins both" to "the second wins both": exp(2 effect), whatever the items are worth
    first_both = total(torch.where(both, shown_first * (1 - shown_second), 0)) + 0.5
    second_both = total(torch.where(both, (1 - shown_first) * shown_second, 0)) + 0.5
    z = torch.where(mean == 0, 0.0, mean / variance.sqrt())
    return JudgeReport(
        total(cast.sum(1)),
        torch.bincount(judge, minlength=judges),
        number.long(),
        total(opposite.double()) / number,
        mean,
        none * (first_both / second_both).log() / 2,
        torch.where(number > 1, z, torch.nan),
    )


def _warn_of_order(report: JudgeReport) -> None:
    single = 1 - report.both_orders / report.pairs.clamp(min=1)
    for judge in ((report.z.abs() > DECISIVE) & (single > ONE_ORDER)).nonzero().flatten().tolist():
        effect = float(report.order_effect[judge])
        warnings.warn(
            f"judge {judge} favours the item shown {'first' if effect > 0 else 'second'} by {abs(effect):.2f} logits "
            f"(z = {float(report.z[judge]):.1f}), and {100 * float(single[judge]):.0f} % of its pairs were shown in "
            "one order only, where that cannot be balanced: show them in the other order too",
            RuntimeWarning,
            stacklevel=3,
        )


def from_scores(scores, *, temperature: float | None = None) -> Preferences:
    """Compares all items of a prompt by the scores several judges gave them.

    Args:
        scores: [N, J] or [prompts, N, J], one column per judge; NaN: not scored. Judges may have different scales.
        temperature: None: each judge casts one vote per pair, for the higher score, half each where they are equal.
            Otherwise the scale of the scores: a vote is sigmoid((s_i - s_j) / temperature), which keeps how much better
            an item is.

    Returns:
        Preferences: all pairs that some judge scored both items of.

    Raises:
        NothingToClean (a ValueError): for one score column, whose every preference matrix is w_i - w_j under some link,
            and where the judges agree no more than chance would have them (items that are exchangeable) and would have
            been seen to.
        TypeError, ValueError: for other types and shapes, and infinite entries.

    Warns:
        RuntimeWarning: where too few items are scored to tell agreement from chance.
    """
    scores = _checks.real("scores", scores)
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores must have shape [N, J] or [prompts, N, J], got {list(scores.shape)}")
    _checks.finite_or_nan("scores", scores)
    if temperature is not None:
        _checks.positive("temperature", temperature)
    scores = scores.detach().double()
    scores = scores.unsqueeze(0) if scores.dim() == 2 else scores
    prompts, items, judges = scores.shape
    varied = ~constant_columns(scores.flatten(0, 1)) & ~scores.isnan().flatten(0, 1).all(0)
    if int(varied.sum()) < 2:
        raise NothingToClean(
            f"scores has {int(varied.sum())} score column(s) that vary of {judges}: any preference matrix of one "
            "column is w_i - w_j under its link, with nothing in it to contradict an entry; take the column itself"
        )
    refuse_disagreement(scores)
    i, j = torch.triu_indices(items, items, 1, device=scores.device)
    found = []
    step = max(1, CHUNK // max(len(i) * judges, 1))
    for begin in range(0, prompts, step):
        part = scores[begin : begin + step]
        difference = part[:, i] - part[:, j]  # [step, pairs, J]
        if temperature is None:
            vote = torch.where(difference == 0, 0.5, (difference > 0).double())
        else:
            vote = torch.sigmoid(difference / temperature)
        seen = ~difference.isnan()
        wins, votes = torch.where(seen, vote, 0).sum(-1), seen.sum(-1)
        where, pair = (votes > 0).nonzero(as_tuple=True)
        won = wins[where, pair]
        found.append((where + begin, i[pair], j[pair], won, votes[where, pair] - won))
    return Preferences(*(torch.cat(parts) for parts in zip(*found, strict=True)), prompts, items)
