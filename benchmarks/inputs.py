"""What every benchmark trains on: a 61M Llama with a vocabulary of 50,257, and short instructions."""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 50_257
"""GPT-2's: the head is a large part of the work, as in real models."""
NOUNS = ("tourist", "author", "doctor", "judge", "senator", "banker", "actor", "lawyer", "student", "artist")
VERBS = ("supported", "contacted", "admired", "helped", "avoided", "thanked", "believed", "mentioned")
CLAUSES = (1, 1, 1, 2, 3)


def sentence_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Active sentences and their passive, of one to three clauses: 13 to 45 tokens with the prompt."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        clauses = [
            (draw.choice(NOUNS), draw.choice(VERBS), draw.choice(NOUNS))
            for _ in range(draw.choice([1, 1, 1, 2, 3]))
        ]
        active = " and ".join(f"the {a} {v} the {b}" for a, v, b in clauses)
        passive = " and ".join(f"the {b} was {v} by the {a}" for a, v, b in clauses)
        pairs.append({"prompt": f"Input: {active}\nOutput:", "completion": f" {passive}"})
    return pairs


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and fillers up to the vocabulary."""
    words = ["<pad>", "<eos>", "<unk>", "Input", "Output", ":", "the", "and", "was", "by", *NOUNS, *VERBS]
    words += [f"filler{number}" for number in range(VOCABULARY - len(words))]
    word_level = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def base() -> LlamaForCausalLM:
    """61M parameters, 26M of them the tied embedding; random, which costs what trained ones cost."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            num_hidden_layers=12,
            num_attention_heads=8,
            intermediate_size=1216,
            vocab_size=VOCABULARY,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def main() -> None:
    """Write base and data into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=200)
    arguments = parser.parse_args()
    folder: Path = arguments.to
    model = base()
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    lines = (json.dumps(pair) for pair in sentence_pairs(arguments.examples))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
