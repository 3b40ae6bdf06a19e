"""Tiny real models and tokenizers, built from config: nothing is downloaded."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

if TYPE_CHECKING:
    from raytune_ft.train.engine import Engine

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


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, CLS before a text, SEP after it, neither BOS nor EOS."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted({letter for letter in CORPUS.lower() if letter.strip()})
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    pieces = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def t5(*, dropout: float = 0.0, tied: bool = True, gated: bool = False) -> T5ForConditionalGeneration:
    """A T5 of about 0.1M parameters: relative positions, an encoder and a decoder of two layers."""
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=320,
            relative_attention_num_buckets=8,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=tied,
            pad_token_id=2,
            eos_token_id=1,
            decoder_start_token_id=2,
        )
    ).eval()


def bert(*, classes: int = 3, dropout: float = 0.0) -> BertForSequenceClassification:
    """A BERT of about 0.05M parameters: absolute positions, attention to both sides."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=len(wordpiece()),
            max_position_embeddings=64,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=classes,
            pad_token_id=0,
        )
    ).eval()


def save_base(
    folder: Path,
    model: PreTrainedModel | None = None,
    *,
    pad_token: bool = True,
    words: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a base model with its tokenizer; returns the folder."""
    (model or llama()).save_pretrained(folder)
    (words or tokenizer(pad_token=pad_token)).save_pretrained(folder)
    return folder


def keep(engine: "Engine", folder: Path) -> None:
    """Write all that an engine holds; it has to be one that writes."""
    snapshot = engine.snapshot()
    assert snapshot is not None
    snapshot(folder)
