"""Stage route: pairs of small margin go to SFT; and the order from easy to hard."""

from dataclasses import dataclass, replace

import numpy as np

from fastpref.curate import routing
from fastpref.curate.pipeline.options import Options
from fastpref.curate.pipeline.state import State
from fastpref.errors import InputError


@dataclass(frozen=True)
class RouteOptions(Options):
    """tau: "none", a number, "quantile:<share>", or "auto": 0.5 for scores declared as 1 to 10, else quantile:0.12."""

    tau: float | str = "none"
    inclusive: bool = False


def route_pairs(state: State, config) -> State:
    tau, kept = config.route.tau, np.flatnonzero(state.kept)
    if tau == "auto":
        tau = routing.JUDGE_TAU if config.read.score_range == (1.0, 10.0) else routing.DEFAULT_TAU
    margin = state.margins()[kept]
    if tau != "none" and len(margin) and np.isnan(margin).all():
        raise InputError("route.tau goes by margins, and the pairs have neither scores nor a published strength")
    pairs = dict(state.pairs)
    pairs["easy_to_hard"] = np.full(len(pairs["prompt"]), -1)
    pairs["easy_to_hard"][kept[routing.easy_to_hard(margin)]] = np.arange(len(kept))
    if tau == "none":
        return replace(state, pairs=pairs).skipped("route", "not asked for")
    found = routing.route_by_margin(margin, tau, inclusive=config.route.inclusive)
    pairs["route"] = pairs["route"].copy()
    pairs["route"][kept] = found.route
    sent = int((found.route == routing.Route.SFT).sum())
    summary = {"tau": found.tau, "inclusive": found.inclusive, "asked": tau, "sft": sent, "share_sft": found.share_sft}
    return replace(state, pairs=pairs).with_summary("route", summary)
