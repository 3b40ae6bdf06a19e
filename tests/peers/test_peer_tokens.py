"""Token ids, labels and batches against other projects."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from peer_cases import TOKENIZERS, cases, needs_peers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.masking_utils import find_packed_sequence_indices

from raytune_ft.data.conversation import Conversation, Turn
from raytune_ft.data.encoder import Encoder
from raytune_ft.data.pack import pack_first_fit
from raytune_ft.data.records import read_record
from raytune_ft.data.template import TEMPLATES, TurnFormat, render
from raytune_ft.data.tokenise import Tokenised, prompt_ids, tokenise
from raytune_ft.spec import FieldsSpec
from raytune_ft.train.batch import LEAST_ROWS, Batch, Tokens, assemble

pytestmark = needs_peers

IGNORED = -100
PAD = 0
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
OASST = TurnFormat(
    user="<|prompter|>{content}{eos}",
    system="<|system|>{content}\n{eos}",
    opening="<|assistant|>",
    end="{eos}",
    eos="<|endoftext|>",
)


def only(found: list[Tokenised | None]) -> Tokenised:
    (example,) = found
    assert example is not None
    return example


def tokens(input_ids: list[int], learned: list[bool] | None = None) -> Tokens:
    return Tokens(np.array(input_ids), np.array(learned or [True] * len(input_ids)))


def labels_of(batch: Batch) -> list[list[int]]:
    """The labels at their own places, IGNORED elsewhere."""
    labels = np.full(batch.input_ids_BT.shape, IGNORED)
    labels.flat[batch.predictor_N.numpy() + 1] = batch.labels_N.numpy()
    found: list[list[int]] = labels.tolist()
    return found


def width_of(rows: list[list[int]]) -> int:
    """Of the pass with a peer's rows: one of very few tokens is padded beyond its longest row."""
    return max(*map(len, rows), -(-LEAST_ROWS // len(rows)))


def assert_rows(found: list[list[int]], expected: list[list[int]], padding: int) -> None:
    """A peer's rows, then as much padding as the pass needs."""
    width = width_of(expected)
    assert found == [row + [padding] * (width - len(row)) for row in expected]


def first_ignored(labels: list[list[int]]) -> list[list[int]]:
    """Without the label of a row's first token, which no hidden state predicts."""
    return [[IGNORED, *row[1:]] for row in labels]


@cases("axolotl/alpaca_chatml_mistral.json")
def test_alpaca_in_chatml(case: dict[str, Any]) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZERS / "mistral_v1", legacy=True, add_bos_token=True)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in case["added_tokens"]} == case[
        "added_tokens"
    ]
    encoder = Encoder.of(tokenizer)
    record = read_record({"system": ALPACA_SYSTEM, **case["example"]}, FieldsSpec())
    example = only(tokenise([render("chatml", record, encoder).examples[0].segments], encoder))
    labels = [token if learned else IGNORED for token, learned in zip(*vars_of(example), strict=True)]
    assert list(example.input_ids) == case["expected_input_ids"]
    assert labels == case["expected_labels_prompt_masked"]


def vars_of(example: Tokenised) -> tuple[list[int], list[bool]]:
    return list(example.input_ids), example.learned


@cases("litgpt/sft_dataset.json", "sft_dataset.max1000.*.maskTrue sft_dataset.max-1.*.maskTrue")
def test_labels_by_character(case: dict[str, Any]) -> None:
    vocabulary = {chr(code): code for code in range(256)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="\0"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    encoder = Encoder.of(PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="\1"))
    record = read_record(case["example"], FieldsSpec())
    template = case["prompt_template"].replace("{prompt}", "{{ instruction }}")
    example = only(tokenise([render(template, record, encoder).examples[0].segments], encoder))
    ignored = case["ignore_index"]
    labels = [token if learned else ignored for token, learned in zip(*vars_of(example), strict=True)]
    assert (list(example.input_ids), labels) == (case["expected_input_ids"], case["expected_labels"])


@cases("mistral_common/instruct_tokens_v1.json")
def test_mistral_instruct_tokens(case: dict[str, Any]) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZERS / "mistral_v1", add_bos_token=True)
    encoder = Encoder.of(tokenizer)
    # The first version of the format has a space before [/INST]; the built-in template is the third.
    template = replace(TEMPLATES["mistral"], user="[INST] {content} [/INST]", eos="</s>")
    turns = tuple(Turn(message["role"], message["content"]) for message in case["messages"])
    assert prompt_ids(template.open_answer(turns), encoder) == case["expected_token_ids"]


@cases("oasst/dialogue_collator.json", "test_dataset_entry*")
def test_open_assistant_dialogue(case: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "oasst_tiny")
    encoder = Encoder.of(tokenizer)
    rows = []
    for entry in case["input"]:
        context = (Turn("system", f"context: {entry['context']}"),) if "context" in entry else ()
        turns = (Turn("user", entry["questions"][0]), *context, Turn("assistant", entry["answers"][0]))
        segments = OASST.render(Conversation(turns, (turns[-1].content,), "chat")).examples[0].segments
        rows.append([tokens(*vars_of(only(tokenise([segments], encoder))))])
    batch = assemble(rows, tokenizer.convert_tokens_to_ids("<|padding|>"))
    width = batch.input_ids_BT.shape[1]
    predictors = batch.predictor_N.numpy()
    trained = [batch.input_ids_BT[r, predictors[predictors // width == r] % width] for r in range(len(rows))]
    assert [width] * len(rows) == case["expected_num_tokens"]
    assert [tokenizer.decode(row) for row in batch.input_ids_BT] == case["expected_text"]
    assert [tokenizer.decode(row) for row in trained] == case["expected_trained_text"]


@cases("trl/collator.json", "*test_basic_padding *test_without_labels *test_single_example")
def test_padded_batch(case: dict[str, Any]) -> None:
    batch = assemble([[tokens(example["input_ids"])] for example in case["examples"]], PAD)
    assert_rows(batch.input_ids_BT.tolist(), case["expected"]["input_ids"], PAD)
    assert_rows(labels_of(batch), first_ignored(case["expected"]["labels"]), IGNORED)
    assert batch.tokens == sum(map(sum, case["expected"]["attention_mask"]))


@cases("trl/collator.json", "*test_padding_free_mode *test_padding_free_without_labels")
def test_packed_batch(case: dict[str, Any]) -> None:
    batch = assemble([[tokens(example["input_ids"]) for example in case["examples"]]], PAD)
    assert_rows(batch.input_ids_BT.tolist(), case["expected"]["input_ids"], PAD)
    assert_rows(batch.position_ids_BT.tolist(), case["expected"]["position_ids"], 0)
    assert_rows(labels_of(batch), case["expected"]["labels"], IGNORED)


@cases("trl/collator.json", "*test_single_example_single_doc *test_single_example_multiple_docs")
def test_positions_restart(case: dict[str, Any]) -> None:
    rows = [[tokens(list(range(length))) for length in row] for row in case["batch_seq_lengths"]]
    assert_rows(assemble(rows, PAD).position_ids_BT.tolist(), case["expected_position_ids"], 0)


@cases("litgpt/sft_dataset.json", "collate.pad*")
def test_padding_is_not_learned(case: dict[str, Any]) -> None:
    batch = assemble([[tokens(example["input_ids"])] for example in case["examples"]], case["pad_id"])
    assert_rows(batch.input_ids_BT.tolist(), case["expected"]["input_ids"], case["pad_id"])
    learned = [[label != IGNORED for label in row] for row in labels_of(batch)]
    expected = [[label != case["ignore_index"] for label in row] for row in case["expected"]["labels"]]
    assert_rows(learned, [[False, *row[1:]] for row in expected], False)


@cases("trl/pad.json", "TestPad.test_pad_1_dim_right TestPad.test_pad_to_multiple_of_no_extra_padding")
def test_right_padding(case: dict[str, Any]) -> None:
    batch = assemble([[tokens(row)] for row in case["input"]], case["kwargs"]["padding_value"])
    assert_rows(batch.input_ids_BT.tolist(), case["expected"], case["kwargs"]["padding_value"])


@cases(
    "trl/packing.json", "TestPackDatasetBfd.test_with_dataset TestPackDatasetBfd.test_with_iterable_dataset"
)
def test_packing(case: dict[str, Any]) -> None:
    examples = case["input"]["input_ids"]
    rows = pack_first_fit([len(example) for example in examples], case["seq_length"])
    packed = [[token for index in row for token in examples[index]] for row in rows]
    assert packed == case["expected"]["input_ids"]
    assert [[len(examples[index]) for index in row] for row in rows] == case["expected"]["seq_lengths"]


def runs(numbered: list[int]) -> list[int]:
    """Lengths of a row's sequences, numbered 1, 2, …; 0 is padding."""
    return [numbered.count(number) for number in range(1, max(numbered) + 1)]


@cases("llamafactory/packed_attention.json", "4d_mask")
def test_attention_stays_within_an_example(case: dict[str, Any]) -> None:
    rows = [[tokens([1] * length) for length in runs(numbered)] for numbered in case["packed_ids"]]
    sequences = find_packed_sequence_indices(assemble(rows, PAD).position_ids_BT)
    if sequences is None:
        pytest.fail("transformers finds no packed sequences in the positions")
    width = width_of(case["packed_ids"])
    for numbered, row, blocked in zip(case["packed_ids"], sequences.tolist(), case["blocked"], strict=True):
        for query, number in enumerate(numbered):
            if number:
                found = [int(key > query or row[key] != row[query]) for key in range(len(row))]
                assert found == blocked[query] + [1] * (width - len(blocked[query]))


@cases("llamafactory/packed_attention.json", "seqlens.*")
def test_sequence_lengths_follow_from_positions(case: dict[str, Any]) -> None:
    rows = [[tokens([1] * length) for length in runs(numbered)] for numbered in case["packed_ids"]]
    batch = assemble(rows, PAD)
    kept = np.array(case["packed_ids"]).ravel() > 0
    # A pass of very few tokens is padded beyond its longest row.
    width = len(case["packed_ids"][0])
    positions = batch.position_ids_BT.numpy()[:, :width].ravel()[kept]
    bounds = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    assert np.flatnonzero(kept).tolist() == case.get("expected_indices", [0])
    assert bounds == case["expected_cu_seqlens"]
    assert np.diff(bounds).tolist() == case["expected_seqlens"]
    assert int(positions.max()) + 1 == case["expected_max"]
    assert batch.tokens == sum(case["expected_seqlens"])


CHATML_OF_SENTENCES = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentence_piece_chat_has_the_tokens_of_its_whole_text(legacy: bool) -> None:
    """Alone, each piece would begin with a space that stands nowhere in the text."""
    tokenizer = LlamaTokenizer.from_pretrained(TOKENIZERS / "mistral_v1", legacy=legacy)
    tokenizer.chat_template = CHATML_OF_SENTENCES
    encoder = Encoder.of(tokenizer)
    assert encoder.is_joined
    messages = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "Banana"},
        {"role": "user", "content": "Another one."},
        {"role": "assistant", "content": "Apricot"},
    ]
    record = read_record({"messages": messages}, FieldsSpec())
    (example,) = render("chat", record, encoder).examples
    found = only(tokenise([example.segments], encoder))
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert list(found.input_ids) == tokenizer(whole)["input_ids"]
    learned = [token for token, is_learned in zip(*vars_of(found), strict=True) if is_learned]
    pieces = tokenizer.convert_ids_to_tokens(learned)
    assert "".join(pieces) == "Banana</s>Apricot</s>"
    # The prompt's tokens are those that generation is given.
    opened = prompt_ids(example.segments[:1], encoder)
    assert list(found.input_ids)[: len(opened)] == opened
