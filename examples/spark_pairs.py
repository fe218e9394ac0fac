"""Pairs from samples in a Spark DataFrame: `fastpref.curate.pair_rows` under mapInArrow.

    spark-submit examples/spark_pairs.py samples.parquet pairs.parquet

pyspark >= 4.0 and fastpref must be installed where the executors run. Every Arrow batch is worked on alone, so the
result does not depend on how Spark partitions the samples; write it with one partition, or sort it, for a fixed order.
"""

import sys
from collections.abc import Iterator
from functools import partial

import pyarrow

from fastpref.curate import pair_rows

OPTIONS = {"score_field": "scores", "rejected": "quantile:0.10"}


def pairs_of(batches: Iterator[pyarrow.RecordBatch], **options) -> Iterator[pyarrow.RecordBatch]:
    """Batches of samples to batches of pairs, the shape of a function that mapInArrow takes."""
    for batch in batches:
        yield pair_rows(batch, **options)


def schema_of(samples: pyarrow.Schema, **options) -> pyarrow.Schema:
    """Of the pairs: that of no samples."""
    return pair_rows(samples.empty_table(), **options).schema


def main(source: str, target: str) -> None:
    try:
        from pyspark.sql import SparkSession
        from pyspark.sql.pandas.types import from_arrow_schema
    except ImportError:
        sys.exit("this example needs Spark: pip install pyspark")
    spark = SparkSession.builder.appName("pairs").getOrCreate()
    samples = spark.read.parquet(source)
    schema = schema_of(samples.limit(0).toArrow().schema, **OPTIONS)
    pairs = samples.mapInArrow(partial(pairs_of, **OPTIONS), from_arrow_schema(schema))
    pairs.write.parquet(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
