"""The rows of pairs as trainers read them: one function per format, from a row as TRL has it.

    trl                 prompt, chosen, rejected: strings or lists of messages, as the samples have them
    trl-conversational  the same, always lists of messages
    openrlhf            likewise; for --prompt_key prompt --apply_chat_template; it reads margin, too
    axolotl             messages, and one message as chosen and as rejected, its `type: chat_template.default`
    llamafactory        conversations, chosen and rejected in its sharegpt formatting, beside them its dataset_info.json
    swift               messages that end in the chosen response, and rejected_response: a string, or the messages in
                        place of all after the last one of the user
    kto                 prompt, completion, label: two rows a pair

What a host would drop in silence is refused here: it would make another pair.
"""

import json
import os
from collections.abc import Callable

from fastpref.errors import InputError

FORMATS = ("trl", "trl-conversational", "axolotl", "llamafactory", "swift", "openrlhf", "kto")
TEXTS = ("prompt", "chosen", "rejected", "completion")  # of a row as TRL has it
MEDIA = {
    "image": "<image>",
    "image_url": "<image>",
    "video": "<video>",
    "audio": "<audio>",
}  # in texts, by type of part


def check_format(format) -> None:
    """Raises ValueError unless it is one of FORMATS."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")


def is_conversational(format) -> bool:
    """Whether its prompts are lists of messages, whatever the samples have."""
    return format not in ("trl", "kto")


def shaped_rows(row: dict, format: str) -> list[dict]:
    """The rows of a format, from one as TRL has it. Raises InputError for what the format cannot hold."""
    shape = _SHAPES.get(format)
    if shape is None:
        return [row]
    rest = {name: value for name, value in row.items() if name not in TEXTS}
    rows = shape(row, rest)
    return rows if isinstance(rows, list) else [rows]


def text_columns(format, to_sft: bool) -> list[str]:
    """The columns of texts that every row of a format has."""
    if format == "swift":
        return ["messages"] if to_sft else ["messages", "rejected_response"]
    head = {"axolotl": "messages", "llamafactory": "conversations"}.get(format)
    if to_sft:
        return [head] if head else ["prompt", "completion"]
    if format == "kto":
        return ["prompt", "completion", "label"]
    return [head or "prompt", "chosen", "rejected"]


# ---- one function per format: the row as TRL has it, and its columns but for the texts


def _axolotl(row, rest) -> dict:
    _refuse_media_and_tools("axolotl's chat_template.default", row)
    for message in _messages_of(row):
        if not isinstance(message.get("content"), str) or message.get("tool_calls"):
            raise _refusal(row, "axolotl's chat_template.default reads text alone, and there are tool calls or parts")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise _refusal(row, f"axolotl's chat_template.default knows no role {message['role']!r}")
    if "completion" in row:
        return {**_id(rest), "messages": row["prompt"] + row["completion"], **rest}
    sides = {side: _single_message("axolotl", row, side) for side in ("chosen", "rejected")}
    return {**_id(rest), "messages": row["prompt"], **sides, **rest}


def _openrlhf(row, rest) -> dict:
    _refuse_media_and_tools("OpenRLHF", row)
    return row


def _llamafactory(row, rest) -> dict:
    if "tools" in rest:
        rest["tools"] = _json_string(rest["tools"], none="")
    prompt = _sharegpt_turns(row, _with_media(row, "LLaMA-Factory"))
    if "completion" in row:
        turns = prompt + _sharegpt_turns(row, row["completion"])
        _check_turns(row, turns, last="gpt")
        return {**_id(rest), "conversations": turns, **rest}
    _check_turns(row, prompt, last="human")
    sides = {}
    for side in ("chosen", "rejected"):
        _single_message("LLaMA-Factory", row, side)
        sides[side] = _sharegpt_turns(row, row[side])[-1]
    return {**_id(rest), "conversations": prompt, **sides, **rest}


def _sharegpt_turns(row, messages) -> list[dict]:
    found = []
    for message in messages:
        role, content = message["role"], _plain_text(row, message.get("content"), "LLaMA-Factory")
        if calls := message.get("tool_calls"):
            if content:
                raise _refusal(row, "LLaMA-Factory takes a tool call without text beside it")
            found.append({"from": "function_call", "value": json.dumps([_call(row, call) for call in calls])})
        elif role in _SHAREGPT_ROLES:
            found.append({"from": _SHAREGPT_ROLES[role], "value": content})
        else:
            raise _refusal(row, f"LLaMA-Factory knows no role {role!r}")
    return found


_SHAREGPT_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "assistant": "gpt",
    "tool": "observation",
}


def _check_turns(row, turns, last) -> None:
    """LLaMA-Factory skips a conversation, with a line in its log, whose turns do not take turns."""
    spoken = turns[1:] if turns and turns[0]["from"] == "system" else turns
    sides = [turn["from"] in ("human", "observation") for turn in spoken]
    if not spoken or sides != [k % 2 == 0 for k in range(len(sides))] or sides[-1] != (last == "human"):
        order = ", ".join(turn["from"] for turn in turns)
        raise _refusal(row, f"LLaMA-Factory skips turns that do not alternate, and these are {order or 'none'}")


def _swift(row, rest) -> dict:
    if "tools" in rest:
        rest["tools"] = _json_string(rest["tools"], none=None)
    prompt = _swift_messages(row, _with_media(row, "ms-swift"))
    if "completion" in row:
        return {**_id(rest), "messages": prompt + _swift_messages(row, row["completion"]), **rest}
    chosen, rejected = (_swift_messages(row, row[side]) for side in ("chosen", "rejected"))
    asked = max((k for k, message in enumerate(prompt) if message["role"] == "user"), default=-1)
    if any(message["role"] == "user" for message in [*chosen, *rejected]) or asked < 0:
        raise _refusal(row, "ms-swift needs a user turn in the prompt and none in the responses")
    rejected = prompt[asked + 1 :] + rejected
    if len(rejected) == 1 and rejected[0]["role"] == "assistant":
        rejected = rejected[0]["content"]
    return {**_id(rest), "messages": prompt + chosen, "rejected_response": rejected, **rest}


def _swift_messages(row, messages) -> list[dict]:
    found = []
    for message in messages:
        role, content = message["role"], _plain_text(row, message.get("content"), "ms-swift")
        calls = message.get("tool_calls") or []
        if content or not calls:
            found.append({"role": _SWIFT_ROLES.get(role, role), "content": content})
        found += [{"role": "tool_call", "content": json.dumps(_call(row, call))} for call in calls]
    return found


_SWIFT_ROLES = {"tool": "tool_response", "developer": "system"}


def _kto(row, rest) -> list[dict] | dict:
    if "completion" in row:
        return row
    return [
        {
            **_id(rest),
            "prompt": row["prompt"],
            "completion": row[side],
            "label": side == "chosen",
            **_of_side(rest, side),
        }
        for side in ("chosen", "rejected")
    ]


def _of_side(rest, side) -> dict:
    """The columns of one side: score_chosen and score_rejected become score, chosen_id and rejected_id response_id."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    found = {}
    for name, value in rest.items():
        words = name.split("_")
        own = next((word for word in words if word in other), None)
        if own is None or "_".join(other.get(word, word) for word in words) not in rest:
            found[name] = value
        elif own == side:
            found["_".join(["response", *words[1:]] if words[0] == side else [w for w in words if w != side])] = value
    return found


_SHAPES: dict[str, Callable] = {
    "axolotl": _axolotl,
    "openrlhf": _openrlhf,
    "llamafactory": _llamafactory,
    "swift": _swift,
    "kto": _kto,
}


# ---- what they share


def _id(rest) -> dict:
    """prompt_id, which comes first, is taken out of the rest."""
    return {"prompt_id": rest["prompt_id"]}


def _messages_of(row) -> list[dict]:
    return [message for name in TEXTS for message in row.get(name, ())]


def _refusal(row, why) -> InputError:
    return InputError(f"{why}, in prompt {row['prompt_id']}: write --format trl-conversational")


def _single_message(host, row, side) -> dict:
    if len(row[side]) != 1:
        raise _refusal(row, f"{host} takes one message per response, got {len(row[side])} as {side}")
    return row[side][0]


def _refuse_media_and_tools(host, row) -> None:
    for name in ("tools", "images", "videos", "audios"):
        if row.get(name):
            raise _refusal(row, f"{host} does not read {name}")


def _plain_text(row, content, host) -> str:
    """A text, of parts with the marks of their media among it."""
    if content is None or isinstance(content, str):
        return content or ""
    found = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            found.append(part.get("text") or "")
        elif kind in MEDIA:
            found.append(MEDIA[kind])
        else:
            raise _refusal(row, f"{host} knows no part of type {kind!r}")
    return "".join(found)


def _with_media(row, host) -> list[dict]:
    """The messages of the prompt; media that no message places come first in what the user says first, as TRL does."""
    messages = row["prompt"]
    texts = [_plain_text(row, message.get("content"), host) for message in messages]
    missing = ""
    for name, mark in (("images", "<image>"), ("videos", "<video>"), ("audios", "<audio>")):
        media = row.get(name) or []
        count = len(media) if isinstance(media, list) else 1
        missing += mark * max(count - sum(text.count(mark) for text in texts), 0)
    first = next((k for k, message in enumerate(messages) if message["role"] == "user"), None)
    if not missing or first is None:
        return messages
    return [*messages[:first], {**messages[first], "content": missing + texts[first]}, *messages[first + 1 :]]


def _call(row, call) -> dict:
    """Name and arguments of a tool call; arguments that are a string of JSON become what they say."""
    function = call.get("function") or call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise _refusal(row, f"the arguments of a call of {function.get('name')!r} are no JSON") from None
    return {"name": function.get("name"), "arguments": arguments}


def _json_string(value, none):
    if value is None or value == []:
        return none
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- llamafactory's list of data sets


def dataset_info(path, columns, to_sft: bool) -> dict:
    """The entry of a file in LLaMA-Factory's dataset_info.json, by the name of the file without its ending."""
    texts = {"messages": "conversations"} | ({} if to_sft else {"chosen": "chosen", "rejected": "rejected"})
    media = {name: name for name in ("tools", "images", "videos", "audios") if name in columns}
    entry = {"file_name": os.path.basename(path), "formatting": "sharegpt"} | ({} if to_sft else {"ranking": True})
    return {os.path.basename(path).partition(".")[0]: entry | {"columns": texts | media}}
