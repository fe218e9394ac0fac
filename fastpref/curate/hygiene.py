"""What is wrong with scored samples before any method looks at them: copies, blanks, boilerplate, leaked test data.

Every check is a comparison of hashes or of counts. Nothing is removed here: the report says what would be, and the
caller applies `valid` and `scores`, or takes of `reason` what it wants.
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastpref.curate.pools import as_mask, as_pools, per_prompt
from fastpref.curate.scale import to_logit


class Flag(enum.IntFlag):
    """Why a response would leave; a response may have several."""

    NO_SCORE = 1  # NaN or infinite
    BLANK = 2  # empty or whitespace only
    DUPLICATE = 4  # the text of another response of its prompt, which stays
    REPEATED_TEXT = 8  # one text under many prompts
    CONTAMINATED = 16  # its prompt or text is in the banned file
    CONTRADICTED = 32  # another score of it says the opposite; `hygiene` looks at one score, and never says so


class RepeatedTexts(NamedTuple):
    """Texts under more prompts than a text of its own should be, the most frequent first; [k] each."""

    text_hash: np.ndarray  # uint64
    prompts: np.ndarray  # int64, different prompts it stands under
    responses: np.ndarray  # int64
    first: np.ndarray  # int64, index of the first response that has it


@dataclass(frozen=True)
class Hygiene:
    """The report: applied it is `valid` and `scores`, and without that nothing has changed."""

    reason: np.ndarray  # uint8 [responses], sum of Flags; 0: nothing wrong
    scores: np.ndarray  # float64 [responses], clamped; of copies the one that stays has the mean
    clamped: int  # scores beyond the clamp, such as probabilities of 0 and 1
    copies_std: (
        float  # standard deviation of the scores (probabilities: logits) of one text under one prompt; NaN: none
    )
    repeated: RepeatedTexts
    repeated_limit: float  # prompts a text may stand under
    duplicate_prompts: np.ndarray  # bool [prompts], an earlier prompt is the same
    contaminated_prompts: np.ndarray  # bool [prompts], the prompt itself is banned
    too_few: np.ndarray  # bool [prompts], fewer than two responses are left

    @property
    def valid(self) -> np.ndarray:
        """[responses] bool, nothing wrong."""
        return self.reason == 0

    def counts(self) -> dict[str, int]:
        """Responses by flag (one may have several), clamped scores, duplicate prompts and prompts with too few."""
        flagged = {flag.name.lower(): int(np.count_nonzero(self.reason & flag)) for flag in Flag}
        return flagged | {
            "clamped": self.clamped,
            "repeated_texts": len(self.repeated.prompts),
            "duplicate_prompts": int(self.duplicate_prompts.sum()),
            "contaminated_prompts": int(self.contaminated_prompts.sum()),
            "too_few": int(self.too_few.sum()),
        }


def hygiene(
    scores,
    *,
    offsets,
    text_hash,
    blank,
    prompt_hash,
    sources=None,
    probability=False,
    clamp=1e-8,
    banned_hash=None,
    repeated_share=0.01,
    repeated_least=3,
) -> Hygiene:
    """Looks for what must not enter the moments of a pool.

    scores: [responses] numbers; NaN and infinities are no score.
    offsets: [prompts + 1].
    text_hash: [responses] uint64, equal for equal texts; prompt_hash: [prompts] uint64.
    blank: [responses] bool, empty or whitespace only.
    sources: [responses] integer codes. Of copies under one prompt the one with the lowest code stays (-1 last), then
        the first. The text being the same, only its index depends on the order of the responses.
    probability: scores lie in [0, 1]; they are moved into [clamp, 1 - clamp], as to_logit does.
    banned_hash: hashes of prompts and texts that must not be trained on. A banned prompt takes its responses along.
    repeated_share, repeated_least: one text under more than max(repeated_least, repeated_share * different prompts)
        prompts is flagged: canned text, or one that games the judge.

    Copies of one text under one prompt count once: the one that stays has the mean of their scores (of probabilities:
    of their logits), and differences between them are noise of the judge, which `copies_std` measures.
    Responses without a score are no copies, blank ones neither copies nor repeated.

    Raises ValueError for wrong shapes and for probabilities outside [0, 1], TypeError for wrong types.
    """
    values, offsets = as_pools("scores", scores, offsets=offsets)
    responses, prompts = len(values), len(offsets) - 1
    text_hash = _hashes("text_hash", text_hash, responses, "responses")
    prompt_hash = _hashes("prompt_hash", prompt_hash, prompts, "prompts")
    blank = as_mask("blank", blank, "scores", values.shape)
    sources = np.zeros(responses, np.int64) if sources is None else as_sources(sources, values.shape)
    if not (0 < clamp < 0.5 and 1 - clamp < 1):
        raise ValueError(f"clamp must lie between 0 and 0.5, and 1 - clamp below 1 in float64, got {clamp!r}")
    for name, value in (("repeated_share", repeated_share), ("repeated_least", repeated_least)):
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value!r}")

    missing = np.isnan(values)
    reason = np.where(missing, Flag.NO_SCORE, 0) | np.where(blank, Flag.BLANK, 0)
    prompt = per_prompt(offsets)
    linear, clamped = values, 0
    if probability:
        linear = to_logit(values, clamp)
        clamped = int(((values < clamp) | (values > 1 - clamp)).sum())
        values = np.clip(values, clamp, 1 - clamp)

    # responses by text, those of one text by prompt: copies are neighbours, and so are all places of a text
    order = np.flatnonzero(~blank)
    order = order[np.argsort(text_hash[order], kind="stable")]

    different, first_prompt, code = np.unique(prompt_hash, return_index=True, return_inverse=True)
    duplicate_prompts = np.ones(prompts, bool)
    duplicate_prompts[first_prompt] = False
    limit = max(repeated_least, repeated_share * len(different))
    repeated, members = _repeated_texts(order, text_hash, code[prompt[order]], len(different), limit)
    reason[members] |= Flag.REPEATED_TEXT

    contaminated_prompts = np.zeros(prompts, bool)
    if banned_hash is not None:
        banned = _hashes("banned_hash", banned_hash, None, "banned")
        contaminated_prompts = np.isin(prompt_hash, banned)
        found = contaminated_prompts[prompt] | (np.isin(text_hash, banned) & ~blank)
        reason[found] |= Flag.CONTAMINATED

    order = order[~missing[order]]
    stays, leaves, mean, copies_std = _copies(order, text_hash, prompt, sources, linear)
    reason[leaves] |= Flag.DUPLICATE
    if len(stays):
        differs = mean != linear[stays]
        values = values.copy()
        values[stays[differs]] = 1 / (1 + np.exp(-mean[differs])) if probability else mean[differs]
    left = np.bincount(prompt[reason == 0], minlength=prompts)
    return Hygiene(
        reason.astype(np.uint8),
        values,
        clamped,
        copies_std,
        repeated,
        float(limit),
        duplicate_prompts,
        contaminated_prompts,
        left < 2,
    )


def split_of(prompt_hash, *, test_share, salt=0) -> np.ndarray:
    """[prompts] bool, True: the prompt belongs to the test set.

    It depends on the hash of the prompt and the salt alone: equal prompts never stand on both sides, and a prompt keeps
    its side when the file grows or is shuffled. About `test_share` of the different prompts are True.

    Raises ValueError or TypeError for another type, a share outside [0, 1] or a salt outside [0, 2^64).
    """
    mixed = _hashes("prompt_hash", prompt_hash, None, "prompts")
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share must lie in [0, 1], got {test_share!r}")
    if isinstance(salt, bool) or not isinstance(salt, (int, np.integer)):
        raise TypeError(f"salt must be an int, got {type(salt).__name__}")
    if not 0 <= salt < 1 << 64:
        raise ValueError(f"salt must lie in [0, 2^64), got {salt}")
    # the output function of SplitMix64 (Steele, Lea, Flood 2014), of the hash, and of that with the salt
    mixed = _mix(_mix(mixed) ^ _mix(np.array([salt], np.uint64)))
    return (mixed >> np.uint64(11)) * 2.0**-53 < test_share


def as_sources(sources, shape) -> np.ndarray:
    """int64 codes of that shape. Raises TypeError or ValueError."""
    sources = np.asarray(sources)
    if sources.dtype.kind not in "iu":
        raise TypeError(f"sources must be integer codes, -1 for unknown, got {sources.dtype}")
    if sources.shape != shape:
        raise ValueError(f"sources must have shape {list(shape)} to match scores, got {list(sources.shape)}")
    if sources.size and sources.min() < -1:
        raise ValueError(f"sources must be >= 0, or -1 for unknown, got {sources.min()}")
    return sources.astype(np.int64, copy=False)


def _mix(bits) -> np.ndarray:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _hashes(name, hashes, length, what) -> np.ndarray:
    hashes = np.asarray(hashes)
    if hashes.dtype != np.uint64:
        raise TypeError(f"{name} must be uint64 hashes, got {hashes.dtype}")
    if hashes.ndim != 1 or (length is not None and len(hashes) != length):
        raise ValueError(f"{name} must have shape [{what if length is None else length}], got {list(hashes.shape)}")
    return hashes


def _starts(*sorted_keys) -> np.ndarray:
    """Where runs of equal keys begin."""
    fresh = np.ones(len(sorted_keys[0]), bool)
    if len(fresh):
        fresh[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in sorted_keys])
    return np.flatnonzero(fresh)


def _repeated_texts(order, text_hash, prompt, prompts, limit):
    """The texts under more than `limit` prompts, and their responses; order: by text; prompt: of each, as a code."""
    starts = _starts(text_hash[order])
    sizes = np.diff(np.append(starts, len(order)))
    often = sizes > limit  # responses, at least as many as prompts
    member = np.repeat(often, sizes)
    text = np.repeat(np.arange(np.count_nonzero(often)), sizes[often])
    under = np.unique(text * max(prompts, 1) + prompt[member]) // max(prompts, 1)
    under = np.bincount(under, minlength=np.count_nonzero(often))
    kept = under > limit
    first = order[starts[often][kept]]
    found = RepeatedTexts(text_hash[first], under[kept], sizes[often][kept], first)
    by = np.lexsort((found.text_hash, -found.prompts))
    return RepeatedTexts(*(column[by] for column in found)), order[member][kept[text]]


def _copies(order, text_hash, prompt, sources, linear):
    """Of scored texts that stand twice under a prompt: (who stays, who leaves, mean score of those who stay, std)."""
    starts = _starts(text_hash[order], prompt[order])
    sizes = np.diff(np.append(starts, len(order)))
    several = sizes > 1
    if not several.any():
        return order[:0], order[:0], linear[:0], float("nan")
    copies = order[np.repeat(several, sizes)]
    sizes = sizes[several]
    starts = np.cumsum(sizes) - sizes
    run = np.repeat(np.arange(len(sizes)), sizes)
    # added in the order of the values, so that the mean is the same to the last bit whatever order they came in
    ordered = linear[copies[np.lexsort((linear[copies], run))]]
    mean = np.add.reduceat(ordered, starts) / sizes
    mean = np.where(ordered[starts] == ordered[starts + sizes - 1], ordered[starts], mean)
    squares = np.square(ordered - mean[run]).sum()
    known = np.where(sources[copies] < 0, np.iinfo(np.int64).max, sources[copies])
    place = np.lexsort((copies, known, run))
    leaves = np.ones(len(copies), bool)
    leaves[starts] = False
    return copies[place[starts]], copies[place[leaves]], mean, float(np.sqrt(squares / (len(copies) - len(sizes))))
