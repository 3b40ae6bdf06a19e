"""Which chats each real chat template carries, cell by cell; `--write` puts the table into docs/data.md.

Every text of a chat is a word of its own in capitals, so that it can be found again: ANS…, CALL… and THO… are
learned where the answer that they stand in is.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peer_cases import all_cases

from raytune_ft.data.chat_template import ChatTemplate
from raytune_ft.data.conversation import Conversation, Malformed
from raytune_ft.data.records import read_record
from raytune_ft.data.segments import Rendered
from raytune_ft.spec import FieldsSpec

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BEGIN, END = "<!-- chat templates: made by tests/peers/chat_table.py -->", "<!-- end of chat templates -->"
WORD = re.compile(r"[A-Z]+(?:WORD|TWO)")
LEARNED = ("ANS", "CALL", "THO", "OPEN")


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "SYSWORD kind."}
FUNCTION = {
    "name": "get_weather",
    "description": "TOOLWORD of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "CITYWORD"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
RESULT = {"role": "tool", "content": "RESULTWORD", "name": "get_weather", "tool_call_id": "c1"}


def calls(arguments: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"tool_calls": [call]}


CHATS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "system": {"system": {"messages": [SYSTEM, user("USERWORD"), assistant("ANSWORD")]}},
    "several turns": {
        "multi": {"messages": [user("USERWORD"), assistant("ANSWORD"), user("USERTWO"), assistant("ANSTWO")]},
        "system and multi": {
            "messages": [
                *(SYSTEM, user("USERWORD"), assistant("ANSWORD")),
                *(user("USERTWO"), assistant("ANSTWO")),
            ]
        },
    },
    "tools": {
        "instead of content, arguments as text": {
            "messages": [
                *(user("USERWORD"), assistant(None, **calls('{"city": "CALLWORD"}'))),
                *(RESULT, assistant("ANSWORD")),
            ],
            "tools": TOOLS,
        },
        "ShareGPT": {
            "conversations": [
                {"from": "human", "value": "USERWORD"},
                {
                    "from": "function_call",
                    "value": '{"name": "get_weather", "arguments": {"city": "CALLWORD"}}',
                },
                {"from": "observation", "value": "RESULTWORD"},
                {"from": "gpt", "value": "ANSWORD"},
            ],
            "tools": json.dumps([FUNCTION]),
        },
        "a function call of old": {
            "messages": [
                user("USERWORD"),
                assistant(None, function_call={"name": "get_weather", "arguments": '{"city": "CALLWORD"}'}),
                {"role": "function", "content": "RESULTWORD", "name": "get_weather"},
                assistant("ANSWORD"),
            ],
            "functions": [FUNCTION],
        },
    },
    "text and call": {
        "beside content, arguments as object": {
            "messages": [
                *(user("USERWORD"), assistant("ANSTEXTWORD", **calls({"city": "CALLWORD"}))),
                *(RESULT, assistant("ANSWORD")),
            ],
            "tools": TOOLS,
        },
    },
    "thoughts": {
        "reasoning_content": {
            "messages": [user("USERWORD"), assistant("ANSWORD", reasoning_content="THOUGHTWORD")]
        },
        "parts": {
            "messages": [
                user("USERWORD"),
                assistant(
                    [{"type": "thinking", "thinking": "THOUGHTWORD"}, {"type": "text", "text": "ANSWORD"}]
                ),
            ]
        },
        "inline": {"messages": [user("USERWORD"), assistant("<think>\nTHOUGHTWORD\n</think>\n\nANSWORD")]},
        "thinking, in each of several turns": {
            "messages": [
                *(user("USERWORD"), assistant("ANSWORD", thinking="THOUGHTWORD")),
                *(user("USERTWO"), assistant("ANSTWO", thinking="THOUGHTTWO")),
            ]
        },
    },
    "flags": {
        "weight": {
            "messages": [
                *(user("USERWORD"), assistant("BADWORD", weight=0)),
                *(user("USERTWO"), assistant("ANSWORD", weight=1)),
            ]
        }
    },
    "parts": {"parts": {"messages": [user([{"type": "text", "text": "USERWORD"}]), assistant("ANSWORD")]}},
    "opening": {"greeting": {"messages": [assistant("OPENWORD"), user("USERWORD"), assistant("ANSWORD")]}},
}
"""Records by the column of the table, and by their form."""


def peer_templates() -> dict[str, ChatTemplate]:
    """The templates among the peers' cases, by name."""
    found = {}
    for key, case in all_cases().items():
        if key.startswith(("hf_jinja/", "axolotl/")) and "chat_template" in case:
            given = {name: text for name, text in case.get("data", {}).items() if name.endswith("_token")}
            special = {"bos_token": "<s>", "eos_token": "</s>", **given}
            name = f"axolotl {case['template_name']}" if "template_name" in case else case["id"]
            found.setdefault(name, ChatTemplate(case["chat_template"], special))
    return found


def trl_templates(pattern: str) -> dict[str, ChatTemplate]:
    """The templates that come with TRL; the package is not imported, which would take seconds."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return {
        path.stem: ChatTemplate(path.read_text(encoding="utf-8"), special)
        for path in sorted(folder.glob(pattern))
    }


def rendered(template: ChatTemplate, record: dict[str, Any]) -> tuple[Conversation, Rendered]:
    conversation = read_record(record, FieldsSpec())
    assert isinstance(conversation, Conversation)
    return conversation, template.render(conversation)


def outcome(template: ChatTemplate, record: dict[str, Any]) -> str:
    """`✓`, what the template leaves out by its names, or that it refuses the chat."""
    try:
        conversation, found = rendered(template, record)
    except Malformed:
        return "refused"
    if found.lost:
        return ", ".join(f"`{name}`" for name in dict.fromkeys(part.name for part in found.lost))
    learned = [at for example in found.examples for at in example.answers]
    return "✓" if learned == list(conversation.learned) else "given"


def cell(template: ChatTemplate, forms: Mapping[str, dict[str, Any]]) -> str:
    """What becomes of a kind of chat, in whatever form it is written."""
    return " / ".join(dict.fromkeys(outcome(template, record) for record in forms.values()))


def lines() -> Iterator[str]:
    yield "| template | " + " | ".join(CHATS) + " |"
    yield "|---" * (len(CHATS) + 1) + "|"
    for name, template in peer_templates().items():
        yield f"| {name} | " + " | ".join(cell(template, forms) for forms in CHATS.values()) + " |"


def written() -> str:
    """The table that stands in the page."""
    return PAGE.read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]


if __name__ == "__main__":
    table = "\n".join(lines())
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(table)
