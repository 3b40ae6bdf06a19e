"""How a conversation becomes text: built-in templates, inline Jinja2, the tokenizer's own chat template.

A template gives segments. What the model is given is not learned; what it answers is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raytune_ft.data.chat_template import ChatTemplate
from raytune_ft.data.conversation import Conversation, Malformed, PlainText, Turn
from raytune_ft.data.coverage import TURN_PARTS, Part, keys_of, missing, parts_of
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.segments import Example, Rendered, Segment
from raytune_ft.data.values import as_json
from raytune_ft.errors import DataError

AUTO = "auto"
CHAT = "chat"
RAW_TEXT = "text"


class Template(Protocol):
    """Renders conversations."""

    def render(self, conversation: Conversation) -> Rendered:
        """Render the learned answers of a conversation, each after what it is given.

        Raises:
            Malformed: the template refuses the conversation.
        """

    def open_answer(self, turns: tuple[Turn, ...]) -> tuple[Segment, ...]:
        """Return what generation is given: all turns, and the beginning of the next answer."""


@dataclass(frozen=True)
class TurnFormat:
    """A built-in template: what stands around each turn. `{eos}` is the tokenizer's EOS token.

    An answer is `opening` (not learned), then `lead`, the answer and `end` (learned). `between` follows it
    where another turn does. An answer's own leading space is therefore learned, as part of its first token.
    """

    user: str
    user_with_context: str = ""
    """For turns with a context; '' joins both by a newline and takes `user`."""
    system: str = ""
    """'' puts the system text before the first user's, with a blank line."""
    tool: str = ""
    """'' refuses tool turns."""
    opening: str = ""
    lead: str = ""
    end: str = ""
    between: str = ""
    eos: str = ""

    end_tokens: tuple[str, ...] | None = None
    """Tokens that an answer can end with; None: any marker."""

    def render(self, conversation: Conversation) -> Rendered:
        """See Template.

        Answers share an example where the format ends them with a token; where EOS has to end them, each has
        one of its own.
        """
        turns = conversation.turns
        learned = [at for at in conversation.learned if turns[at].text.strip()]
        groups = [learned] if self._ends_turn else [[at] for at in learned]
        examples = tuple(
            Example(self._segments(turns[: group[-1] + 1], group), tuple(group)) for group in groups if group
        )
        return Rendered(examples, () if conversation.is_plain else tuple(self._without_place(conversation)))

    def open_answer(self, turns: tuple[Turn, ...]) -> tuple[Segment, ...]:
        """See Template."""
        asked = (*turns, Turn("assistant", "answer"))
        answers = [at for at, turn in enumerate(asked) if turn.role == "assistant"]
        return self._segments(asked, answers if self._ends_turn else answers[-1:])[:-1]

    def _segments(self, turns: Sequence[Turn], learned: Sequence[int]) -> tuple[Segment, ...]:
        """Segments of turns of which the last is learned."""
        segments: list[Segment] = []
        system = prompt = ""
        opening, end, between = self._around_answers
        for at, turn in enumerate(turns):
            if turn.role == "assistant":
                answer = self.lead + turn.inline_text + end
                if at in learned:
                    segments.append(Segment(prompt + opening, learned=False))
                    segments.append(Segment(answer, learned=True, ends_turn=self._ends_turn))
                    prompt = between
                elif turn.text.strip():
                    prompt += opening + answer + between
            elif turn.role == "system" and not self.system:
                system += f"{turn.text}\n\n"
            elif turn.role != "tool" or self.tool:
                prompt += self._ask(turn, system)
                system = ""
        return tuple(segment for segment in segments if segment.text)

    @property
    def _ends_turn(self) -> bool:
        """Whether the format's own end is one by which generation stops."""
        end = self._around_answers[1]
        return bool(end) if self.end_tokens is None else end.endswith(self.end_tokens)

    def _without_place(self, conversation: Conversation) -> Iterable[Part]:
        """What the conversation says and this format has no place for."""
        yield from keys_of(conversation)
        for part in parts_of(conversation):
            if (part.name == "tool" and not self.tool) or part.name not in (*TURN_PARTS.values(), "thoughts"):
                yield part

    @cached_property
    def _around_answers(self) -> tuple[str, str, str]:
        return self._fill(self.opening), self._fill(self.end), self._fill(self.between)

    @cached_property
    def _around_user(self) -> tuple[str, str]:
        before, _, after = self.user.partition("{content}")
        return self._fill(before), self._fill(after)

    def _ask(self, turn: Turn, system: str) -> str:
        if turn.role == "user":
            if turn.context and self.user_with_context:
                return self._fill(self.user_with_context, content=system + turn.content, context=turn.context)
            before, after = self._around_user
            return before + system + turn.text + after
        form = self.system if turn.role == "system" else self.tool
        return self._fill(form, content=system + turn.text)

    def _fill(self, form: str, **values: str) -> str:
        return form.format(eos=self.eos, **values)


TEMPLATES: Mapping[str, TurnFormat] = {
    "instruction": TurnFormat(
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        user_with_context="### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
        opening="### Response:\n",
        between="\n\n",
    ),
    "plain": TurnFormat(system="{content}\n", user="{content}", between="\n"),
    "qa": TurnFormat(
        system="{content}\n\n",
        user="Question: {content}\n",
        user_with_context="Context: {context}\nQuestion: {content}\n",
        opening="Answer:",
        lead=" ",
        between="\n\n",
    ),
    "chatml": TurnFormat(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        tool="<|im_start|>tool\n{content}<|im_end|>\n",
        opening="<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
    ),
    "llama3": TurnFormat(
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        tool="<|start_header_id|>ipython<|end_header_id|>\n\n{content}<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    "mistral": TurnFormat(user="[INST] {content}[/INST]", lead=" ", end="{eos}"),
    "gemma": TurnFormat(
        user="<start_of_turn>user\n{content}<end_of_turn>\n",
        opening="<start_of_turn>model\n",
        end="<end_of_turn>",
        between="\n",
    ),
    "phi3": TurnFormat(
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n",
        opening="<|assistant|>\n",
        end="<|end|>",
        between="\n",
    ),
    "vicuna": TurnFormat(
        system="{content}\n\n",
        user="USER: {content}\n",
        opening="ASSISTANT:",
        lead=" ",
        end="{eos}",
        between="\n",
    ),
    "zephyr": TurnFormat(
        system="<|system|>\n{content}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        opening="<|assistant|>\n",
        end="{eos}",
        between="\n",
    ),
}


@dataclass(frozen=True)
class InlineTemplate:
    """Jinja2 from the job file. It renders the prompt from the record's columns; the completion follows.

    The completion's column is not among the variables, so that no prompt can give the answer away. Of a
    chat, `messages` are the turns before the last.
    """

    source: str
    compiled: jinja2.Template

    def render(self, conversation: Conversation) -> Rendered:
        """See Template. The last answer alone is learned."""
        *given, answer = conversation.turns
        prompt = self._fill(conversation.columns, given)
        if not answer.learned:
            return Rendered((Example(()),))
        learned = Segment(answer.inline_text, learned=True)
        segments = (Segment(prompt, learned=False), learned) if prompt else (learned,)
        lost: list[Part] = []
        if conversation.shape == "chat":
            # Of other records the template takes the columns that its author wants.
            lost = missing(parts_of(conversation), [prompt + answer.inline_text])
            lost += keys_of(conversation)
        return Rendered((Example(segments, (len(given),)),), tuple(lost))

    def open_answer(self, turns: tuple[Turn, ...]) -> tuple[Segment, ...]:
        """See Template. A prompt from the command line stands in every usual prompt column."""
        asked = turns[-1].content
        columns = {"prompt": asked, "instruction": asked, "question": asked, "input": turns[-1].context}
        return (Segment(self._fill(columns, turns), learned=False),)

    def _fill(self, columns: Mapping[str, Any], turns: Sequence[Turn]) -> str:
        try:
            rendered = self.compiled.render(
                {"messages": [_inline_message(turn) for turn in turns], **columns}
            )
            # A column's half of a surrogate pair may have come through.
            rendered.encode("utf-8")
        except Exception as error:  # A template is a program: it can fail in any way.
            known = ", ".join(columns) or "none"
            raise Malformed(
                f"template {shortened(self.source)}: {error}; besides the completion the record has {known}"
            ) from error
        return rendered


def _inline_message(turn: Turn) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in turn.calls]
    return {"role": turn.role, "content": turn.inline_text, **({"tool_calls": calls} if calls else {})}


def check_templates(templates: Iterable[str], encoder: Encoder) -> None:
    """Find out before any data is read whether the templates of `data.sources` can be used.

    Raises:
        DataError: there is no such template, it is no Jinja2, or the tokenizer has no chat template.
    """
    for source, template in enumerate(templates):
        if template not in (AUTO, RAW_TEXT):
            try:
                find_template(template, encoder)
            except DataError as error:
                raise DataError(f"data.sources[{source}].{error}") from None


def concrete_name(template: str, record: Conversation | PlainText, encoder: Encoder) -> str:
    """What `auto` means for a record; any other template is itself.

    Chats take the tokenizer's chat template, where it has one; columns named prompt are taken as they are;
    everything else that has a completion takes `instruction`; raw text is `text`.
    """
    if template != AUTO:
        return template
    if isinstance(record, PlainText):
        return RAW_TEXT
    if record.shape == "chat" and encoder.chat_template is not None:
        return CHAT
    return "plain" if record.shape == "prompt" else "instruction"


def render(name: str, record: Conversation | PlainText, encoder: Encoder) -> Rendered:
    """Render a record.

    Args:
        name: a concrete template, see `concrete_name`.
        record: what to render.
        encoder: the tokenizer's.

    Raises:
        Malformed: the template refuses the record.
        DataError: see `check_templates`.
    """
    if name == RAW_TEXT and isinstance(record, PlainText):
        return Rendered((Example((Segment(record.text, learned=True),)),))
    if name == RAW_TEXT or isinstance(record, PlainText):
        found = "raw text" if isinstance(record, PlainText) else "a prompt and a completion"
        raise Malformed(f"the record is {found}, which template {shortened(name)} does not take; auto does")
    return find_template(name, encoder).render(record)


def find_template(name: str, encoder: Encoder) -> Template:
    """The template of that name, or the inline one of that text.

    Raises:
        DataError: see `check_templates`.
    """
    if name == CHAT:
        if encoder.chat_template is None:
            raise DataError(
                "template: chat, but the model's tokenizer has no chat template; "
                f"take one of {', '.join(TEMPLATES)}"
            )
        names = tuple(sorted(encoder.special_tokens.items()))
        return _chat_template(encoder.chat_template, names, encoder.end_tokens)
    if "{{" in name or "{%" in name:
        return InlineTemplate(name, _compile(name))
    return _built_in(name, encoder.eos_token, encoder.end_tokens)


@lru_cache(maxsize=8)
def _chat_template(
    source: str, special_tokens: tuple[tuple[str, str], ...], end_tokens: tuple[str, ...]
) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens), end_tokens)


@lru_cache(maxsize=64)
def _built_in(name: str, eos: str, end_tokens: tuple[str, ...]) -> TurnFormat:
    if name not in TEMPLATES:
        known = ", ".join((AUTO, CHAT, RAW_TEXT, *TEMPLATES))
        raise DataError(f"template: {name}: no such template; take {known}, or inline Jinja2")
    return replace(TEMPLATES[name], eos=eos, end_tokens=end_tokens)


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        finalize=_written,
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"template {shortened(source)}: line {error.lineno}: {error.message}") from None
    except (SyntaxError, RecursionError) as error:
        # Jinja2 takes deeper nesting than Python, which it compiles to.
        raise DataError(f"template {shortened(source)}: {error}; write it simpler") from None


def _written(value: Any) -> Any:
    """What an expression of an inline template writes: text as it is, everything else as JSON."""
    return value if isinstance(value, str | jinja2.Undefined) else as_json(value)


def shortened(template: str) -> str:
    """A template's name or the beginning of its text, on one line."""
    text = re.sub(r"\s+", " ", template)
    return text if len(text) <= 60 else f"{text[:60]}…"
