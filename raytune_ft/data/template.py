"""How a conversation becomes text: built-in templates, inline Jinja2, the tokenizer's own chat template.

A template gives segments. What the model is given is not learned; what it answers is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raytune_ft.data.encoder import Encoder
from raytune_ft.data.records import Conversation, Malformed, PlainText, Turn
from raytune_ft.errors import DataError

AUTO = "auto"
CHAT = "chat"
RAW_TEXT = "text"


class Segment(NamedTuple):
    """A piece of text, tokenised by itself."""

    text: str
    learned: bool
    ends_turn: bool = False
    """The template itself wrote the end of the answer, such as `<|im_end|>`."""


class Template(Protocol):
    """Renders conversations."""

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """Segments of a whole conversation. Raises Malformed where the template has no place for a turn."""

    def open_answer(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """Segments that generation is given: all turns, and the beginning of the next answer."""


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
    name: str = ""

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """See Template."""
        return self._segments(conversation.turns)[0]

    def open_answer(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """See Template."""
        segments, rest = self._segments(turns)
        return (*segments, Segment(rest + self._fill(self.opening), learned=False))

    def _segments(self, turns: Sequence[Turn]) -> tuple[tuple[Segment, ...], str]:
        """Segments up to the last answer, and the text after it."""
        segments = []
        system = prompt = ""
        opening, end, between = self._around_answers
        for turn in turns:
            if turn.role == "assistant":
                segments.append(Segment(prompt + opening, False))
                segments.append(Segment(self.lead + turn.text + end, True, bool(end)))
                prompt = between
            elif turn.role == "system" and not self.system:
                system += f"{turn.text}\n\n"
            else:
                prompt += self._ask(turn, system)
                system = ""
        return tuple([segment for segment in segments if segment.text]), prompt

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
        if not form:
            raise Malformed(f"template {self.name} has no place for a {turn.role} turn")
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

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """See Template."""
        prompt = self._fill(conversation.columns, conversation.turns[:-1])
        answer = Segment(conversation.turns[-1].text, learned=True)
        return (Segment(prompt, learned=False), answer) if prompt else (answer,)

    def open_answer(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """See Template. A prompt from the command line stands in every usual prompt column."""
        asked = turns[-1].content
        columns = {"prompt": asked, "instruction": asked, "question": asked, "input": turns[-1].context}
        return (Segment(self._fill(columns, turns), learned=False),)

    def _fill(self, columns: Mapping[str, Any], turns: Sequence[Turn]) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return _encodable(self.compiled.render({"messages": messages, **columns}))
        except Exception as error:  # A template is a program: it can fail in any way.
            known = ", ".join(columns) or "none"
            raise Malformed(
                f"template {shortened(self.source)}: {error}; besides the completion the record has {known}"
            ) from error


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template. Where turns begin and end is found by rendering prefixes."""

    source: str
    special_tokens: Mapping[str, str]

    def render(self, conversation: Conversation) -> tuple[Segment, ...]:
        """See Template. A template that rewrites earlier turns has its last answer learned alone."""
        turns = conversation.turns
        answers = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
        whole = self.text(turns, opening=False)
        segments = self._slice(whole, turns, answers) or self._slice(whole, turns, answers[-1:])
        if segments is None:
            raise Malformed(
                "the tokenizer's chat template does not render the last answer after its own prompt"
            )
        return segments

    def open_answer(self, turns: Sequence[Turn]) -> tuple[Segment, ...]:
        """See Template."""
        return (Segment(self.text(turns, opening=True), learned=False),)

    def text(self, turns: Sequence[Turn], *, opening: bool) -> str:
        """The turns as the template writes them, with or without the opening of an answer."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return _encodable(
                render_chat(self.source, messages, add_generation_prompt=opening, **self.special_tokens)
            )
        except Exception as error:  # A template is a program: it can fail in any way.
            raise Malformed(f"the tokenizer's chat template refuses it: {error}") from error

    def _slice(self, whole: str, turns: Sequence[Turn], answers: Sequence[int]) -> tuple[Segment, ...] | None:
        """Segments with these answers learned, or None where a prefix does not begin the whole."""
        segments = []
        done = 0
        for at in answers:
            before = self.text(turns[:at], opening=True)
            after = whole if at == len(turns) - 1 else self.text(turns[: at + 1], opening=False)
            if not (
                whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after)
            ):
                return None
            answer = self._answer(after[len(before) :], turns[at].text)
            segments += [Segment(whole[done : len(before)], learned=False), answer]
            done = len(before) + len(answer.text)
        return tuple(segments)

    def _answer(self, rendered: str, answer: str) -> Segment:
        """Without the white space that follows an end-of-turn marker: generation stops at the marker."""
        stripped, spoken = rendered.rstrip(), answer.strip()
        at = stripped.find(spoken)
        # Not endswith: an answer may be how the marker ends, such as ">".
        marked = at < 0 or at + len(spoken) < len(stripped)
        return Segment(stripped if marked else rendered, learned=True, ends_turn=marked)


_DATE = datetime(2024, 7, 26)


def _date(form: str) -> str:
    """What templates that begin with the date get: else the same data had other tokens each day."""
    return _DATE.strftime(form)


def render_chat(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """A chat template's text as `apply_chat_template` renders it: the same sandbox, filters and functions.

    But for the clock: a template that asks for the date gets the same one always.
    """
    # This module of transformers comes without torch; it is imported where a chat template is used.
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    # It compiles each template once, and takes no functions as variables.
    _compile_jinja_template(source).environment.globals["strftime_now"] = _date
    rendered = render_jinja_template(conversations=[messages], chat_template=source, **variables)
    text: str = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
    return text


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


def render(name: str, record: Conversation | PlainText, encoder: Encoder) -> tuple[Segment, ...]:
    """Segments of a record.

    Args:
        name: a concrete template, see `concrete_name`.
        record: what to render.
        encoder: the tokenizer's.

    Raises:
        Malformed: the template has no place for what the record holds.
        DataError: see `check_templates`.
    """
    if name == RAW_TEXT and isinstance(record, PlainText):
        return (Segment(record.text, learned=True),)
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
        return ChatTemplate(encoder.chat_template, encoder.special_tokens)
    if "{{" in name or "{%" in name:
        return InlineTemplate(name, _compile(name))
    return _built_in(name, encoder.eos_token)


@lru_cache(maxsize=64)
def _built_in(name: str, eos: str) -> TurnFormat:
    if name not in TEMPLATES:
        known = ", ".join((AUTO, CHAT, RAW_TEXT, *TEMPLATES))
        raise DataError(f"template: {name}: no such template; take {known}, or inline Jinja2")
    return replace(TEMPLATES[name], eos=eos, name=name)


@lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"template {shortened(source)}: line {error.lineno}: {error.message}") from None
    except (SyntaxError, RecursionError) as error:
        # Jinja2 takes deeper nesting than Python, which it compiles to.
        raise DataError(f"template {shortened(source)}: {error}; write it simpler") from None


def _encodable(rendered: str) -> str:
    """The text, if tokenizers take it: a column's half of a surrogate pair may have come through.

    Raises:
        UnicodeEncodeError: it is not.
    """
    rendered.encode("utf-8")
    return rendered


def shortened(template: str) -> str:
    """A template's name or the beginning of its text, on one line."""
    text = re.sub(r"\s+", " ", template)
    return text if len(text) <= 60 else f"{text[:60]}…"
