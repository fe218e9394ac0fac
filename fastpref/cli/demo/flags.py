"""The flags of `fastpref demo`, and what it prints. It imports torch only for a run, not for --help."""

import json

from fastpref.cli.arguments import options_of, positive_integer
from fastpref.errors import InputError


def add_parser(commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="scored samples -> pairs -> RDPO on a small transformer: what it learnt, what it cost",
        description="Builds pairs from scored samples, trains a small transformer with RDPO through the fused loss and "
        "prints what it learnt on held-out prompts and what the loss cost against plain PyTorch. Under three minutes "
        "on two CPU cores. Without --data it uses samples the project makes itself.",
    )
    demo.add_argument("--data", metavar="FILE", help="JSON Lines (also .gz) or Parquet: prompt, responses[], scores[]")
    demo.add_argument(
        "--score-field", "--scores", metavar="NAME", help="field with the scores (default: scores, else win_prob)"
    )
    demo.add_argument(
        "--score-scale",
        choices=["auto", "raw", "logit"],
        default="auto",
        help="logit turns probabilities into a linear scale; auto does so when all scores lie in [0, 1]",
    )
    demo.add_argument(
        "--max-prompts", type=positive_integer, default=1000, metavar="N", help="first N prompts (%(default)s)"
    )
    demo.add_argument(
        "--steps", type=positive_integer, default=40, metavar="N", help="of warm-up and of RDPO (%(default)s)"
    )
    demo.add_argument("--seeds", type=positive_integer, default=3, metavar="N", help="trained models (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (%(default)s)")
    demo.add_argument("--threads", type=positive_integer, metavar="N", help="CPU threads (default: torch's own choice)")
    demo.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    demo.set_defaults(handler=run_command, name="fastpref")


def run_command(arguments) -> int:
    from fastpref.cli.demo.report import screen
    from fastpref.cli.demo.run import DemoOptions, run_demo

    options = options_of(arguments)
    json_path = options.pop("json")
    if json_path is not None:
        _check_writable(json_path)
    results = run_demo(DemoOptions(**options))
    print(screen(results))
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump(results, file, indent=2)
    return 0 if results["cost"]["losses_equal"] else 1


def _check_writable(path) -> None:
    """Raises InputError before the run rather than after it."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
