"""integrations.ray on a local Ray: blocks and batches of any size give the rows that one call gives."""

import importlib.util
import json
import subprocess
import sys

import pytest

pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")

from fastpref.curate import pair_rows  # noqa: E402

RUN = """
import json, sys
import ray
from fastpref.integrations.ray import pair_rows

folder, options = sys.argv[1], json.loads(sys.argv[2])
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
samples = ray.data.read_parquet(folder + "/samples").repartition(4).materialize()
pair_rows(samples, batch_size=7, **options).write_parquet(folder + "/pairs")
print(samples.num_blocks())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "fastpref[ray]" runs this'
)
def test_ray_gives_what_one_call_gives(tmp_path):
    from pyarrow import parquet

    rows = [
        {
            "prompt": f"prompt {p}",
            "responses": [f"{p}.{k}" for k in range(2 + p % 5)],
            "scores": [float((7 * p + 3 * k) % 11) for k in range(2 + p % 5)],
            "models": ["mn"[k % 2] if p < 50 else None for k in range(2 + p % 5)],
        }
        for p in range(100)
    ]
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "samples").mkdir()
    for k in range(4):
        parquet.write_table(table.slice(25 * k, 25), tmp_path / "samples" / f"{k}.parquet", row_group_size=10)
    options = {"source_field": "models", "rejected": "quantile:0.10"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path, json.dumps(options)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # not the checkout, whose fastpref is the bare source tree
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"
    found = parquet.read_table(tmp_path / "pairs").sort_by("prompt_id")
    want = pair_rows(table, **options).sort_by("prompt_id")
    assert want.num_rows > 80 and found.equals(want)
