"""Every format of `--format` once through the parser of the trainer it is for, taken from its own wheel.

TRL is installed. The others require far more than their parsers do, so that their wheels are not: with
`pip download --no-deps -d FOLDER axolotl llamafactory ms-swift openrlhf` and FASTPREF_HOST_WHEELS=FOLDER their parser
modules are imported from there, between packages that are empty but for what these modules import from them.
"""

import glob
import importlib
import json
import os
import sys
import types
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest

from fastpref.curate import read_samples, write_pairs

datasets = pytest.importorskip("datasets")

USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "name": "get_weather", "content": "4 C"}
SAID = {"role": "assistant", "content": "It is 4 degrees."}
REFUSED = {"role": "assistant", "content": "I cannot know."}
TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
SCORES = {"score_chosen": 5.0, "score_rejected": 1.0}
CHATS = [
    {"prompt": [{"role": "system", "content": "Be kind."}, USER], "chosen": [SAID], "rejected": [REFUSED], **SCORES},
    {"prompt": [USER, SAID, USER], "chosen": [REFUSED], "rejected": [SAID], **SCORES},
]
TOOL_CHATS = [
    {"prompt": [USER, CALLED, ANSWER], "chosen": [SAID], "rejected": [REFUSED], "tools": TOOLS, **SCORES},
    {"prompt": [USER], "chosen": [SAID], "rejected": [REFUSED], "tools": None, **SCORES},
]
STRINGS = [{"prompt": f"q{k}", "chosen": f"good {k}", "rejected": f"bad {k}", **SCORES} for k in range(3)]


def load_pairs(folder, rows, format, ending):
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(path)
    assert samples.problems == []
    every = np.arange(samples.prompts)
    flat = samples.scores["score"]
    pairs = {"prompt": every, "chosen": np.zeros_like(every), "rejected": np.ones_like(every)}
    pairs |= {"score_chosen": flat[::2], "score_rejected": flat[1::2]}
    out = folder / f"pairs.{ending}"
    write_pairs(samples, pairs, out, format=format)
    kind = "json" if ending == "jsonl" else ending
    return datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(folder / "cache"))


def template(messages, tools=None, add_generation_prompt=False, **_):
    """A chat template: what was said in a line each."""
    text = f"tools:{json.dumps(tools)}\n" * bool(tools)
    for message in messages:
        calls = "".join(f"<{call['function']['name']}>" for call in message.get("tool_calls") or ())
        text += f"{message['role']}:{message.get('content') or ''}{calls}\n"
    return text + "assistant:" * add_generation_prompt


class Tokenizer:
    chat_template = "messages"
    eos_token = "\n"

    def apply_chat_template(self, conversation, tokenize=False, **options):
        return template(conversation, **options)


@pytest.fixture(params=["jsonl", "parquet"])
def ending(request):
    return request.param


@contextmanager
def host_module(tmp_path, wheel, name, empty=(), **stubs):
    """A module of a wheel; `empty`: packages whose own __init__ is not run; stubs: module -> names in it."""
    folder = os.environ.get("FASTPREF_HOST_WHEELS")
    found = folder and glob.glob(os.path.join(folder, f"{wheel}-*.whl"))
    if not found:
        pytest.skip(f"FASTPREF_HOST_WHEELS names no folder with a wheel of {wheel}")
    with zipfile.ZipFile(found[0]) as file:
        file.extractall(tmp_path / wheel)
    (root,) = (path.parent for path in (tmp_path / wheel).rglob(f"{name.split('.')[0]}/__init__.py"))
    root = root.parent
    before = dict(sys.modules)
    try:
        for package in empty:
            module = types.ModuleType(package)
            module.__path__ = [str(root / package.replace(".", "/"))]
            sys.modules[package] = module
        for stub, names in stubs.items():
            module = types.ModuleType(stub.replace("__", "."))
            vars(module).update(names)
            sys.modules[module.__name__] = module
        yield importlib.import_module(name)
    finally:
        for added in sys.modules.keys() - before.keys():
            del sys.modules[added]
        sys.modules.update(before)


# ---- TRL


@pytest.mark.parametrize("format", ["trl", "trl-conversational"])
@pytest.mark.parametrize("rows", [CHATS, TOOL_CHATS], ids=["chats", "tools"])
def test_trl(tmp_path, rows, format, ending):
    data_utils = pytest.importorskip("trl.data_utils")
    for row, given in zip(load_pairs(tmp_path, rows, format, ending), rows, strict=True):
        assert data_utils.is_conversational(row)
        tools = row.get("tools")  # as DPOTrainer reads them
        found = data_utils.apply_chat_template(row, Tokenizer(), json.loads(tools) if isinstance(tools, str) else tools)
        prompt = template(given["prompt"], given.get("tools"), add_generation_prompt=True)
        assert found["prompt"] == prompt
        for side in ("chosen", "rejected"):
            whole = template(given["prompt"] + given[side], given.get("tools"))
            assert found["prompt"] + found[side] == whole


def test_trl_strings(tmp_path, ending):
    data_utils = pytest.importorskip("trl.data_utils")
    for row, given in zip(load_pairs(tmp_path, STRINGS, "trl", ending), STRINGS, strict=True):
        assert not data_utils.is_conversational(row)
        assert [row[name] for name in ("prompt", "chosen", "rejected")] == list(given.values())[:3]
        assert row["margin"] == 4.0


def test_kto(tmp_path, ending):
    data_utils = pytest.importorskip("trl.data_utils")
    written = load_pairs(tmp_path, CHATS, "kto", ending)
    pairs = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in CHATS])
    expected = data_utils.unpair_preference_dataset(pairs)  # TRL's own
    shown = [[row["prompt"], row["completion"], row["label"]] for row in expected]
    assert sorted(map(str, ([r["prompt"], r["completion"], r["label"]] for r in written))) == sorted(map(str, shown))
    found = data_utils.apply_chat_template(written[0], Tokenizer())
    assert found["completion"] == f"{SAID['content']}\n" and found["label"] is True


# ---- the others


def test_axolotl(tmp_path, ending):
    logging = {"get_logger": lambda *_, **__: __import__("logging").getLogger("host")}
    with host_module(
        tmp_path,
        "axolotl",
        "axolotl.prompt_strategies.dpo.chat_template",
        (
            "axolotl",
            "axolotl.utils",
            "axolotl.utils.schemas",
            "axolotl.prompt_strategies",
            "axolotl.prompt_strategies.dpo",
        ),
        axolotl__utils__logging=logging,
    ) as module:
        transform, _ = module.default({"datasets": [{"type": "chat_template.default"}], "chat_template": "chatml"})
        for row, given in zip(load_pairs(tmp_path, CHATS, "axolotl", ending), CHATS, strict=True):
            found = transform(row, tokenizer=Tokenizer())
            assert found["prompt"] == template(given["prompt"], add_generation_prompt=True)
            assert [found[side] for side in ("chosen", "rejected")] == [
                given[side][0]["content"] for side in ("chosen", "rejected")
            ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="LLaMA-Factory needs Python 3.11")
@pytest.mark.parametrize("rows", [CHATS, TOOL_CHATS, STRINGS], ids=["chats", "tools", "strings"])
def test_llamafactory(tmp_path, rows, ending):
    """Its list of data sets, then its converter."""
    logger = types.SimpleNamespace(warning_rank0=pytest.fail, warning_rank0_once=pytest.fail)
    with host_module(
        tmp_path,
        "llamafactory",
        "llamafactory.data.converter",
        ("llamafactory", "llamafactory.data"),
        llamafactory__extras={"logging": types.SimpleNamespace(get_logger=lambda _: logger)},
        llamafactory__extras__constants={"DATA_CONFIG": "dataset_info.json"},
        llamafactory__extras__misc={"use_modelscope": lambda: False, "use_openmind": lambda: False},
    ) as module:
        parser = importlib.import_module("llamafactory.data.parser")
        written = load_pairs(tmp_path, rows, "llamafactory", ending)
        (attributes,) = parser.get_dataset_list(["pairs"], str(tmp_path))
        assert (tmp_path / attributes.dataset_name).exists() and attributes.ranking
        convert = module.get_dataset_converter(attributes.formatting, attributes, types.SimpleNamespace(media_dir=""))
        for row, given in zip(written, rows, strict=True):
            found = convert(row)
            prompt = given["prompt"]
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            system = prompt[0]["content"] if prompt[0]["role"] == "system" else ""
            assert found["_system"] == system
            roles = [message["role"] for message in prompt if message["role"] != "system"]
            if len(roles) == 3 and roles[2] == "tool":
                assert [turn["role"] for turn in found["_prompt"]] == ["user", "function", "observation"]
                assert json.loads(found["_tools"]) == TOOLS
            else:
                assert [turn["role"] for turn in found["_prompt"]] == roles
            sides = [given[side] if isinstance(given[side], str) else given[side][0]["content"]
                     for side in ("chosen", "rejected")]  # fmt: skip
            assert found["_response"] == [{"role": "assistant", "content": text} for text in sides]


@pytest.mark.parametrize("rows", [CHATS, TOOL_CHATS, STRINGS], ids=["chats", "tools", "strings"])
def test_swift(tmp_path, rows, ending):
    """Its preprocessor, then its template's inputs: the two conversations that it compares."""
    import logging

    utils = {
        "TOOL_KEYS": ("tools", "rejected_tools"),
        "get_logger": lambda *_: logging.getLogger("host"),
        "is_dist": bool,
        "is_master": lambda: True,
        "remove_arrow_padding": lambda tool: tool,
        "safe_ddp_context": None,
    }
    with host_module(
        tmp_path,
        "ms_swift",
        "swift.template.template_inputs",
        ("swift", "swift.template", "swift.dataset", "swift.dataset.preprocessor"),
        swift__utils=utils,
        swift__template__utils=_swift_template_utils(),
        modelscope__hub__utils__utils={"get_cache_dir": str},
    ) as inputs:
        sys.modules["swift.template"].history_to_messages = None
        sys.modules["swift.template"].MaxLengthError = type("MaxLengthError", (Exception,), {})
        core = importlib.import_module("swift.dataset.preprocessor.core")
        written = load_pairs(tmp_path, rows, "swift", ending)
        preprocess = core.AutoPreprocessor()._get_preprocessor(written)
        batch = {name: [row[name] for row in written] for name in written.column_names}
        found = preprocess.batched_preprocess(batch, strict=True, ignore_max_length_error=False)
        for k, given in enumerate(rows):
            row = {name: column[k] for name, column in found.items() if column[k] is not None}
            compared = inputs.TemplateInputs.from_dict(row)
            prompt = given["prompt"]
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            said = [m["content"] for m in prompt if m["content"] is not None and m["role"] != "system"]
            for side, conversation in (("chosen", compared.chosen), ("rejected", compared.rejected)):
                text = given[side] if isinstance(given[side], str) else given[side][0]["content"]
                contents = [m["content"] for m in conversation.messages if m["role"] != "tool_call"]
                assert contents == [*said, text]
            assert compared.chosen.system == compared.rejected.system
            assert (compared.chosen.tools or None) == given.get("tools")


def _swift_template_utils():
    def get_last_user_round(messages, include_tool=True):
        roles = ("user", "tool", "tool_response") if include_tool else ("user",)
        return max(k for k, message in enumerate(messages) if message["role"] in roles)

    return {"Messages": list, "Tool": dict, "get_last_user_round": get_last_user_round, "messages_to_history": None}


def test_openrlhf(tmp_path, ending):
    utils = {"exist_and_not_none": lambda row, key: key in row and row[key] is not None}
    with host_module(
        tmp_path,
        "openrlhf",
        "openrlhf.datasets.reward_dataset",
        ("openrlhf", "openrlhf.datasets"),
        openrlhf__datasets__utils=utils,
        openrlhf__utils={},
        openrlhf__utils__utils={"zero_pad_sequences": None},
    ) as module:
        for row, given in zip(load_pairs(tmp_path, CHATS, "openrlhf", ending), CHATS, strict=True):
            options = {"prompt_key": "prompt", "apply_chat_template": Tokenizer().apply_chat_template, "is_dpo": True}
            prompt, chosen, rejected, margin = module.preprocess_data(row, **options)
            assert prompt == template(given["prompt"], add_generation_prompt=True)
            assert prompt + chosen == template(given["prompt"] + given["chosen"])
            assert prompt + rejected == template(given["prompt"] + given["rejected"])
            assert margin == 4.0
