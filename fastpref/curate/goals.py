"""Goal-conditioned preference data: every pair twice, once for the score of each of its responses.

Zhang et al., "Reward-Augmented Data Enhances Direct Preference Alignment of LLMs", ICML 2025, arXiv 2410.08067. With a
goal g in the prompt the reward of a response is R = -(g - r)^2. So the pair (y_w, y_l) with scores (r_w, r_l) is also a
pair for the goal r_l, with the responses swapped: a good rejected response is not only suppressed, and a poor chosen
one not only imitated. Training is plain DPO, the reference model sees the same prompts, and at inference the goal is
the best score.

First the arrays (`goal_records`: which pair, which goal, swapped or not), then the texts (`goal_rewrite`).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fastpref.curate.files.table import Coded
from fastpref.curate.margins import as_vector
from fastpref.curate.notices import DataWarning

ON_TIE = ("positive", "drop")


def goal_records(pairs, *, attributes=None, half=False, on_tie="positive", seed=0) -> dict[str, np.ndarray]:
    """Two records per pair: the goal r_w as labelled, and the goal r_l with chosen and rejected swapped. Shuffled.

    pairs: name -> [pairs] array; `chosen`, `rejected` and their scores are needed, everything else comes along, text
        or a number alone as it is. Where a name has the word "chosen" and its twin with "rejected" is there too
        (`score_*`, `z_*`, `len_*`, ...), both are swapped. Numbers of one side alone, whose name ends in it
        (`rank_rejected`), are not known of the other response: -1 where swapped, NaN if they are floats. Other columns
        stay those of the pair as it was.
    attributes: None: the score is `score_chosen`/`score_rejected`, the goal a column `goal`. Names: the scores are
        `score_chosen_<name>`/`score_rejected_<name>`, one goal column `goal_<name>` each, and R is the negative squared
        distance of the attribute vectors.
    half: as many records as there are pairs, drawn at random from all.
    on_tie: the two records of a pair with equal scores contradict each other (one goal, both orders). "positive" keeps
        the one as labelled, "drop" neither.
    seed: of the shuffle and of `half`.

    Returns the columns, [records], with the goals and two more: `pair` int64, index into the input, and
    `goal_swapped` bool. Pairs without a finite score are left out, with a warning. Raises ValueError for missing
    columns, columns that the result would overwrite, different lengths, another on_tie.
    """
    if on_tie not in ON_TIE:
        raise ValueError(f"on_tie must be one of {ON_TIE}, got {on_tie!r}")
    columns = _columns(pairs)
    suffixes = {"": "goal"} if attributes is None else {f"_{name}": f"goal_{name}" for name in _names(attributes)}
    if taken := [name for name in (*suffixes.values(), "pair", "goal_swapped") if name in pairs]:
        raise ValueError(f"pairs must not have the columns that goals add, got {taken}")
    needed = ["chosen", "rejected", *(f"score_{side}{end}" for side in ("chosen", "rejected") for end in suffixes)]
    if absent := [name for name in needed if name not in columns]:
        raise ValueError(f"pairs must have the columns {absent}, got {list(columns)}")
    score_chosen, score_rejected = (
        np.stack([as_vector(f"score_{side}{end}", columns[f"score_{side}{end}"]) for end in suffixes], axis=1)
        for side in ("chosen", "rejected")
    )  # [pairs, goals]

    scored = np.isfinite(score_chosen).all(axis=1) & np.isfinite(score_rejected).all(axis=1)
    if left_out := int(np.count_nonzero(~scored)):
        text = f"{left_out} of {len(scored)} pairs have no finite score and no goal; they are left out"
        warnings.warn(DataWarning("goals-left-out", text), stacklevel=2)
    tied = (score_chosen == score_rejected).all(axis=1)
    positive = np.flatnonzero(scored & ~tied if on_tie == "drop" else scored)
    negative = np.flatnonzero(scored & ~tied)
    pair = np.concatenate([positive, negative])
    swapped = np.arange(len(pair)) >= len(positive)

    order = np.random.default_rng(seed).permutation(len(pair))
    if half:
        order = order[: np.count_nonzero(scored)]
    pair, swapped = pair[order], swapped[order]
    records = dict(pairs) | {name: _swap(columns, name, pair, swapped) for name in columns}
    goals = np.where(swapped[:, None], score_rejected[pair], score_chosen[pair])
    return records | dict(zip(suffixes.values(), goals.T, strict=True)) | {"pair": pair, "goal_swapped": swapped}


def goal_reward(scores, goal) -> np.ndarray:
    """R = -(goal - score)^2, summed over the last axis where both are [..., attributes] vectors ([records, 1] for one).

    scores, goal: broadcast against each other. This is what a goal-conditioned pair prefers by.
    """
    distance = np.asarray(goal, dtype=np.float64) - np.asarray(scores, dtype=np.float64)
    return -(distance**2).sum(axis=-1)


def rescale_scores(scores, source_range=None, target_range=(1, 10)) -> np.ndarray:
    """Scores moved linearly from one range to another, float64; NaN stays NaN.

    scores: numbers of any shape. source_range: (lowest, highest) possible score; None: those of the finite scores,
    which depend on the data at hand. target_range: what the template then states as the scale.

    Raises ValueError for an empty range and for scores outside source_range.
    """
    scores = np.asarray(scores, dtype=np.float64)
    finite = scores[np.isfinite(scores)]
    if source_range is None:
        if not finite.size:
            return scores.copy()
        source_range = finite.min(), finite.max()
    low, high = _range("source_range", source_range)
    target_low, target_high = _range("target_range", target_range)
    if outside := np.count_nonzero((scores < low) | (scores > high)):
        raise ValueError(
            f"scores must lie in source_range [{low:g}, {high:g}], got {outside} outside it, from "
            f"{np.nanmin(scores):g} to {np.nanmax(scores):g}"
        )
    share = (scores - low) / (high - low)
    return np.clip(target_low * (1 - share) + target_high * share, target_low, target_high)  # exact at both ends


def goal_text(goals, score_range=(1, 10)) -> str:
    """The system prompt with the goals: name -> number, the name of a single score being "Overall".

    The wording is that of the paper's data, which states the scale: score_range is its (lowest, highest). Whole numbers
    are printed without decimals, others with six significant digits.

    Raises ValueError for a goal that is not on this scale: see `rescale_scores`.
    """
    if not isinstance(goals, Mapping):
        goals = {"Overall": goals}
    bounds = _range("score_range", score_range)
    for name, goal in goals.items():
        if not bounds[0] <= goal <= bounds[1]:
            raise ValueError(f"goals must lie in score_range [{bounds[0]:g}, {bounds[1]:g}], got {goal} for {name!r}")
    low, high = map(_number, bounds)
    lines = [f"{name} score: {_number(goal)}." for name, goal in goals.items()]
    return (
        "You are an assistant that generates responses for the instruction while implicitly achieving the following "
        f"target scores (on a scale of {low}-{high}, where {low} is lowest and {high} is highest):\n" + "\n".join(lines)
    )


def add_goal(prompt, text, *, system_role=True):
    """The prompt with the goal's text: a string or a list of messages, as it came in.

    A list gets a system message in front, or the text before that of the one it has. Without a system role in the chat
    template (Mistral, Gemma) the text and a blank line go before the first user turn; a string has no roles, so there
    they go before the whole. The prompt itself is not changed.

    Raises ValueError for a list without a user turn, TypeError for other types.
    """
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
        raise TypeError(f"prompt must be a string or a list of messages, got {type(prompt).__name__}")
    messages = [dict(message) for message in prompt]
    if system_role and (not messages or messages[0].get("role") != "system"):
        return [{"role": "system", "content": text}, *messages]
    role = "system" if system_role else "user"
    first = next((message for message in messages if message.get("role") == role), None)
    if first is None:
        raise ValueError(f"prompt must have a user turn to put the goal into, got {len(messages)} messages")
    content = first["content"]
    if isinstance(content, str):
        first["content"] = f"{text}\n\n{content}"
    else:  # parts, one of which may be an image
        first["content"] = [{"type": "text", "text": f"{text}\n\n"}, *content]
    return messages


def goal_rewrite(*, attributes=None, score_range=(1, 10), system_role=True) -> Callable[[dict], list[dict]]:
    """A function row -> [row] that puts the row's goal into its prompt; for `write_pairs(..., rewrite=...)`.

    A row has `prompt` (string or messages) and the goal columns of `goal_records`, of the same `attributes`. With
    attributes the lines are "<Name> score: <goal>.", underscores of the name as spaces.
    """
    if attributes is None:
        lines = {"goal": "Overall"}
    else:
        lines = {f"goal_{name}": name.replace("_", " ").capitalize() for name in _names(attributes)}

    def rewrite(row):
        text = goal_text({line: row[column] for column, line in lines.items()}, score_range)
        return [row | {"prompt": add_goal(row["prompt"], text, system_role=system_role)}]

    return rewrite


# ---- columns


def _columns(pairs) -> dict[str, np.ndarray]:
    if not isinstance(pairs, Mapping):
        raise TypeError(f"pairs must map names to arrays, got {type(pairs).__name__}")
    columns = {name: _column(column) for name, column in pairs.items() if not np.isscalar(column)}
    columns = {name: column for name, column in columns.items() if column.ndim}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"pairs must hold arrays of one length, got {lengths}")
    return columns


def _column(column) -> np.ndarray:
    if isinstance(column, Coded):
        return np.array([*column.names, None], object)[column.codes]
    if isinstance(column, list | tuple) and any(isinstance(entry, list | tuple | Mapping) for entry in column):
        return np.fromiter(column, object, len(column))  # messages: lists of any length
    return np.asarray(column)


def _swap(columns, name, pair, swapped) -> np.ndarray:
    """[records] of one column, from its twin where the record is swapped."""
    column, twin = columns[name][pair], columns.get(_twin(name))
    where = swapped.reshape(-1, *[1] * (column.ndim - 1))
    if twin is not None:
        return np.where(where, twin[pair], column)
    if name.endswith(("_chosen", "_rejected")) and column.dtype.kind in "if":
        return np.where(where, column.dtype.type(-1 if column.dtype.kind == "i" else np.nan), column)
    return column


def _twin(name) -> str | None:
    words = name.split("_")
    swap = {"chosen": "rejected", "rejected": "chosen"}
    return "_".join(swap.get(word, word) for word in words) if swap.keys() & set(words) else None


def _names(attributes) -> list[str]:
    names = [attributes] if isinstance(attributes, str) else list(attributes)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"attributes must be different names, got {attributes!r}")
    return names


def _range(argument, value) -> tuple[float, float]:
    low, high = map(float, value)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{argument} must be (lowest, highest), finite and different, got {value!r}")
    return low, high


def _number(value) -> str:
    value = float(value)
    return str(int(value)) if value.is_integer() else np.format_float_positional(value, 6, fractional=False, trim="-")
