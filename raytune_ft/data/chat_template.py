"""The tokenizer's own chat template: what an answer is given, and where it begins and ends.

An answer is learned after exactly the text that the template gives to generation at that place. What is
learned is what the template writes beyond that text once the answer is there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from typing import Any, NamedTuple

from raytune_ft.data.conversation import Conversation, Malformed, Turn
from raytune_ft.data.coverage import Part, keys_of, marked, missing, parts_of, shape_of
from raytune_ft.data.message_forms import FIRST_FORM, MessageForm, forms_for, messages_in
from raytune_ft.data.segments import Example, Rendered, Segment, one_text

_PROBE = "\ue000probe\ue000"
"""An answer that shares neither its beginning nor its end with another."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MARKERS = re.compile(r"\s*(?:<[^<>\s]+>|\[[^\[\]\s]+\]|<[｜|][^<>]+[｜|]>)+")
_OPENING = re.compile(r"<[^<>]*(?:start|begin|user)[^<>]*>", re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
_CACHED_SHAPES = 4096


class _Choice(NamedTuple):
    """How the chats of a shape are given to the template, and what it leaves out all the same."""

    form: MessageForm
    lost: tuple[Part, ...]
    """Of the marked chat."""
    ends: Mapping[int, "_End"]
    """What follows each learned answer, by its place."""


class _End(NamedTuple):
    """What follows an answer in a rendering that ends with it."""

    suffix: str
    end: str
    """The part of the suffix that belongs to the answer."""
    inside: str
    """The part of that which stands behind the answer in a longer chat too."""


_NO_END = _End("", "", "")


class _Answer(NamedTuple):
    """An answer as the template writes it."""

    text: str
    """Without its end."""
    end: _End

    def segment(self, end: str, *, ends: bool) -> Segment:
        """The answer with an end."""
        return Segment(self.text + end, learned=True, ends_turn=ends)


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template."""

    source: str
    special_tokens: Mapping[str, str]
    end_tokens: tuple[str, ...] | None = None
    """Tokens that an answer can end with; None: any marker."""
    _choices: dict[Any, _Choice] = field(default_factory=dict, repr=False, compare=False)

    def render(self, conversation: Conversation) -> Rendered:
        """Segments of all learned answers, and what the template leaves out. See Template.

        A template that marks its answers itself, by `{% generation %}`, decides on what is learned. Else
        answers share an example as long as each one's own prompt begins with the text so far; where the
        template writes earlier turns differently, or an answer has no end of its own, a new example begins.
        """
        choice = self._choice(conversation)
        parts = list(parts_of(conversation))
        examples = self._marked_by_template(conversation, choice.form)
        if not examples or missing(parts, _texts(examples)):
            examples = self._examples(conversation, choice.form, dict(choice.ends))
        lost = missing(parts, _texts(examples))
        named = {(part.name, part.place) for part in lost}
        structural = {(part.name, part.place) for part in choice.lost} - named
        parts += keys_of(conversation)
        lost += [part for part in parts if (part.name, part.place) in structural]
        return Rendered(examples, tuple(lost))

    def open_answer(self, turns: tuple[Turn, ...]) -> tuple[Segment, ...]:
        """See Template."""
        conversation = Conversation((*turns, Turn("assistant", _PROBE)), (), "chat")
        form = self._choice(conversation).form
        return (Segment(self._prompt(conversation, len(turns), form), learned=False),)

    def _marked_by_template(self, conversation: Conversation, form: MessageForm) -> tuple[Example, ...]:
        """The whole chat, learned where `{% generation %}` says so; nothing where that is not each answer."""
        if not _GENERATION.search(self.source) or not conversation.learned:
            return ()
        stop = conversation.learned[-1] + 1
        answers = [at for at, turn in enumerate(conversation.turns[:stop]) if turn.role == "assistant"]
        text, spans = self._render(conversation, stop, form, return_assistant_tokens_mask=True)
        spans = _merged(spans)
        if len(spans) != len(answers):
            return ()
        segments: list[Segment] = []
        done = 0
        for at, (start, end) in zip(answers, spans, strict=True):
            if conversation.turns[at].learned:
                answer = text[start:end]
                segments.append(Segment(text[done:start], learned=False))
                segments.append(Segment(answer, learned=True, ends_turn=self._is_end(answer.rstrip())))
                done = end
        if not all(segment.ends_turn for segment in segments[1:-1:2]):
            return ()
        return (Example(one_text(segments), conversation.learned),)

    def text(self, conversation: Conversation, stop: int, form: MessageForm, *, opening: bool) -> str:
        """The first `stop` turns as the template writes them, with or without the opening of an answer.

        Raises:
            Malformed: the template refuses them.
        """
        return self._render(conversation, stop, form, add_generation_prompt=opening)[0]

    def _render(
        self, conversation: Conversation, stop: int, form: MessageForm, **settings: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Text of the first `stop` turns, and the characters that the template marks as answers."""
        variables = {**conversation.variables, **self.special_tokens}
        variables |= variables.pop("chat_template_kwargs", {})
        messages = messages_in(conversation.turns[:stop], form)
        tools = list(conversation.tools) or None
        try:
            text, spans = render_chat(self.source, messages, tools=tools, **settings, **variables)
            # A column's half of a surrogate pair may have come through.
            text.encode("utf-8")
        except Exception as error:  # A template is a program: it can fail in any way.
            raise Malformed(f"the tokenizer's chat template refuses it: {error}") from error
        return text, spans

    def _choice(self, conversation: Conversation) -> _Choice:
        """The form of messages in which least is lost, found once for each shape of chats.

        It depends on the shape alone: else the tokens of a chat would depend on the chats before it.
        """
        shape = shape_of(conversation)
        if shape not in self._choices:
            if len(self._choices) >= _CACHED_SHAPES:
                self._choices.clear()
            self._choices[shape] = self._choose(conversation)
        return self._choices[shape]

    def _choose(self, conversation: Conversation) -> _Choice:
        sample = marked(conversation)
        parts = list(parts_of(sample))
        best: _Choice | None = None
        for form in forms_for(conversation):
            ends: dict[int, _End] = {}
            try:
                examples = self._examples(sample, form, ends)
            except Malformed:
                continue
            lost = missing(parts, _texts(examples)) + self._unread_keys(sample, form, examples)
            if _is_misread("".join(_texts(examples))):
                continue
            if not lost:
                return _Choice(form, (), ends)
            if best is None or len(lost) < len(best.lost):
                best = _Choice(form, tuple(lost), ends)
        # A template that takes no form of the marked chat tells why with the chat itself.
        return best or _Choice(FIRST_FORM, (), {})

    def _unread_keys(
        self, conversation: Conversation, form: MessageForm, examples: Sequence[Example]
    ) -> list[Part]:
        """The keys of messages without which the same is rendered."""
        parts = list(keys_of(conversation))
        unread = set[str]()
        for key in {part.name for part in parts}:
            turns = tuple(
                turn._replace(other={name: value for name, value in turn.other.items() if name != key})
                for turn in conversation.turns
            )
            try:
                without = self._examples(conversation._replace(turns=turns), form, {})
            except Malformed:
                continue
            if without == examples:
                unread.add(key)
        return [part for part in parts if part.name in unread]

    def _examples(
        self, conversation: Conversation, form: MessageForm, ends: dict[int, _End]
    ) -> tuple[Example, ...]:
        """The learned answers, each after its own prompt; adds what follows each of them to `ends`."""
        examples: list[Example] = []
        prompt, last = "", _Answer("", _NO_END)
        for at in conversation.learned:
            found = self._answer(conversation, at, form, ends)
            if found is None:
                continue
            before, (prompt_before, last_before) = Example(()), (prompt, last)
            prompt, last = found
            # In the middle of a chat an answer may have less of an end than where the text ends with it.
            for end in (last_before.end.end, last_before.end.inside):
                text = prompt_before + last_before.text + end
                if examples and self._is_end(end) and prompt.startswith(text):
                    before = examples.pop()
                    before = before._replace(
                        segments=(*before.segments[:-1], last_before.segment(end, ends=True))
                    )
                    break
            given = Segment(prompt[len(text) :] if before.answers else prompt, learned=False)
            answer = last.segment(last.end.end, ends=self._is_end(last.end.end))
            examples.append(Example(one_text((*before.segments, given, answer)), (*before.answers, at)))
        return tuple(examples)

    def _answer(
        self, conversation: Conversation, at: int, form: MessageForm, ends: dict[int, _End]
    ) -> tuple[str, "_Answer"] | None:
        """An answer with its prompt; None where the template has no place for a chat that opens with it."""
        opens = not any(turn.role in ("user", "tool") for turn in conversation.turns[:at])
        try:
            whole = self.text(conversation, at + 1, form, opening=False)
            prompt = self._prompt(conversation, at, form)
        except Malformed:
            if not opens:
                raise
            return None
        end = ends.get(at)
        if end is None or not whole.endswith(end.suffix):
            end = self._find_end(conversation, at, form, whole)
            ends.setdefault(at, end)
        if whole.startswith(prompt):
            answer = whole[len(prompt) : len(whole) - len(end.suffix)]
        else:
            answer = self._difference(conversation, at, form, whole, prompt, end)
        if not end.end and conversation.turns[at].calls:
            answer, end = self._with_end_of_calls(answer)
        return prompt, _Answer(answer, end)

    def _with_end_of_calls(self, answer: str) -> tuple[str, _End]:
        """An answer, and the marker that the template writes behind calls alone."""
        token = next((token for token in self.end_tokens or () if answer.endswith(token)), "")
        return answer.removesuffix(token), _End(token, token, token)

    def _prompt(self, conversation: Conversation, at: int, form: MessageForm) -> str:
        """What generation is given before the answer at a place."""
        try:
            return self.text(conversation, at, form, opening=True)
        except Malformed:
            if at and any(turn.role in ("user", "tool") for turn in conversation.turns[:at]):
                raise
        # Nothing was asked yet: what all chats have that open with the assistant.
        whole, probe = (
            self._with_answer(conversation, at, form, Turn("assistant", text)) for text in (_PROBE, "x")
        )
        return _shared_prefix(whole, probe)

    def _with_answer(self, conversation: Conversation, at: int, form: MessageForm, answer: Turn) -> str:
        """The chat up to a place with another answer there."""
        turns = (*conversation.turns[:at], answer)
        return self.text(conversation._replace(turns=turns), at + 1, form, opening=False)

    def _difference(
        self, conversation: Conversation, at: int, form: MessageForm, whole: str, prompt: str, end: _End
    ) -> str:
        """An answer after a prompt that is not how the whole begins: what depends on the answer in the whole.

        What the template writes between the last thing asked and the answer, beyond the prompt's own end,
        belongs to the answer too.
        """
        other = self._with_answer(conversation, at, form, Turn("assistant", _PROBE))
        before = _shared_prefix(whole, other)
        answer = whole[len(before) : len(whole) - len(end.suffix)]
        asked = conversation.turns[at - 1].text.strip() if at else ""
        opening = prompt[prompt.rfind(asked) + len(asked) :] if asked and asked in prompt else None
        written = before[before.rfind(asked) + len(asked) :] if asked and asked in before else ""
        if opening is not None and written.startswith(opening):
            return written[len(opening) :] + answer
        if _OPEN_THOUGHT.search(prompt):
            thoughts = conversation.turns[at].thoughts
            return f"{thoughts}\n</think>\n\n{answer}"
        return answer

    def _find_end(self, conversation: Conversation, at: int, form: MessageForm, whole: str) -> _End:
        """What stands behind any answer, and how much of it ends the answer."""
        try:
            other = self._with_answer(conversation, at, form, Turn("assistant", _PROBE))
        except Malformed:
            other = ""
        suffix = _shared_prefix(whole[::-1], other[::-1])[::-1]
        if not suffix.strip():
            return _End(suffix, "", "")
        following = self._following(conversation, at, form)
        if following is None or following.startswith(suffix.rstrip()):
            return _End(suffix, suffix.rstrip(), suffix.rstrip())
        inside = self._without_opening(_shared_prefix(suffix, following))
        # A template that ends each text with the opening of an answer has that in the suffix too.
        opens = not self._opens_on_request(conversation, at, form)
        return _End(suffix, inside if opens else suffix.rstrip(), inside)

    def _without_opening(self, shared: str) -> str:
        """The markers that a text begins with, up to EOS or to the one that opens the next turn."""
        eos = self.special_tokens.get("eos_token")
        if eos and eos in shared:
            return shared[: shared.index(eos) + len(eos)]
        markers = _MARKERS.match(shared)
        opening = _OPENING.search(markers[0]) if markers else None
        return "" if markers is None else markers[0][: opening.start() if opening else None]

    def _opens_on_request(self, conversation: Conversation, at: int, form: MessageForm) -> bool:
        """Whether the opening of an answer is written only where it is asked for."""
        try:
            return self.text(conversation, at, form, opening=True) != self.text(
                conversation, at, form, opening=False
            )
        except Malformed:
            return True

    def _following(self, conversation: Conversation, at: int, form: MessageForm) -> str | None:
        """What the template writes between an answer and what the user says next, if it shows both."""
        turns = (*conversation.turns[:at], Turn("assistant", _PROBE), Turn("user", "\ue001"))
        try:
            text = self.text(conversation._replace(turns=turns), at + 2, form, opening=False)
        except Malformed:
            return None
        _, answer, rest = text.rpartition(_PROBE)
        between, user, _ = rest.partition("\ue001")
        return between if answer and user else None

    def _is_end(self, end: str) -> bool:
        if self.end_tokens is None:
            return bool(end)
        return end.endswith(self.end_tokens)


def _shared_prefix(one: str, other: str) -> str:
    """The characters that both texts begin with.

    >>> _shared_prefix("<step> user", "<step> assistant")
    '<step> '
    """
    return one[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))]


def _texts(examples: Iterable[Example]) -> list[str]:
    return ["".join(segment.text for segment in example.segments) for example in examples]


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that hold text, of which none begins where the one before it stops.

    >>> _merged([(1, 3), (3, 4), (5, 5), (6, 9)])
    [(1, 4), (6, 9)]
    """
    merged: list[tuple[int, int]] = []
    for start, stop in (span for span in spans if span[0] < span[1]):
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _is_misread(text: str) -> bool:
    """Whether lists or objects stand there as Python writes them, or as JSON inside a JSON string."""
    return "{'mark" in text or "[{'type'" in text or '\\"mark' in text


_DATE = datetime(2024, 7, 26)


def _date(form: str) -> str:
    """What templates that begin with the date get: else the same data had other tokens each day."""
    return _DATE.strftime(form)


def render_chat(
    source: str, messages: list[dict[str, Any]], **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """A chat template's text as `apply_chat_template` renders it: the same sandbox, filters and functions.

    But for the clock: a template that asks for the date gets the same one always.

    Returns:
        The text, and the characters inside `{% generation %}` where `return_assistant_tokens_mask` asks for
        them.
    """
    # This module of transformers comes without torch; it is imported where a chat template is used.
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    # It compiles each template once, and takes no functions as variables.
    _compile_jinja_template(source).environment.globals["strftime_now"] = _date
    texts, spans = render_jinja_template(conversations=[messages], chat_template=source, **variables)
    return str(texts[0]), list(spans[0]) if spans else []
