"""What the data benchmarks read: instructions varied from real ones, and GPT-2's tokenizer."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
EOS = "<|endoftext|>"
_FILE_BYTES = 128 << 20
_NUMBER = re.compile(r"\d+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def check_shared() -> None:
    """Stop with one line where the records and the vocabulary are not here."""
    if not SHARED.is_dir():
        raise SystemExit(f"the data benchmarks need {SHARED}, and it is not here")


def save_tokenizer(folder: Path) -> None:
    """GPT-2's tokenizer as `tokenizer.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = SHARED / "tokenizers" / "gpt2"
    tokenizer = ByteLevelBPETokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def save_rows(path: Path, count: int, seed: int = 0) -> None:
    """`count` instructions as JSON lines, about 570 bytes each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in instructions(count, seed))


def save_folder(folder: Path, size_bytes: int, rows: Path) -> None:
    """Files of about 128 MiB, in all about `size_bytes`: the lines of `rows`, again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    content = rows.read_bytes()
    lines = content[: content.rfind(b"\n") + 1]
    for number, start in enumerate(range(0, size_bytes, _FILE_BYTES)):
        wanted = min(_FILE_BYTES, size_bytes - start)
        with (folder / f"part-{number:03}.jsonl").open("wb") as file:
            for _ in range(wanted // len(lines)):
                file.write(lines)
            rest = wanted % len(lines)
            file.write(lines[: lines.rfind(b"\n", 0, rest) + 1])


def instructions(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Real instructions, each time with other numbers and the sentences of the answer in another order."""
    draw = random.Random(seed)
    real = list(_real())
    for number in range(count):
        instruction, answer = real[number % len(real)]
        sentences = _SENTENCE_END.split(answer)
        draw.shuffle(sentences)
        yield {
            "instruction": _other_numbers(instruction, draw),
            "output": _other_numbers(" ".join(sentences), draw),
        }


def _real() -> Iterator[tuple[str, str]]:
    folder = SHARED / "instruct"
    for line in (folder / "gsm8k" / "train_head1500.jsonl").read_text().splitlines():
        record = json.loads(line)
        yield record["question"], record["answer"]
    for line in (folder / "prompt_completion" / "dolly_hhrlhf_head700.jsonl").read_text().splitlines():
        record = json.loads(line)
        instruction = record["prompt"].partition("### Instruction:\n")[2].partition("\n\n### Response")[0]
        if instruction.strip() and record["response"].strip():
            yield instruction, record["response"]


def _other_numbers(text: str, draw: random.Random) -> str:
    return _NUMBER.sub(lambda found: str(draw.randrange(10 ** len(found[0]))), text)
