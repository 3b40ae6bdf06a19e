"""What the fleet benchmarks train on: eight tasks of instruction induction, or made ones, and a base.

Writes the base once, and for each task a folder with `data.jsonl` and a link to the base.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import inputs
import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

DATA = Path(__file__).parents[2] / "shared" / "data"
TASKS = (
    "active_to_passive",
    "diff",
    "informal_to_formal",
    "larger_animal",
    "negation",
    "sum",
    "translation_en-de",
    "translation_en-fr",
)
EXAMPLES = 200
MOST_TOKENS = 128
"""No example of any task has more."""
EOS = "<|endoftext|>"
BaseName = Literal["61M", "1B", "tiny"]
_INDUCTION = Path("tasks", "instruction_induction", "induce")
_GPT2 = Path("tokenizers", "gpt2")


def job_name(task: str) -> str:
    """A job may have no `_` in its name."""
    return task.replace("_", "-")


def check_data(folder: Path) -> None:
    """Stop with one line where the tasks or the vocabulary are not there."""
    missing = [folder / _GPT2 / "vocab.json", *(folder / _INDUCTION / f"{task}.json" for task in TASKS)]
    missing = [path for path in missing if not path.is_file()]
    if missing:
        raise SystemExit(
            f"--data {folder}: {len(missing)} files are not there, the first {missing[0]}; name the folder "
            "that holds tasks/instruction_induction and tokenizers/gpt2"
        )


def task_pairs(data: Path, task: str, count: int = EXAMPLES) -> list[dict[str, str]]:
    """The first pairs of a task; one that has fewer gives them again, so that all jobs are equally long."""
    examples = json.loads((data / _INDUCTION / f"{task}.json").read_text())["examples"].values()
    return [
        {"prompt": f"Input: {example['input']}\nOutput:", "completion": f" {example['output']}"}
        for example in islice(cycle(examples), count)
    ]


def gpt2_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """GPT-2's, which ends answers and pads with its only special token."""
    vocabulary = data / _GPT2
    tokenizer = ByteLevelBPETokenizer(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt"))
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/tokenizer.json"
        tokenizer.save(path)
        return PreTrainedTokenizerFast(tokenizer_file=path, eos_token=EOS, pad_token=EOS)


def make_base(name: BaseName) -> LlamaForCausalLM:
    """A Llama with random weights, which cost what trained ones cost; all have a vocabulary of 50,257."""
    if name == "61M":
        return inputs.base()
    wide = name == "1B"
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048 if wide else 64,
            num_hidden_layers=22 if wide else 2,
            num_attention_heads=32 if wide else 4,
            num_key_value_heads=4,
            intermediate_size=5632 if wide else 128,
            vocab_size=inputs.VOCABULARY,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).to(torch.bfloat16)


def save_base(name: BaseName, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a base with its tokenizer."""
    make_base(name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pairs(pairs: Iterable[dict[str, str]], path: Path) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write base and tasks into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each task")
    parser.add_argument("--base", choices=("61M", "1B", "tiny"), default="61M")
    options = parser.parse_args(arguments)
    check_data(options.data)
    save_base(options.base, gpt2_tokenizer(options.data), options.to / "base")
    for task in TASKS:
        save_pairs(task_pairs(options.data, task, options.examples), options.to / task / "data.jsonl")
        (options.to / task / "base").symlink_to(options.to / "base")


if __name__ == "__main__":
    main()
