"""Pairs from a batch of rows: the construction of `write_pairs`'s rows where another engine holds the data.

    datasets   dataset.map(pair_rows, batched=True, remove_columns=dataset.column_names, fn_kwargs={...})
    Ray Data   fastpref.integrations.ray.pair_rows(dataset, ...)
    Spark      examples/spark_pairs.py

A row of the result depends on its own row alone, so the engine may cut and spread batches as it likes.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fastpref.curate.files.arrow_types import widened
from fastpref.curate.files.formats import check_format, is_conversational, shaped_rows, text_columns
from fastpref.curate.files.layouts import resolve_layout
from fastpref.curate.files.rows import Fields, parse_row, top_fields
from fastpref.curate.files.writing import (
    Picked,
    arrays_of,
    column_types,
    pair_columns,
    pair_rows_of,
    row_names,
    schema_of,
)
from fastpref.curate.pairs import published_pairs, select_pairs

_SOURCES = ("sources", "completions", "source_chosen")  # columns that say where responses come from


def pair_rows(
    batch,
    *,
    score_field="scores",
    source_field=None,
    length_field=None,
    layout=None,
    columns=None,
    format="trl",
    on_bad_row="error",
    **options,
):
    """Rows of pairs from rows of samples, as `write_pairs` writes those of `select_pairs(scores, **options)`.

    batch: a dict of lists or arrays, one entry per row, or a pyarrow Table or RecordBatch; rows as `read_samples` has
        them. What comes back is of the same kind (arrays as lists) with the columns prompt_id, prompt, chosen, rejected
        (or those of the format), score_*, margin, source_* (where the rows have sources), len_*, chosen_id,
        rejected_id, z_*, rank_rejected, n_pool, rule and scale. A prompt without a pair has no row.
    score_field: the field that is selected by; source_field, length_field, layout, columns: as in `read_samples`.
    format: of the texts, as in `write_pairs`.
    on_bad_row: "error", or "drop" with a UserWarning that counts them. Ties, scores that stand for none and responses
        that cannot be read are left out and counted by a UserWarning in either case.
    options: of `select_pairs`, but for those that look beyond a prompt: "min_of_<m>", which draws by its index in the
        whole dataset, and what on_degenerate does by the share of degenerate prompts in it (here "ignore" or "warn").
        Pairs whose sides were published keep them: of the options min_chosen, min_gap and max_gap act on them. They
        have no pool, and no columns z_* and rank_rejected.

    Raises ValueError for a row that is not as it should be, and for such options.
    """
    from fastpref.curate.files import reading  # needs orjson and xxhash

    check_format(format)
    _check_options(on_bad_row, options)
    found = resolve_layout("batch", sorted(_names(batch)), layout, columns)
    fields = Fields((score_field,), source_field, length_field, found.layout, found.roles, found.carried)
    if fields.shape == "rows":
        raise ValueError(f"batch has a row per response ({found}), which must be grouped by prompt first")
    rows = _python_rows(batch, top_fields(fields))
    part = reading.columns_of("batch", enumerate(rows), fields)
    samples = reading.joined_columns("batch", [part], fields)
    if samples.problems:
        message = f"{len(samples.problems)} of {len(rows)} rows are malformed, the first: {samples.problems[0]}"
        if on_bad_row == "error":
            raise ValueError(message)
        warnings.warn(f"{message}; they are left out", UserWarning, stacklevel=2)

    _warn_of_what_is_left_out(samples)
    if samples.sources is None and (source_field or not _names(batch).isdisjoint(_SOURCES)):
        # no row of this batch says, but those of others may: the columns must be there
        samples = replace(samples, sources=np.full(samples.responses, -1, np.int32))

    pairs = _pairs_of(samples, score_field, options)
    known = pair_columns(samples, pairs)
    prompts, own = np.unique(pairs["prompt"], return_inverse=True)
    texts = [parse_row(rows[position], reading.fields_again(fields)) for position in samples.position[prompts].tolist()]
    conversational = {not isinstance(row.prompt, str) for row in texts}
    if not is_conversational(format) and len(conversational) > 1:
        raise ValueError("batch holds strings and lists of messages, the pairs must be one: use trl-conversational")
    picked = Picked(own, pairs["chosen"], pairs["rejected"], np.zeros(len(own), bool), known)
    carried = samples.fields.carried
    found = pair_rows_of(texts, samples.prompt_hash[prompts], picked, carried, format)
    found = [shaped for row in found for shaped in shaped_rows(row, format)]
    if isinstance(batch, Mapping):
        names = list(found[0]) if found else row_names(known, carried, format)
        return {name: [row[name] for row in found] for name in names}
    types = _types(found, known, format, conversational == {True} or _holds_messages(batch))
    return type(batch).from_arrays(arrays_of(found, types), schema=schema_of(types))


def _warn_of_what_is_left_out(samples) -> None:
    said = [f"{count} {reason}" for reason, count in samples.counts.items()]
    if bad := samples.bad_responses:
        said.append(f"{len(bad)} responses that cannot be read, the first: {bad[0]}")
    if said:
        warnings.warn(f"left out: {'; '.join(said)}", UserWarning, stacklevel=3)


def _pairs_of(samples, score_field, options) -> dict[str, object]:
    """Indices and numbers of the pairs, with their rule and scale."""
    scores = samples.scores[score_field]
    if not samples.published:
        selection = select_pairs(scores, offsets=samples.offsets, **options)
        return selection.table() | {"rule": selection.rule, "scale": selection.scale}
    select_pairs(np.empty(0), offsets=np.zeros(1, np.int64), **options)  # to refuse what it knows no meaning of
    bounds = {name: options.get(name) for name in ("min_chosen", "min_gap", "max_gap")}
    valid = np.ones(samples.responses, bool)
    selection = published_pairs(scores, offsets=samples.offsets, valid=valid, strength=samples.strength, **bounds)
    pairs = selection.table() | {"rule": selection.rule, "scale": selection.scale}
    if samples.strength is not None:
        margin = pairs["score_chosen"] - pairs["score_rejected"]
        pairs["margin"] = np.where(np.isnan(margin), samples.strength[pairs["prompt"]], margin)
    return {name: column for name, column in pairs.items() if not name.startswith(("z_", "rank_"))}


def _types(found, columns, format, conversational) -> dict[str, object]:
    """Of the columns of the rows found. Texts that are messages of a role and a content alone have their type in every
    batch, whatever its rows hold."""
    message = {"role": "string", "content": "string"}
    shapes = dict.fromkeys(row_names(columns, (), format))
    for name in text_columns(format, False):
        single = format in ("axolotl", "llamafactory") and name in ("chosen", "rejected")
        if conversational or is_conversational(format):
            shapes[name] = message if single else [message]
    for row in found:
        shapes = {name: widened(shapes.get(name), value) for name, value in row.items()}
    known = column_types(columns)
    return {name: known.get(name, "string" if shape is None else shape) for name, shape in shapes.items()}


def _check_options(on_bad_row, options) -> None:
    if on_bad_row not in ("error", "drop"):
        raise ValueError(f"on_bad_row must be 'error' or 'drop', got {on_bad_row!r}")
    if str(options.get("rejected")).startswith("min_of_"):
        raise ValueError(
            f"rejected={options['rejected']!r} draws by the index of a prompt in the whole dataset, which a batch does "
            "not know: use write_pairs, or a rule such as 'quantile:0.10'"
        )
    if options.setdefault("on_degenerate", "ignore") not in ("ignore", "warn"):
        raise ValueError(
            f"on_degenerate={options['on_degenerate']!r} goes by the share of all prompts, which a batch cannot know: "
            "must be 'ignore' or 'warn'"
        )
    if taken := {"valid", "choosable", "offsets"} & options.keys():
        raise ValueError(f"options must not hold {taken.pop()}: the scores of the rows say which response has one")


def _names(batch) -> set[str]:
    if not isinstance(batch, Mapping) and not hasattr(batch, "schema"):
        raise TypeError(f"batch must be a dict of columns, a pyarrow Table or RecordBatch, got {type(batch).__name__}")
    return set(batch if isinstance(batch, Mapping) else batch.schema.names)


def _python_rows(batch, wanted) -> list[dict]:
    if isinstance(batch, Mapping):
        count = max(map(len, batch.values()), default=0)
        columns = {name: _python(column) for name, column in batch.items() if name in wanted}
    else:
        count = batch.num_rows
        columns = {name: batch.column(name).to_pylist() for name in batch.schema.names if name in wanted}
    if not columns:
        return [{}] * count  # rows that lack everything
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _python(value):
    """Lists and numbers of Python, from NumPy's."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [_python(item) for item in value] if isinstance(value, list) else value


def _holds_messages(table) -> bool:
    """Whether its prompts are lists of messages, by type, for there is no pair to tell."""
    import pyarrow

    texts = [table.schema.field(name).type for name in ("prompt", "chosen") if name in table.schema.names]
    return any(pyarrow.types.is_list(text) or pyarrow.types.is_large_list(text) for text in texts)
