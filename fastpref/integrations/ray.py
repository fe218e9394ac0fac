"""Pairs from samples in a Ray dataset, on as many machines as Ray has.

import ray
from fastpref.integrations.ray import pair_rows

samples = ray.data.read_parquet("samples/")
pair_rows(samples, score_field="win_prob", source_field="models", rejected="quantile:0.10").write_parquet("pairs/")
"""

from functools import partial

try:
    from ray.data import Dataset
except ImportError as error:
    raise ImportError("fastpref.integrations.ray needs Ray Data: pip install 'fastpref[ray]'") from error

from fastpref.curate.files import batches


def pair_rows(dataset: Dataset, *, batch_size=1024, map_options=None, **options) -> Dataset:
    """Applies `fastpref.curate.pair_rows` to every batch of the dataset: its rows, of samples, become rows of pairs.

    Args:
        dataset: rows of samples, as `fastpref.curate.pair_rows` takes them.
        batch_size: rows of samples in memory at a time per task.
        map_options: options of Dataset.map_batches, such as num_cpus or concurrency.
        options: options of `pair_rows`.

    Returns:
        The rows of pairs, lazily. They are the same for any batch size and any number of blocks, in the order of their
        prompts as far as Ray keeps it (DataContext.execution_options.preserve_order).
    """
    function = partial(batches.pair_rows, **options)
    return dataset.map_batches(function, batch_size=batch_size, batch_format="pyarrow", **(map_options or {}))
