"""Conversations: the turns of a record, with everything that each of them says."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Malformed(Exception):
    """A record that cannot be trained on; the message is the reason. Never leaves the data package."""


class ToolCall(NamedTuple):
    """A function that the assistant calls."""

    name: str
    arguments: Any
    """The parsed JSON; the text itself where it is not JSON."""
    id: str = ""


class Turn(NamedTuple):
    """What one side says."""

    role: Role
    content: str = ""
    context: str = ""
    """Text that the content is about, where the record keeps it apart."""
    thoughts: str = ""
    """What the assistant thinks before it answers."""
    calls: tuple[ToolCall, ...] = ()
    learned: bool = True
    """Whether an answer is learned; it is given otherwise. Only answers are learned."""
    name: str = ""
    """Who speaks: the function whose result a tool turn holds, or a named participant."""
    call_id: str = ""
    """The call that a tool turn answers."""
    other: Mapping[str, Any] = _NOTHING
    """Keys of the message that only a chat template may know."""
    inline: str = ""
    """The content as it was, where the thoughts stood in it."""

    @property
    def text(self) -> str:
        """Content and context together."""
        return f"{self.content}\n{self.context}" if self.context else self.content

    @property
    def inline_text(self) -> str:
        """The text with the thoughts before it, in a `<think>` block as a content holds it."""
        return (
            self.inline or f"<think>\n{self.thoughts}\n</think>\n\n{self.text}"
            if self.thoughts
            else self.text
        )


class Conversation(NamedTuple):
    """Turns of which the last is the assistant's."""

    turns: tuple[Turn, ...]
    references: tuple[str, ...]
    """Texts that the last turn may equally be; the first is the one that is learned."""
    shape: Literal["chat", "prompt", "instruction"]
    columns: Mapping[str, Any] = _NOTHING
    """The record's own columns without the completion: what an inline template sees."""
    tools: tuple[Any, ...] = ()
    """Schemas of the functions that the assistant may call."""
    variables: Mapping[str, Any] = _NOTHING
    """Columns that a chat template gets by name, such as `documents`."""
    unread: Mapping[str, Any] = _NOTHING
    """Columns of a chat that nothing has read."""
    dropped_thoughts: int = 0
    """Turns whose thoughts the job told to drop."""

    @property
    def input_text(self) -> str:
        """Everything before the first answer to a user or tool: what decides on the split.

        All answers may be learned, so whatever begins with the same question has to stand on the same side:
        a question of the test split must not be the beginning of a longer chat in training.
        """
        said: list[str] = []
        asked = False
        for turn in self.turns:
            if asked and turn.role == "assistant":
                break
            asked = asked or turn.role in ("user", "tool")
            said.append(turn.text)
        return "\n".join(said)

    @property
    def is_plain(self) -> bool:
        """Whether nothing is said but texts by system, user and assistant."""
        if self.tools or self.variables or (self.unread and self.shape == "chat"):
            return False
        return not any(turn.calls or turn.other or turn.role == "tool" for turn in self.turns)

    @property
    def learned(self) -> tuple[int, ...]:
        """Places of the answers that are learned."""
        return tuple(at for at, turn in enumerate(self.turns) if turn.role == "assistant" and turn.learned)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text that is learned from its first token to its last."""

    text: str

    @property
    def input_text(self) -> str:
        """The text itself decides on the split."""
        return self.text


def check_label(record: Conversation | PlainText, labels: Collection[str]) -> None:
    """Refuse what a classifier cannot learn from.

    Raises:
        Malformed: the completion is none of the labels, or there is none.
    """
    if isinstance(record, PlainText):
        raise Malformed("the record is raw text; a classifier needs a prompt, and a completion as its label")
    said = record.turns[-1].text.strip()
    if said not in labels:
        raise Malformed(
            f"the completion '{said:.60}' is none of model.labels ({', '.join(labels):.200}); "
            "add it there, or correct the record"
        )
