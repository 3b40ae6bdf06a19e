"""Greedy answers in batches: the same as those to each prompt alone, and no longer than they are."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from transformers import GenerationConfig, PreTrainedModel

from raytune_ft.errors import DataError
from raytune_ft.evaluate.generate import answer
from raytune_ft.generation_files import stop_token_ids

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts."""
    random = np.random.default_rng(0)
    return [random.integers(3, 320, length).tolist() for length in lengths]


def answers(
    model: PreTrainedModel,
    asked: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int] = (),
    max_new_tokens: int = 12,
    batch_sequences: int = 32,
) -> list[str]:
    return answer(
        model,
        TOKENIZER,
        asked,
        end_ids=end_ids,
        max_new_tokens=max_new_tokens,
        batch_sequences=batch_sequences,
    )


def likeliest(model: PreTrainedModel, prompt: Sequence[int], length: int) -> list[int]:
    """Greedy decoding written out: the whole text through the model for each token, without a cache."""
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def says(model: PreTrainedModel, order: Sequence[int]) -> PreTrainedModel:
    """The model after it unlearned everything but to say the tokens of `order`, each after the one before."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Layers that add nothing leave the last token's embedding, an axis of its own for each token.
            if "proj" in name:
                parameter.zero_()
        model.get_input_embeddings().weight.zero_()
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        head.weight.zero_()
        for axis, (before, after) in enumerate(pairwise(order)):
            model.get_input_embeddings().weight[before, axis] = 1.0
            head.weight[after, axis] = 1.0
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2], ids=["rotary positions", "absolute positions"])
class TestBatches:
    @pytest.mark.parametrize("batch_sequences", [1, 2, 5, 32])
    def test_padding_and_neighbours_change_nothing(
        self, build: type[PreTrainedModel], batch_sequences: int
    ) -> None:
        asked = prompts(3, 40, 1, 17, 17, 9)
        model = build()
        alone = [answers(model, [prompt])[0] for prompt in asked]
        assert len(set(alone)) > 1
        assert answers(model, asked, batch_sequences=batch_sequences) == alone

    def test_a_long_neighbour_does_not_cut_an_answer_short(self, build: type[PreTrainedModel]) -> None:
        model = build()
        asked = prompts(4, 250, 5, 256, 245, 300)
        alone = [answers(model, [prompt])[0] for prompt in asked]
        assert answers(model, asked) == alone
        assert alone[0]
        assert alone[3] == alone[5] == ""

    def test_each_token_is_the_likeliest(self, build: type[PreTrainedModel]) -> None:
        model = build()
        (prompt,) = prompts(6)
        tokens = likeliest(model, prompt, 12)
        assert EOS not in tokens
        assert answers(model, [prompt]) == [TOKENIZER.decode(tokens, skip_special_tokens=True).strip()]


class TestEnd:
    WORDS = (40, 41, 42, 43, 44)
    """Tokens of one letter each."""

    def text(self, *ids: int) -> str:
        return str(TOKENIZER.decode(ids))

    def test_at_eos(self) -> None:
        model = says(tiny.llama(), (40, 41, EOS, 43))
        assert answers(model, [[40]]) == [self.text(41)]

    def test_at_an_end_that_was_learned(self) -> None:
        model = says(tiny.llama(), self.WORDS)
        assert answers(model, [[40]], max_new_tokens=4) == [self.text(41, 42, 43, 44)]
        assert answers(model, [[40]], end_ids=[43], max_new_tokens=4) == [self.text(41, 42)]

    def test_at_an_end_of_the_base(self) -> None:
        model = says(tiny.llama(), self.WORDS)
        model.generation_config = GenerationConfig(eos_token_id=[42, 99])
        assert answers(model, [[40]], max_new_tokens=4) == [self.text(41)]

    def test_at_the_limit(self) -> None:
        model = says(tiny.llama(), self.WORDS)
        assert answers(model, [[40]], max_new_tokens=2) == [self.text(41, 42)]

    def test_one_answer_ends_before_another(self) -> None:
        model = says(tiny.llama(), (40, 41, 42, EOS))
        assert answers(model, [[42], [40], [41]]) == ["", self.text(41, 42), self.text(42)]

    def test_all_ends_once_and_in_order(self) -> None:
        model = tiny.llama()
        model.generation_config = GenerationConfig(eos_token_id=[7, EOS])
        assert stop_token_ids(model, TOKENIZER, [9, 7]) == [EOS, 7, 9]
        model.generation_config = GenerationConfig()
        assert stop_token_ids(model, TOKENIZER, []) == [EOS]


def test_nothing_is_asked() -> None:
    assert answers(tiny.llama(), []) == []


def test_the_settings_of_the_base_are_as_they_were() -> None:
    model = tiny.llama()
    model.generation_config = before = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=5)
    answers(model, prompts(4))
    assert model.generation_config is before
    assert before.temperature == 0.3


def test_a_token_that_the_base_does_not_know_is_no_crash() -> None:
    model = tiny.llama()
    known = model.config.vocab_size
    for token in (known, -1):
        with pytest.raises(
            DataError, match=rf"makes token {token}, and the base has embeddings for 0 to {known - 1}"
        ):
            answers(model, [[5, 6], [7, token, 8]])
