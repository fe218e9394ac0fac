"""Do the papers' claims hold on a controlled task? `python benchmarks/studies/recipes/run.py [--seeds 8]`.

Runs every recipe at every seed and prints one table: claim, effect with its 95 % interval over seeds, verdict. A claim
"reproduces" when the whole interval is above what it claims, "does not" when the whole interval is below the least
effect worth speaking of, and is "inconclusive" otherwise. `task.py` says what the task is.
"""

import argparse
import collections
import importlib
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from harness import machine
from harness.report import table
from studies.recipes import task

RECIPES = (
    "sweet_spot",
    "bees_selection",
    "noisy_labels",
    "flip_rate",
    "ratings",
    "cleaning",
    "small_margins",
    "chosen_quality",
    "reward_augmented",
    "online_gradient",
    "overlap",
    "whole_pipeline",
)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="at least 5 (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE", help="%(choices)s")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal in seconds, whose numbers mean nothing")
    parser.add_argument("--out", type=Path, help="folder for a .json and a .md beside what is printed")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 5:
        parser.error(f"--seeds must be at least 5, got {arguments.seeds}")
    torch.set_num_threads(1)  # the tensors are small, and the order of sums stays the same
    size = task.TINY if arguments.tiny else task.Size()
    results = {
        "machine": machine.facts(),
        "size": asdict(size),
        "beta": task.BETA,
        "seeds": list(range(arguments.seeds)),
    }
    results["recipes"] = {name: measured(name, results["seeds"], size) for name in arguments.only}
    text = markdown(results)
    print(text, end="")
    if arguments.out:
        stem = arguments.out / f"{results['machine']['date'][:10]}-recipes"
        stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        stem.with_suffix(".md").write_text(text)
    return 0


def measured(name, seeds, size) -> dict:
    recipe = importlib.import_module(f"studies.recipes.{name}")
    begin = time.process_time()
    arms = []
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rules that degenerate and methods out of their range: what is measured
            arms.append(recipe.arms(task.made_setting(seed, size)))
        print(f"{name}, seed {seed}: {time.process_time() - begin:.0f} s", file=sys.stderr, flush=True)
    effects = [task.judge_claim(claim, arms) for claim in recipe.CLAIMS]
    return {
        "title": recipe.TITLE,
        "seconds": round(time.process_time() - begin, 1),
        "claims": [
            {
                "claim": claim.text,
                "source": claim.source,
                "above": claim.above,
                "least": claim.least,
                "unit": claim.unit,
            }
            | effect._asdict()
            | {"per_seed": [claim.measure(found) for found in arms]}
            for claim, effect in zip(recipe.CLAIMS, effects, strict=True)
        ],
        "arms": {arm: _arm([found[arm] for found in arms]) for arm in arms[0]},
    }


def _arm(found) -> dict:
    if not isinstance(found[0], task.Outcome):
        return {"value": found}
    return {"reward": [outcome.mean for outcome in found], "kl": [outcome.kl for outcome in found]}


def markdown(results) -> str:
    facts, size = results["machine"], results["size"]
    versions = facts["versions"]
    claims = [claim for recipe in results["recipes"].values() for claim in recipe["claims"]]
    verdicts = collections.Counter(claim["verdict"] for claim in claims)
    seconds = sum(recipe["seconds"] for recipe in results["recipes"].values())
    lines = [
        "# Claims about preference data, checked on a controlled task",
        "",
        f"{', '.join(f'{verdict}: {count}' for verdict, count in sorted(verdicts.items()))} of {len(claims)} claims.",
        "",
        "A small autoregressive policy with a known reward is trained on pairs built by each method, scored by judges "
        "that err. It is not a language model: a verdict says what happened here. "
        f"{len(results['seeds'])} seeds; in every arm {size['steps']} steps of {size['batch']} pairs, Adam at "
        f"{size['rate']}, β = {results['beta']}, settled on plain DPO. Effects are means over seeds and held-out "
        "prompts of paired differences, in brackets the 95 % interval over seeds, not corrected for their number. "
        "σ is the standard deviation of the true reward within a prompt under the reference policy. "
        "A claim reproduces when the whole interval is above 0 (or what is given in parentheses), and does not when "
        "all of it is below the least effect worth speaking of, as a rule 0.1 σ.",
        "",
        f"Commit {facts['commit']}, torch {versions['torch']}, numpy {versions['numpy']}, {facts['threads']} thread on "
        f"{facts['cores']} cores, {facts['cpu']}, {facts['simd']}; {seconds:.0f} s of processor time.",
        "",
    ]
    rows = [
        [
            claim["claim"] + (f" (> {claim['above']:g})" if claim["above"] else ""),
            claim["source"],
            f"{claim['mean']:+.3g} [{claim['low']:+.3g}, {claim['high']:+.3g}] {claim['unit']}".rstrip(),
            claim["verdict"],
        ]
        for claim in claims
    ]
    return "\n".join([*lines, table(["claim", "source", "measured effect [95 % interval]", "verdict"], rows), ""])


if __name__ == "__main__":
    sys.exit(main())
