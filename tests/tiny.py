"""Tiny real models and tokenizers, built from config: nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CORPUS = "the quick brown fox jumps over the lazy dog 0123456789 Instruction Input Response\n:#.,?!+-*/= "


def tokenizer(*, pad_token: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens: encodes any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CORPUS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>" if pad_token else None
    )


def llama(
    *, hidden: int = 64, layers: int = 2, vocabulary: int = 320, positions: int = 256
) -> LlamaForCausalLM:
    """A Llama of about 0.1M parameters with grouped key/value heads."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * hidden,
            vocab_size=vocabulary,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).eval()


def gpt2(vocabulary: int = 320) -> GPT2LMHeadModel:
    """A GPT-2: absolute positions and transposed Conv1D layers."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64,
            n_layer=2,
            n_head=4,
            vocab_size=vocabulary,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).eval()


def save_base(folder: Path, model: PreTrainedModel | None = None, *, pad_token: bool = True) -> Path:
    """Write a base model with its tokenizer; returns the folder."""
    (model or llama()).save_pretrained(folder)
    tokenizer(pad_token=pad_token).save_pretrained(folder)
    return folder
