"""TRL's DPOTrainer on fastpref's kernels: the same data, options, losses and metrics, and the losses TRL does not have.

    from fastpref.integrations.trl import FastPrefDPOConfig, FastPrefDPOTrainer

    args = FastPrefDPOConfig("out", loss_type=["rdpo"], loss_options={"beta_rating": 0.5})
    FastPrefDPOTrainer("my/model", args=args, train_dataset=rated_pairs).train()

Where a step goes: TRL tokenises and collates; its fused LM head is replaced by one that hands hidden states, head and
labels to an objective inside `model.forward`, where the hooks of DDP and FSDP expect the head's parameters to be used;
the objective is `linear_preference_loss`, so the gradients of a trained head are formed while its logits exist (3
products instead of TRL's 4), and a frozen head takes 2 instead of 3. The reference is scored by the same head.

A TRL loss keeps TRL's value, also where fastpref's loss of that name differs:

    sft                 mean over the tokens of all chosen completions (fastpref: mean over pairs of token means)
    ipo, sigmoid_norm   divide by all tokens of the completion (fastpref: by those scored, one fewer where there is no
                        prompt)
    sigmoid             ignores label_smoothing (set it in loss_options for cDPO)
    use_weighting       weights are not capped (fastpref's wpo caps the product at 1)
    ld_alpha; f_divergence_type with ipo or sigmoid_norm: TRL's own code on fastpref's token log-probs

What still differs: f-divergence scores cap their exponent at 40 (TRL: 80 or none), a tie for the largest logit counts
as a hit of mean_token_accuracy, and a batch without any chosen token has an sft loss of 0, not NaN.
"""

import contextlib
import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

try:
    import trl
except ImportError as error:
    raise ImportError("fastpref.integrations.trl needs TRL 1.16: pip install 'fastpref[trl]'") from error
if trl.__version__.split(".")[:2] != ["1", "16"]:
    raise ImportError(f"fastpref.integrations.trl works with TRL 1.16, got TRL {trl.__version__}")

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from fastpref import __version__, linear_preference_loss, linear_token_logps, losses
from fastpref._logps.causal_lm import is_plain_head, logit_transform

TRL_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # those that read TRL's label_smoothing
_PER_TOKEN = ("ipo", "sigmoid_norm")  # those that divide by the completion's length
_RATING_COLUMNS = ("margin", "score_chosen", "score_rejected")
_RATINGS = ("margin", "scores")  # what a batch holds of them
_NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", *_RATINGS)
_STATS = ("entropy", "mean_logit", "top1")


@dataclass
class FastPrefDPOConfig(DPOConfig):
    """A DPOConfig whose `loss_type` may name any loss of `fastpref.losses.LOSSES`.

    Args:
        loss_options: keyword options of the loss, {"beta_rating": 0.5} for "rdpo"; for several losses a list of such
            mappings (or None), one per entry of loss_type. They override TRL's own fields (beta, label_smoothing, ...).
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DPOConfig._VALID_DICT_FIELDS, "loss_options"]

    # a list, too; HfArgumentParser knows no such annotation
    loss_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the loss, as JSON on the command line; a list of them for several losses."},
    )

    def __post_init__(self):
        super().__post_init__()  # parses a mapping
        if isinstance(self.loss_options, str):
            self.loss_options = json.loads(self.loss_options)


@dataclass
class DataCollatorForRatedPreference(DataCollatorForPreference):
    """TRL's collator, which also puts ratings into the batch.

    `margin` [B] is the column of that name, or score_chosen - score_rejected where it is absent or None; NaN = not
    rated. `scores` [2B] is score_chosen and then score_rejected, where both columns are there.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        scored = "score_chosen" in examples[0] and "score_rejected" in examples[0]
        if scored:
            scores = [example[side] for side in ("score_chosen", "score_rejected") for example in examples]
            batch["scores"] = _numbers(scores)
        if scored or "margin" in examples[0]:
            batch["margin"] = _numbers([_margin(example) for example in examples])
        return batch


def _numbers(values: list) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def _margin(example) -> float | None:
    if (margin := example.get("margin")) is not None:
        return margin
    chosen, rejected = example.get("score_chosen"), example.get("score_rejected")
    return None if chosen is None or rejected is None else chosen - rejected


# ---- the head ----


def _check_model(model) -> None:
    config, name = model.config, type(model).__name__
    if config.get_text_config() is not config:
        raise ValueError(f"model must be a text model; vision-language models are not supported, got {name}")
    if config.is_encoder_decoder:
        raise ValueError(f"model must be decoder-only; encoder-decoder models are not supported, got {name}")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(f"model must be on one device, got device_map={model.hf_device_map}")
    head = model.get_output_embeddings()
    if not is_plain_head(head):
        raise ValueError(
            "the LM head must be a plain nn.Linear, without an adapter, trainable tokens or quantised weights, for its "
            f"product with the hidden states is formed from its weight; got {type(head).__name__} in {name}"
        )


def add_preference_head(model, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """Lets `model(..., labels=labels, fused_lm_head=True)` stop before the logits.

    Without more it is TRL's call, with TRL's FusedCausalLMOutput: log-probs [B, T - 1] and the other `outputs`. With
    `objective=f` the forward calls f(hidden, weight, labels, bias=, scale=, softcap=), labels not shifted, and returns
    its value as `loss`. Any other call is the model's own.

    Args:
        model: a decoder-only text model of transformers on one device, with a plain LM head; its forward is replaced.
        outputs: what TRL's call returns: "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1".

    Raises:
        ValueError: for another model or head.
    """
    _check_model(model)
    original = model.forward
    transform = logit_transform(model.config)
    named = {"entropy": "entropy", "log_sum_sq_probs": "log_sum_p2", "mean_logits": "mean_logit", "is_top1": "top1"}
    stats = tuple(named[name] for name in outputs if name in named)

    @functools.wraps(type(model).forward)  # generate() checks its arguments against the signature
    def forward(self, *args, fused_lm_head=False, objective=None, labels=None, **kwargs):
        if not fused_lm_head:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        head = self.get_output_embeddings()  # at each call: FSDP and PEFT exchange it and its parameters
        options = {"bias": head.bias, **transform}
        if objective is not None:
            return FusedCausalLMOutput(loss=objective(hidden, head.weight, labels, **options))
        logps = linear_token_logps(hidden, head.weight, labels, shift=True, stats=stats, **options)
        logps, values = logps if stats else (logps, None)
        logps = logps[:, :-1]  # nothing follows the last token
        found = {name: getattr(values, named[name])[:, :-1] for name in outputs if name in named}
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].bool()
        return FusedCausalLMOutput(log_probs=logps, **found)

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def _instead_of_trls_head():
    """Replaces the head that DPOTrainer's constructor adds.

    That is after PEFT has wrapped the model, and before the reference is wrapped, sharded or used: a subclass reaches
    both models at that moment in no other way.
    """
    theirs = dpo_trainer.add_fused_lm_head
    dpo_trainer.add_fused_lm_head = add_preference_head
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = theirs


# ---- the losses ----


def _own_options(args) -> list[dict[str, Any]]:
    """Returns loss_options, one mapping per loss."""
    options = getattr(args, "loss_options", None)
    if isinstance(options, list):
        if len(options) != len(args.loss_type):
            raise ValueError(f"loss_options must have one entry per loss ({args.loss_type}), got {options!r}")
        return [dict(own or {}) for own in options]
    if not isinstance(options, (Mapping, types.NoneType)):
        raise ValueError(f"loss_options must be a mapping, or a list of them, got {options!r}")
    if options and len(args.loss_type) > 1:
        raise ValueError(f"loss_options must be a list with one entry per loss ({args.loss_type}), got {options!r}")
    return [dict(options or {}) for _ in args.loss_type]


def _loss_terms(args, beta: float, chosen_tokens: float | Tensor = 1.0) -> tuple[list, list]:
    """Returns the losses of the config and their options, as linear_preference_loss takes them.

    chosen_tokens: tokens of the chosen completions per pair of the batch.
    """
    found = []
    for name, own in zip(args.loss_type, _own_options(args), strict=True):
        loss, options = name, {}
        if args.f_divergence_type != "reverse_kl" and name != "sft":
            options = {"f_divergence": args.f_divergence_type, "f_alpha": args.f_alpha_divergence_coef}
        if name in _SMOOTHED:
            options["label_smoothing"] = args.label_smoothing
        if name == "discopop":
            options["tau"] = args.discopop_tau
        if name == "sft":
            loss = _nll_over(chosen_tokens)
        if name in _PER_TOKEN:
            loss, options["beta"] = _over_completions(losses.get_loss(name)), beta
        options |= own
        if args.use_weighting:
            loss, options = "wpo", {"base": loss, "options": options, "max_weight": None}
        found.append((loss, options))
    names, options = zip(*found, strict=True)
    return list(names), list(options)


def _nll_over(chosen_tokens):
    @losses.pair_separable
    def sft(pairs):
        return -pairs.chosen_logps / chosen_tokens

    return sft


def _over_completions(loss):
    """Divides `loss` by all tokens of the completions, a first one that nothing predicts too; they travel as scores."""

    @losses.pair_separable
    def over_completions(pairs, **options):
        return loss(pairs._replace(chosen_length=pairs.chosen_score, rejected_length=pairs.rejected_score), **options)

    over_completions.needs = loss.needs | {"score"}
    return over_completions


def _needs_trls_epilogue(args) -> bool:
    # fastpref's f-divergence scores leave out a constant, which only cancels where both have the same divisor
    constant = args.f_divergence_type != "reverse_kl" and any(name in _PER_TOKEN for name in args.loss_type)
    return args.ld_alpha is not None or constant


def _ratings_needed(args) -> dict[str, str]:
    """Returns what the losses need of the ratings -> the key of a batch that holds it."""
    needs = losses.traits(args.loss_type, _own_options(args)).needs
    return {need: key for need, key in (("rating_gap", "margin"), ("score", "scores")) if need in needs}


def _reads_reference(args) -> bool:
    """Tells whether a loss has a reference. TRL's always do: the metrics of its trainer need it."""
    needs = losses.traits(args.loss_type, _own_options(args)).needs
    return "reference" in needs or any(name in TRL_LOSSES for name in args.loss_type)


# ---- what is refused ----


def _check_args(args) -> None:
    """Raises ValueError for an option or a combination that would be ignored, or that is untested."""
    plugin, parallel = args.deepspeed_plugin, args.parallelism_config
    sizes = {name: getattr(parallel, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    refused = (
        ("padding_free", args.padding_free, "TRL 1.16 ignores it"),
        ("use_liger_kernel", args.use_liger_kernel, "Liger replaces the forward that this head belongs to"),
        ("activation_offloading", args.activation_offloading, "it would move the head's gradients too"),
        ("torch_compile", args.torch_compile, "every step brings its own objective"),
        ("deepspeed", plugin is not None and plugin.zero_stage == 3, "ZeRO-3 empties the head's weight outside of it"),
        ("parallelism_config", max(sizes.values()) > 1, f"heads and batches must be whole, not cut by {sizes}"),
    )
    for name, given, reason in refused:
        if given:
            raise ValueError(f"{name} is not supported by FastPrefDPOTrainer, got {getattr(args, name)!r}: {reason}")

    names, own = args.loss_type, _own_options(args)
    pairs = losses.Pairs(*torch.ones(len(losses.Pairs._fields), 2))
    try:
        needs = losses.traits(names, own).needs
        losses.sigmoid(pairs, f_divergence=args.f_divergence_type, f_alpha=args.f_alpha_divergence_coef)
        if not _needs_trls_epilogue(args):
            loss, options = _loss_terms(args, args.beta)
            losses.mixture(pairs, loss, None, options, args.beta)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss_type={names}, loss_options={own} cannot be computed: {error}") from error
    if args.use_weighting and "sft" in names:
        raise ValueError(f"use_weighting weighs pairs, and 'sft' is a mean over tokens, got loss_type={names}")
    if "score" in needs and any(name in _PER_TOKEN for name in names):
        raise ValueError(f"loss_type must not mix {_PER_TOKEN} with a loss that needs absolute scores, got {names}")
    if _needs_trls_epilogue(args):
        name = "f_divergence_type" if args.ld_alpha is None else "ld_alpha"
        foreign = [loss for loss, options in zip(names, own, strict=True) if loss not in TRL_LOSSES or options]
        if foreign:
            raise ValueError(
                f"{name}={getattr(args, name)!r} takes TRL's losses, without loss_options, got loss_type={names}, "
                f"loss_options={own}"
            )
    if "tail" in needs and args.precompute_ref_log_probs:
        raise ValueError(f"precompute_ref_log_probs keeps one sum per sequence, and loss_type={names} needs its tokens")
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name) and not _reads_reference(args):
            raise ValueError(f"{name} needs a loss that has a reference, got loss_type={names}")


_WHERE_RATINGS_COME_FROM = (
    "They come from the column 'margin', or from 'score_chosen' and 'score_rejected'; a collator of your own must pass "
    "them on, as DataCollatorForRatedPreference does"
)


def _check_columns(args, example) -> None:
    scored = "score_chosen" in example and "score_rejected" in example
    for need in _ratings_needed(args):
        if not (scored or (need == "rating_gap" and "margin" in example)):
            raise ValueError(
                f"loss_type={args.loss_type} needs ratings ({need}), but train_dataset has only {sorted(example)}. "
                + _WHERE_RATINGS_COME_FROM
            )


# ---- the trainer ----


class FastPrefDPOTrainer(DPOTrainer):
    """The DPOTrainer of TRL 1.16, with its arguments, on fastpref's fused head and losses.

    A loss that uses ratings takes them from the column `margin` (rating of the chosen minus rating of the rejected
    response; None or NaN = not rated), or from `score_chosen` and `score_rejected`. A loss without a reference runs
    none, and drops the reference model.

    Args:
        args: a DPOConfig or a FastPrefDPOConfig.
        data_collator: one of your own must put `margin` [B] (and `scores` [2B]) into the batch, as
            DataCollatorForRatedPreference does.
        model, ref_model, train_dataset, and any other: as of DPOTrainer.

    Raises:
        ValueError: at construction, naming the option: vision-language and encoder-decoder models, the auxiliary loss
            of a mixture of experts, an LM head that is not a plain nn.Linear (PEFT's modules_to_save is), models on
            several devices, ZeRO-3, tensor, context and sequence parallelism, padding_free, use_liger_kernel,
            activation_offloading, torch_compile, losses and options that do not fit together, and ratings that the
            data do not have.
    """

    def __init__(self, model, ref_model=None, args=None, data_collator=None, train_dataset=None, *rest, **kwargs):
        if args is not None:
            _check_args(args)
        self._ratings = {} if args is None else _ratings_needed(args)
        if self._ratings and data_collator is None and train_dataset is not None:
            _check_columns(args, next(iter(train_dataset)))
        with _instead_of_trls_head():
            super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef must be 0 for {type(self.model).__name__}: the auxiliary loss of a mixture of "
                f"experts is not supported, got {self.router_aux_loss_coef}"
            )
        if self._ratings and data_collator is None:
            self.data_collator = DataCollatorForRatedPreference(**vars(self.data_collator))
        self._trls_epilogue = _needs_trls_epilogue(self.args)
        self._has_reference = _reads_reference(self.args)
        if not self._has_reference:
            self.ref_model = None

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._ratings:
            self._signature_columns += [name for name in _RATING_COLUMNS if name not in self._signature_columns]

    def _prepare_input(self, data):
        # Under DeepSpeed transformers rounds floats to the training dtype: here ratings and reference log-probs.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL's cache file is named after the data and the weights; the numbers depend on these as well.
        weights, args = self._precompute_model_hash, self.args
        precision = self.accelerator.mixed_precision
        settings = (args.ld_alpha, args.max_length, args.truncation_mode, precision)
        self._precompute_model_hash = (weights, "fastpref", __version__, *settings)
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in _RATINGS})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._trls_epilogue:
            inputs = {k: v for k, v in inputs.items() if k not in _RATINGS}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        model_inputs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL}
        model_inputs["use_cache"] = False
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        step = self._step(inputs)
        reference = self._reference(model_inputs, labels, inputs) if self._has_reference else {}

        # FSDP2's mixed precision rounds tensors on their way into and out of a forward to bf16: those of the step come
        # with the closure, and leave through `kept`. The loss goes the official way, too, for the hooks on it.
        kept = []
        # Gradients formed in the forward have not seen the loss scale, without which fp16 flushes them to 0.
        reduction = "none" if self.args.fp16 else "mean"

        def objective(hidden, weight, labels, **options):
            if "ref_token_logps" in reference:  # virtual tokens of prompt-learning PEFT precede the sequence
                virtual = labels.shape[1] - reference["ref_token_logps"].shape[1]
                reference["ref_token_logps"] = F.pad(reference["ref_token_logps"], (virtual, 0))
            options |= {"shift": True, "stats": _STATS, "beta": self.beta, "reduction": reduction}
            kept.append(linear_preference_loss(hidden, weight, labels, **step, **reference, **options))
            return kept[0].loss.mean()

        loss = model(**model_inputs, labels=labels, fused_lm_head=True, objective=objective).loss
        exact = kept[0].loss.detach().mean()
        if loss.dtype != exact.dtype:
            loss = exact + (loss - loss.detach())
        self._record(inputs, kept[0])
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics and predict() ask for logits: a forward of their own, as in TRL
            return loss, model(**model_inputs)

    def _step(self, inputs) -> dict[str, Any]:
        """Returns the arguments of linear_preference_loss about the loss and the pairs of this batch."""
        counts = inputs["completion_mask"].sum(1)  # tokens per completion
        pairs = counts.shape[0] // 2
        scored = inputs["completion_mask"][:pairs, 1:].sum()
        loss, options = _loss_terms(self.args, self.beta, scored.clamp(min=1) / pairs)
        for need, key in self._ratings.items():
            if key not in inputs:
                raise ValueError(
                    f"loss_type={self.args.loss_type} needs ratings ({need}), but the batch has no {key!r}, only "
                    f"{sorted(inputs)}. {_WHERE_RATINGS_COME_FROM}"
                )
        step = {"loss": loss, "loss_options": options, "loss_weights": self.loss_weights}
        if len(loss) == 1 and self.loss_weights[0] == 1:
            step = {"loss": loss[0], "loss_options": options[0]}
        per_token = any(name in _PER_TOKEN for name in self.args.loss_type)
        step["scores"] = counts.float() if per_token else inputs.get("scores")
        step["rating_gap"] = inputs.get("margin")
        return step

    def _reference(self, model_inputs, labels, inputs) -> dict[str, Tensor]:
        """Returns precomputed sums, or log-probs per token of the reference model or the policy without its adapter."""
        if self.precompute_ref_logps:
            return {"ref_logps": torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])}
        model, adapter = self.ref_model, contextlib.nullcontext()
        if model is None:
            model, peft_model = self.model, self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(peft_model, adapter_name="ref" if "ref" in peft_model.peft_config else None)
        kept = []

        def objective(hidden, weight, labels, **options):
            kept.append(linear_token_logps(hidden, weight, labels, shift=True, **options))
            return kept[0].sum()

        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter:
            model(**model_inputs, labels=labels, fused_lm_head=True, objective=objective)
        return {"ref_token_logps": kept[0][:, -labels.shape[1] :]}

    def _record(self, inputs, out) -> None:
        """Records TRL's metrics with TRL's reductions, in two collectives and reads instead of one each per metric."""
        mode, stats = "train" if self.model.training else "eval", out.stats
        chosen, rejected = stats.chosen_lengths.sum(), stats.rejected_lengths.sum()
        totals = (
            stats.entropy * (chosen + rejected),
            stats.chosen_mean_logit * chosen,
            stats.rejected_mean_logit * rejected,
            stats.chosen_top1 * chosen,
            chosen,
            rejected,
            inputs["attention_mask"].sum(),
        )
        # one row per rank: gather_for_metrics cuts the repeated samples of a last batch off the first dimension
        totals = torch.stack([total.double() for total in totals]).unsqueeze(0)
        entropy, chosen_logit, rejected_logit, top1, chosen, rejected, tokens = (
            self.accelerator.gather_for_metrics(totals).sum(0).tolist()
        )
        vectors = {
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": (out.margins > 0).to(out.margins.dtype),
            "rewards/margins": out.margins,
            "logps/chosen": out.chosen_logps,
            "logps/rejected": out.rejected_logps,
        }
        means = self.accelerator.gather(torch.stack(list(vectors.values()), 1)).mean(0).tolist()

        if mode == "train":
            self._total_train_tokens += int(tokens)
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["entropy"].append(entropy / max(chosen + rejected, 1))
        metrics["logits/chosen"].append(chosen_logit / max(chosen, 1))
        metrics["logits/rejected"].append(rejected_logit / max(rejected, 1))
        metrics["mean_token_accuracy"].append(top1 / max(chosen, 1))
        for name, mean in zip(vectors, means, strict=True):
            metrics[name].append(mean)
