"""`fastpref info`: prints build_info() as lines or as JSON."""

import json


def add_parser(commands) -> None:
    info = commands.add_parser(
        "info", help="what was built, which backend serves which op on which device, and why not"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(handler=run_command, name="fastpref info")


def run_command(arguments) -> int:
    import fastpref

    info = fastpref.build_info()
    print(json.dumps(info, indent=2, default=str) if arguments.json else "\n".join(_indented(info)))
    return 0


def _indented(info, depth=0) -> list[str]:
    """Returns a nested dict as lines, one level of indent per level of nesting."""
    width = max(map(len, info), default=0)
    lines = []
    for name, value in info.items():
        if isinstance(value, dict):
            lines += ["  " * depth + name, *_indented(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}{name:<{width}}  {value}")
    return lines
