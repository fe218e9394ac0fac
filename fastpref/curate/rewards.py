"""Implicit rewards: how much more likely a policy makes a response than its reference does, from two forward passes.

r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x)), log-probs summed over the tokens of the response: Rafailov et al.,
"Direct Preference Optimization", arXiv 2305.18290, equation 5. Margins between two responses, without beta, are what
`bees` combines with external ones (Deng et al., arXiv 2502.14560).

Text becomes tokens as in TRL's DPOTrainer: prompt and response are tokenised together, and the response starts where
the tokens leave those of the prompt alone. So it ends as the chat template ends a turn, or with EOS after plain text.
"""

import contextlib
import hashlib
import json
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpref._logps.causal_lm import completion_logps, evaluating, model_id
from fastpref._progress import reporting
from fastpref._whole_file import whole_file
from fastpref.curate.files.samples import texts
from fastpref.curate.files.table import Samples

_BLOCK_TOKENS = 1 << 20  # of a file in the cache: what an interrupted run may lose


@dataclass(frozen=True)
class ImplicitRewards:
    """One entry per response; those of prompt p are `offsets[p]:offsets[p + 1]`."""

    rewards: np.ndarray  # float64 [responses], beta * (policy_logps - reference_logps); NaN where nothing was scored
    offsets: np.ndarray  # int64 [prompts + 1]
    policy_logps: np.ndarray  # float64 [responses], nats
    reference_logps: np.ndarray  # float64 [responses], nats
    tokens: np.ndarray  # int64 [responses], of the response with its end, after the cut
    truncated: np.ndarray  # bool [responses], cut at max_length
    beta: float
    policy_id: str
    reference_id: str


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probs of responses under one model; arrays as in ImplicitRewards."""

    logps: np.ndarray  # float64 [responses], nats; NaN where nothing was scored
    offsets: np.ndarray
    tokens: np.ndarray
    truncated: np.ndarray
    model_id: str


def implicit_rewards(
    policy,
    reference,
    samples,
    beta: float = 0.1,
    *,
    tokenizer,
    max_length: int | None = None,
    max_tokens: int = 16384,
    as_chat: bool = False,
    template_options: Mapping[str, Any] | None = None,
    add_eos: bool = True,
    policy_id: str | None = None,
    reference_id: str | None = None,
    cache=None,
    progress=None,
) -> ImplicitRewards:
    """beta * (log pi(y|x) - log pi_ref(y|x)) of every response.

    policy, reference: causal LMs of transformers (or PEFT), on any device, in any dtype; scored in evaluation mode, one
        after the other. reference None: the policy without its PEFT adapter.
    beta: 1 for rewards that are to select pairs (`fastpref curate --implicit`, `bees`), whose bounds are in nats.
    samples: `Samples`, or an iterable of (prompt, responses). A prompt is a string, or a list of messages
        ({"role", "content"}); a response to a string is a string, one to messages is a string or a list of messages.
    tokenizer: of transformers, the same for both models.
    max_length: tokens of prompt and response together; what lies behind is cut. None: as many as both models take.
    max_tokens: of a batch, padding included; one response at least.
    as_chat: strings become turns of a user and an assistant, in the tokenizer's chat template.
    template_options: passed on to the chat template.
    add_eos: a response in plain text ends with the tokenizer's EOS.
    policy_id, reference_id: names to know the models by, with a revision ("org/model@0f3c..."); None: a hash of their
        parameters, which are then read once.
    cache: a folder of this run's own, where finished blocks are kept. A run that was interrupted goes on from there.
    progress: a function of (responses done, of how many), or True for a bar on a terminal.

    Responses cut at max_length are scored as far as they go and counted in a UserWarning; one of which nothing is left
    is NaN. The numbers do not depend on max_tokens, beyond rounding of the models. All tokens are held in memory, four
    bytes each, those of a prompt once.

    Raises ValueError for a cache of other models, texts or settings, with what differs; for conversations without a
    chat template; for a tokenizer that does not fit a model. TypeError for what is no model, text or message.
    """
    if not (isinstance(beta, int | float) and 0 < beta < float("inf")):
        raise ValueError(f"beta must be a positive number, got {beta!r}")
    if reference is None and not hasattr(policy, "disable_adapter"):
        raise ValueError(f"reference may be None for a PEFT policy only, got {type(policy).__name__}")
    models = [policy] if reference is None else [policy, reference]
    encoded = _encode(samples, tokenizer, _longest(max_length, models), as_chat, template_options, add_eos)
    folders = (None, None) if cache is None else (Path(cache) / "policy", Path(cache) / "reference")
    with reporting(progress, 2 * encoded.count, "scoring") as report:
        scored = _score(policy, encoded, max_tokens, policy_id, folders[0], report)
        with policy.disable_adapter() if reference is None else contextlib.nullcontext():

            def after(done: int) -> None:
                report(encoded.count + done)

            against = _score(models[-1], encoded, max_tokens, reference_id, folders[1], after)
    return ImplicitRewards(
        rewards=beta * (scored.logps - against.logps),
        offsets=encoded.offsets,
        policy_logps=scored.logps,
        reference_logps=against.logps,
        tokens=encoded.own_counts,
        truncated=encoded.truncated,
        beta=float(beta),
        policy_id=scored.model_id,
        reference_id=against.model_id,
    )


def response_logps(
    model,
    samples,
    *,
    tokenizer,
    max_length: int | None = None,
    max_tokens: int = 16384,
    as_chat: bool = False,
    template_options: Mapping[str, Any] | None = None,
    add_eos: bool = True,
    model_id: str | None = None,
    cache=None,
    progress=None,
) -> ResponseLogps:
    """Log-probs of every response under one model; arguments as in implicit_rewards."""
    encoded = _encode(samples, tokenizer, _longest(max_length, [model]), as_chat, template_options, add_eos)
    with reporting(progress, encoded.count, "scoring") as report:
        return _score(model, encoded, max_tokens, model_id, cache, report)


# ---- text to tokens ----


class _Encoded(NamedTuple):
    """Tokens of the prompts, and of the responses after what they share with their prompt; and what they came from."""

    prompt_tokens: np.ndarray  # int32, one prompt after the other
    prompt_bounds: np.ndarray  # int64 [prompts + 1]
    own_tokens: np.ndarray  # int32, one response after the other
    own_bounds: np.ndarray  # int64 [responses + 1], before the cut
    shared_counts: np.ndarray  # int64 [responses], tokens of the prompt that precede
    own_counts: np.ndarray  # int64 [responses], tokens of the response that are left
    truncated: np.ndarray  # bool [responses]
    offsets: np.ndarray  # int64 [prompts + 1], responses of each prompt
    key: dict[str, str]

    @property
    def count(self) -> int:
        return len(self.own_counts)

    def sequence(self, response: int, prompt: int) -> np.ndarray:
        start, first = self.prompt_bounds[prompt], self.own_bounds[response]
        return np.concatenate(
            [
                self.prompt_tokens[start : start + self.shared_counts[response]],
                self.own_tokens[first : first + self.own_counts[response]],
            ]
        )


def _longest(max_length, models) -> int | None:
    if max_length is not None:
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length must be a positive integer, got {max_length!r}")
        return max_length
    limits = [getattr(getattr(model, "config", None), "max_position_embeddings", None) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


def _encode(samples, tokenizer, max_length, as_chat, template_options, add_eos) -> _Encoded:
    render = _Renderer(tokenizer, as_chat, dict(template_options or {}))
    eos = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise ValueError("add_eos=True needs a tokenizer with an EOS token, got one without")
    prompt_tokens, own_tokens = array("i"), array("i")  # of all prompts and responses: an object of each is too much
    prompt_lengths, own_lengths, shared, counts = array("q"), array("q"), array("q"), array("q")
    data = hashlib.sha256()
    leaves = 0  # responses whose tokens leave those of the prompt before its end
    for number, (prompt, responses) in enumerate(_pairs_of(samples)):
        data.update(json.dumps([prompt, responses], sort_keys=True, default=str).encode())
        before, whole, special = render(number, prompt, responses)
        ids = _tokens(tokenizer, [before, *whole], special)
        start = ids[0]
        prompt_tokens.frombytes(start.tobytes())
        prompt_lengths.append(len(start))
        counts.append(len(responses))
        for full in ids[1:]:
            least = min(len(start), len(full))
            differs = np.flatnonzero(start[:least] != full[:least])
            alike = int(differs[0]) if len(differs) else least
            leaves += alike < len(start)
            own = full[alike:]
            if special and add_eos and (len(own) == 0 or own[-1] != eos):
                own = np.append(own, np.int32(eos))
            shared.append(alike)
            own_tokens.frombytes(own.tobytes())
            own_lengths.append(len(own))
    if leaves:
        warnings.warn(
            f"the tokens of {leaves} of {len(shared)} responses leave those of their prompt before its end (they merge "
            "across the boundary, or the chat template renders a prompt on its own differently); they are scored from "
            "there on",
            UserWarning,
            stacklevel=3,
        )
    prompt_tokens, own_tokens, shared, own_counts = map(np.asarray, (prompt_tokens, own_tokens, shared, own_lengths))
    prompt_bounds, own_bounds, offsets = map(_bounds, (prompt_lengths, own_lengths, counts))
    truncated = np.zeros(len(shared), dtype=bool)
    if max_length is not None:
        truncated = shared + own_counts > max_length
        shared = np.minimum(shared, max_length)
        own_counts = np.minimum(own_counts, max_length - shared)
    if truncated.any():
        nothing = int((truncated & (own_counts == 0)).sum())
        warnings.warn(
            f"{int(truncated.sum())} of {len(shared)} responses were cut at max_length={max_length} tokens, "
            f"{nothing} of them to nothing (NaN)",
            UserWarning,
            stacklevel=3,
        )
    tokens = hashlib.sha256()
    for part in (prompt_tokens, prompt_bounds, own_tokens, own_bounds, shared, own_counts):
        tokens.update(part)
    key = {
        "data": _short(data),
        "tokenizer": _tokenizer_id(tokenizer),
        "chat template": render.id,
        "truncation": f"max_length={max_length}",
        "tokens": _short(tokens),
    }
    return _Encoded(prompt_tokens, prompt_bounds, own_tokens, own_bounds, shared, own_counts, truncated, offsets, key)


def _pairs_of(samples) -> Iterator[tuple[Any, list]]:
    if isinstance(samples, Samples):
        yield from texts(samples)
        return
    if isinstance(samples, str | bytes | Mapping) or not isinstance(samples, Iterable):
        raise TypeError(f"samples must be Samples or (prompt, responses) pairs, got {type(samples).__name__}")
    for number, sample in enumerate(samples):
        is_pair = isinstance(sample, Sequence) and not isinstance(sample, str) and len(sample) == 2
        if not is_pair or isinstance(sample[1], str) or not isinstance(sample[1], Sequence):
            raise TypeError(f"samples[{number}] must be (prompt, list of responses), got {sample!r:.80}")
        yield sample[0], list(sample[1])


class _Renderer:
    """Texts that hold the prompt, and the prompt with each response; and whether special tokens are still to come."""

    def __init__(self, tokenizer, as_chat: bool, options: dict[str, Any]):
        self.tokenizer, self.as_chat, self.options = tokenizer, as_chat, options
        template = json.dumps([tokenizer.chat_template, as_chat, options], sort_keys=True, default=str)
        self.id = _short(hashlib.sha256(template.encode()))

    def __call__(self, number: int, prompt, responses) -> tuple[str, list[str], bool]:
        if isinstance(prompt, str) and self.as_chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            for response in responses:
                if not isinstance(response, str):
                    raise TypeError(
                        f"samples[{number}]: a response to a string must be a string, got {type(response).__name__}"
                    )
            return prompt, [prompt + response for response in responses], True
        _check_messages(number, "the prompt", prompt)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"samples[{number}] is a conversation, and the tokenizer has no chat_template")
        before = self._chat(prompt, add_generation_prompt=True)
        whole = []
        for response in responses:
            turns = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
            _check_messages(number, "a response", turns)
            whole.append(self._chat([*prompt, *turns]))
        return before, whole, False

    def _chat(self, messages, **options) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **self.options)


def _check_messages(number, what, messages) -> None:
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise TypeError(f"samples[{number}]: {what} must be a string or a list of messages, got {messages!r:.80}")


def _tokens(tokenizer, texts: list[str], special: bool) -> list[np.ndarray]:
    ids = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(sequence, dtype=np.int32) for sequence in ids]


def _tokenizer_id(tokenizer) -> str:
    """The tokenizer's whole state where it is a fast one; else its class and its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return _short(hashlib.sha256(f"{type(tokenizer).__name__}{special}{state}".encode()))


def _short(digest) -> str:
    return f"sha256:{digest.hexdigest()[:32]}"


def _bounds(lengths) -> np.ndarray:
    """[n + 1] int64: where each of n ragged parts begins and ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


# ---- tokens to log-probs ----


def _score(model, encoded: _Encoded, max_tokens, name, cache, report) -> ResponseLogps:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens must be a positive integer, got {max_tokens!r}")
    score = completion_logps(model)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((int(t.max()) for t in (encoded.prompt_tokens, encoded.own_tokens) if len(t)), default=0)
    if largest >= rows:
        raise ValueError(f"tokenizer must fit the model, which embeds {rows} tokens, got token {largest}")
    name = name or model_id(model)
    lengths = encoded.shared_counts + encoded.own_counts
    order = np.argsort(-lengths, kind="stable")  # the longest first: what does not fit fails at once
    order = order[encoded.own_counts[order] > 0]
    block = np.cumsum(lengths[order]) // _BLOCK_TOKENS
    blocks = np.split(order, np.flatnonzero(np.diff(block)) + 1) if len(order) else []
    if cache is not None:
        cache = Path(cache)
        key = {"model": name, **encoded.key, "block": str(_BLOCK_TOKENS)}
        _check_key(cache, key)
        # Blocks of two keys have two names: key.json may be deleted, or another run begin at the same moment.
        stem = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    prompt_of = np.repeat(np.arange(len(encoded.offsets) - 1), np.diff(encoded.offsets))
    logps = np.full(encoded.count, np.nan)
    logps[(encoded.own_counts == 0) & ~encoded.truncated] = 0
    done = encoded.count - len(order)
    with evaluating(model), torch.no_grad():
        for number, members in enumerate(blocks):
            path = None if cache is None else cache / f"block-{stem}-{number:06d}.npy"
            if path is not None and path.exists():
                logps[members] = _read_block(path, len(members))
                done += len(members)
                report(done)
                continue
            for batch in _batches(members, lengths, max_tokens):
                ids, attention, completion = _padded(encoded, batch, prompt_of, lengths)
                logps[batch] = score(ids, attention, completion).cpu().numpy()
                done += len(batch)
                report(done)
            if path is not None:
                with whole_file(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, logps[members])
    broken = int((~np.isfinite(logps[order])).sum())
    if broken:
        warnings.warn(f"{name} gives {broken} of {len(order)} responses no finite log-prob", UserWarning, stacklevel=3)
    return ResponseLogps(logps, encoded.offsets, encoded.own_counts, encoded.truncated, name)


def _batches(members, lengths, max_tokens) -> Iterator[np.ndarray]:
    """The longest response is the first of a batch, and pads the others."""
    begin = 0
    while begin < len(members):
        size = max(1, max_tokens // int(lengths[members[begin]]))
        yield members[begin : begin + size]
        begin += size


def _padded(encoded: _Encoded, batch, prompt_of, lengths) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and completion_mask, int64 [B, T]."""
    width = int(lengths[batch].max())
    ids = np.zeros((len(batch), width), dtype=np.int64)
    for row, response in zip(ids, batch, strict=True):
        row[: lengths[response]] = encoded.sequence(response, prompt_of[response])
    place = np.arange(width)
    attention = place < lengths[batch][:, None]
    completion = attention & (place >= encoded.shared_counts[batch][:, None])
    return tuple(torch.from_numpy(array.astype(np.int64)) for array in (ids, attention, completion))


# ---- the cache ----


def _check_key(folder: Path, key: dict[str, str]) -> None:
    """Creates the folder with its key, or compares the key it has."""
    path = folder / "key.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(key, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"cache: {path} cannot be read ({error}); delete {folder} or give another folder") from error
    different = [name for name in {**found, **key} if found.get(name) != key.get(name)]
    if different:
        parts = "; ".join(f"{name} {found.get(name)} there, {key.get(name)} now" for name in different)
        raise ValueError(f"cache: {folder} holds scores of another run ({parts}); delete it or give another folder")


def _read_block(path: Path, count: int) -> np.ndarray:
    try:
        block = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cache: {path} cannot be read ({error}); delete it") from error
    if block.shape != (count,) or block.dtype != np.float64:
        raise ValueError(f"cache: {path} must hold float64 [{count}], got {block.dtype} {list(block.shape)}; delete it")
    return block
