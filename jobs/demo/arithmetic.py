"""The demo's data and model, made from nothing: arithmetic in words, and a language model of 0.7M weights.

    python jobs/demo/arithmetic.py --to DIR [--seed 0]

writes

    DIR/data/addition.jsonl, copying.jsonl, comparing.jsonl           what the base model learns first
    DIR/data/subtraction.jsonl, smaller.jsonl, swapping.jsonl, successor.jsonl,
             multiplication.jsonl, division.jsonl                     what it can be taught afterwards
    DIR/model/                    a Llama with random weights; its tokens are whole words and single digits

Each line holds a `prompt`, its `completion`, and the `pair` of numbers that they are about. Each pair
stands there in several phrasings; a job that splits by `pair` tests pairs that it has not seen in any.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LARGEST_NUMBER = 49

Pairs = tuple[tuple[int, int], ...]

PIECE = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^A-Za-z0-9\s]|\s")
"""A token: a digit, or a word or sign with the space before it, so that decoding gives the text back.
A digit has no variant with a space: it means the same in every place, so one embedding serves."""


@dataclass(frozen=True)
class Operation:
    """A task over two integers; `{a}` and `{b}` stand in its phrasings."""

    name: str
    phrasings: tuple[str, ...]
    """All name `a` before `b`: the order that has to be learned is one."""
    answer: Callable[[int, int], str]
    pairs: Pairs


@dataclass(frozen=True)
class Example:
    """One line of a data file."""

    pair: str
    prompt: str
    completion: str

    def line(self) -> str:
        """The example as a line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def _quotient(a: int, b: int) -> str:
    quotient, remainder = divmod(a, b)
    return f"{quotient} remainder {remainder}" if remainder else str(quotient)


_ALL: Pairs = tuple((a, b) for a in range(LARGEST_NUMBER + 1) for b in range(LARGEST_NUMBER + 1))

OPERATIONS = (
    Operation(
        "addition",
        ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} ="),
        lambda a, b: str(a + b),
        pairs=_ALL,
    ),
    Operation(
        "copying",
        ("Say {a} and {b}.", "Repeat the numbers {a} and {b}.", "{a} , {b} ="),
        lambda a, b: f"{a} {b}",
        pairs=_ALL,
    ),
    Operation(
        "comparing",
        ("Which is larger, {a} or {b}?", "Give the larger of {a} and {b}.", "larger {a} {b} ="),
        lambda a, b: str(max(a, b)),
        pairs=_ALL,
    ),
    Operation(
        "subtraction",
        # New to the base model are only "minus" and "-": an adapter leaves the embeddings of words as they
        # are, and those that were never trained are random.
        ("What is {a} minus {b}?", "Give {a} minus {b}.", "{a} - {b} ="),
        lambda a, b: str(a - b),
        pairs=tuple((a, b) for a, b in _ALL if a >= b),
    ),
    # The next three reuse what the base knows, in other words: a fleet teaches them beside subtraction.
    Operation(
        "smaller",
        ("Which is smaller, {a} or {b}?", "Give the smaller of {a} and {b}.", "smaller {a} {b} ="),
        lambda a, b: str(min(a, b)),
        pairs=_ALL,
    ),
    Operation(
        "swapping",
        ("Swap {a} and {b}.", "Swap the numbers {a} and {b}.", "{a} ; {b} ="),
        lambda a, b: f"{b} {a}",
        pairs=_ALL,
    ),
    Operation(
        "successor",
        ("What follows {a} plus {b}?", "Give the number after {a} plus {b}.", "after {a} + {b} ="),
        lambda a, b: str(a + b + 1),
        pairs=_ALL,
    ),
    Operation(
        "multiplication",
        ("What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b} ="),
        lambda a, b: str(a * b),
        pairs=_ALL,
    ),
    Operation(
        "division",
        ("What is {a} divided by {b}?", "Divide {a} by {b}.", "{a} / {b} ="),
        _quotient,
        pairs=tuple((a, b) for a, b in _ALL if b > 0),
    ),
)


def examples(operation: Operation, seed: int) -> list[Example]:
    """Every pair of an operation in every phrasing, in an order that depends on the seed.

    >>> examples(OPERATIONS[3], seed=0)[0]
    Example(pair='47 2', prompt='47 - 2 =', completion='45')
    """
    made = [
        Example(f"{a} {b}", phrasing.format(a=a, b=b), operation.answer(a, b))
        for a, b in operation.pairs
        for phrasing in operation.phrasings
    ]
    random.Random(f"{seed}/{operation.name}").shuffle(made)
    return made


def vocabulary() -> list[str]:
    """Special tokens, white space, digits, then every word and sign, both without and with a space."""
    texts = [phrasing.format(a=0, b=0) for task in OPERATIONS for phrasing in task.phrasings]
    pieces = {piece.strip() for text in [*texts, _quotient(3, 2)] for piece in PIECE.findall(text)}
    words = sorted(piece for piece in pieces if piece and not piece.isdecimal())
    return ["<pad>", "<eos>", "<unk>", " ", "\n", *"0123456789", *words, *(f" {word}" for word in words)]


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer over `vocabulary()`; it adds nothing of its own, and pads with a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbered = {token: number for number, token in enumerate(vocabulary())}
    words = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))  # noqa: S106  # a token of text
    words.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE.pattern), behavior="isolated")
    words.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)


def write_model(folder: Path, seed: int) -> None:
    """Write a Llama with random weights, its configuration and its tokenizer; loads with `AutoModel…`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path, seed: int) -> None:
    """Write one file of JSON lines for each operation."""
    folder.mkdir(parents=True, exist_ok=True)
    for operation in OPERATIONS:
        lines = [example.line() for example in examples(operation, seed)]
        (folder / f"{operation.name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the demo's data and its untrained model.")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_data(options.to / "data", options.seed)
    write_model(options.to / "model", options.seed)


if __name__ == "__main__":
    main()
