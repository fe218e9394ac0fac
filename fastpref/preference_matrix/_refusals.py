"""Data without structure, in which nothing could tell what is wrong from what is right: the tests that refuse it.

Each compares a statistic with what chance would give, and refuses (NothingToClean) where the usual structure would have
shown: votes with coin tosses, judges with Friedman's test, sources with rows that are shuffled.
"""

import warnings

import torch
from torch import Tensor

from fastpref.preference_matrix._table import Preferences

CHANCE, VISIBLE = 2.0, 4.0  # z against chance below which is noise, where what is usual would have had the second
USUAL_SPREAD = 0.5  # standard deviation of scores, in logits
USUAL_AGREEMENT = 0.3  # of judges: correlation of the ranks they give
SHUFFLES, SHUFFLED_Z = 20, 3.0  # of exchangeable columns, and how far others must be from those


class NothingToClean(ValueError):
    """The data has no structure that could tell what is wrong from what is right; the message says why."""


def refuse_coin_tosses(table: Preferences) -> None:
    """Whole votes of all prompts against coin tosses: the balances of the items, and of pairs with several votes."""
    votes = table.wins_i + table.wins_j
    if not ((2 * table.wins_i) % 1 == 0).all() or not (votes % 1 == 0).all():
        return  # graded votes vary less than coins
    nodes = table.num_prompts * table.num_items
    balance, cast = votes.new_zeros(nodes), votes.new_zeros(nodes)
    for item, sign in ((table.i, 1), (table.j, -1)):
        node = table.prompt * table.num_items + item
        balance.index_add_(0, node, sign * (table.wins_i - table.wins_j))
        cast.index_add_(0, node, votes)
    compared = cast > 0
    items = int(compared.sum())
    if not items:
        return
    by_items = float(((balance.square() / cast)[compared].sum() - items) / (2 * items) ** 0.5)
    spare = float((2 * (1 - 1 / votes)).sum())
    by_pairs = float(((table.wins_i - table.wins_j).square() / votes).sum() - len(votes)) / max(spare, 1e-300) ** 0.5
    if by_items >= CHANCE or (spare and by_pairs >= CHANCE):
        return
    found = f"its votes do not differ from coin tosses (z = {by_items:.1f} over the items"
    found += f", {by_pairs:.1f} over the pairs" * (spare > 0) + f"; {CHANCE:g} needed)"
    # a balance of c votes varies by c + c^2 w^2 / 4, w the logits between an item and those it meets
    usual = USUAL_SPREAD**2 / 4 * float(cast.sum()) / (2 * items) ** 0.5
    if usual >= VISIBLE:
        raise NothingToClean(
            f"preferences has nothing to clean: {found}. The items are exchangeable, or the judges guess"
        )
    warnings.warn(
        f"preferences may have nothing to clean: {found}, but are too few to tell: scores with a standard deviation of "
        f"{USUAL_SPREAD:g} would give z = {usual:.1f}. Collect more votes",
        RuntimeWarning,
        stacklevel=3,
    )


def refuse_disagreement(scores: Tensor) -> None:
    """Friedman's test, all prompts pooled: do the judges rank the items alike, or items alike over the judges?"""
    prompts, items, judges = scores.shape
    ranks = standard_ranks(scores.mT.reshape(prompts * judges, items)).view(prompts, judges, items)
    present = (ranks != 0).any(-1).sum(1)  # [prompts], judges that tell items apart
    usable = present > 1
    degrees = (~scores.isnan()).any(-1).sum(1) - 1
    chi2 = ranks.sum(1).square().sum(-1) / present.clamp(min=1) * degrees / (degrees + 1).clamp(min=1)
    total, freedom = chi2[usable].sum(), degrees[usable].sum()
    variance = (2 * degrees * (present - 1) / present.clamp(min=1))[usable].sum()
    if not variance:
        return
    z = float((total - freedom) / variance.sqrt())
    if z >= CHANCE:
        return
    found = f"its columns agree about them no more than chance would (Friedman's test: z = {z:.1f}, {CHANCE:g} needed)"
    usual = USUAL_AGREEMENT * float((degrees * (present - 1))[usable].sum() / variance.sqrt())
    if usual >= VISIBLE:
        raise NothingToClean(
            f"scores has exchangeable items: {found}, so that their preferences are noise. Samples of one policy have "
            "no common order across prompts; compare them within a prompt"
        )
    warnings.warn(
        f"scores may have exchangeable items: {found}, but are too few to tell: ranks that correlate by "
        f"{USUAL_AGREEMENT:g} would give z = {usual:.1f}. Score more items",
        RuntimeWarning,
        stacklevel=3,
    )


def refuse_exchangeable(x: Tensor, seed: int) -> None:
    """Raises NothingToClean when permuting the entries within each row would make no difference.

    Two statistics of the rows' standardised ranks are compared with their values after such permutations: the column
    means' spread, and the columns' correlations. At most 1024 rows and 256 columns are looked at.
    """
    generator = torch.Generator().manual_seed(seed)

    def sample(size, most):
        chosen = torch.randperm(size, generator=generator)[:most] if size > most else torch.arange(size)
        return chosen.to(x.device)

    x = x[sample(x.shape[0], 1024)][:, sample(x.shape[1], 256)]
    seen = ~x.isnan()
    ranks = standard_ranks(x)

    def statistics(values):
        spread = (values.sum(0) / seen.sum(0).clamp(min=1).sqrt()).square().sum()
        gram = values.mT @ values
        return torch.stack([spread, gram.square().sum() - gram.diagonal().square().sum()])

    found = statistics(ranks)
    null = []
    for _ in range(SHUFFLES):
        keys = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        source = torch.where(seen, keys, 2.0).argsort(1)  # observed entries in random order, then the missing ones
        target = (~seen).to(torch.uint8).argsort(dim=1, stable=True)
        null.append(statistics(torch.zeros_like(ranks).scatter(1, target, ranks.gather(1, source))))
    null = torch.stack(null)
    z = (found - null.mean(0)) / null.std(0).clamp(min=1e-12)
    if not (z > SHUFFLED_Z).any():
        raise NothingToClean(
            "scores has exchangeable sources: shuffling the entries of every row changes neither the means of the "
            f"columns nor their correlations (z = {z[0]:.1f} and {z[1]:.1f} against shuffled rows, {SHUFFLED_Z:g} "
            "needed). Columns must be fixed identities, such as models; several samples of one policy are not"
        )


def constant_columns(x: Tensor) -> Tensor:
    """[m, n] -> [n] bool: all observed entries equal, to rounding; at least two of them."""
    seen = ~x.isnan()
    high = x.nan_to_num(nan=-torch.inf).amax(0) if len(x) else x.new_zeros(x.shape[1])
    low = x.nan_to_num(nan=torch.inf).amin(0) if len(x) else high
    return (high - low <= 1e-12 * torch.maximum(high.abs(), low.abs())) & (seen.sum(0) > 1)


def standard_ranks(x: Tensor) -> Tensor:
    """Ranks within each row (ties in arbitrary order shared evenly), mean 0 and mean square 1, missing entries 0."""
    seen = ~x.isnan()
    count = seen.sum(1, keepdim=True).clamp(min=1)
    wide = torch.where(seen, x, torch.inf).contiguous()
    ordered = wide.sort(1).values.contiguous()
    first = torch.searchsorted(ordered, wide).double()
    last = torch.searchsorted(ordered, wide, right=True).double()
    rank = torch.where(seen, (first + torch.minimum(last, count.double())) / 2, 0)
    rank = torch.where(seen, rank - rank.sum(1, keepdim=True) / count, 0)
    size = (rank.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(size > 0, rank / size.clamp(min=1e-300), 0)
