"""Each token goes through its own job's update."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from updates import Update, grouped, one_by_one

from raytune_ft.errors import ModelError
from raytune_ft.methods.dropout import token_keys
from raytune_ft.methods.lora import LoraLinear, add_lora, linear_modules, remove_lora
from raytune_ft.methods.routing import Route, Share, set_route
from raytune_ft.methods.sliced import sliced_update
from raytune_ft.spec import LoraSpec


def share(slot: int, rows: int, width: int, *, step: int = 0, by_row: bool = False) -> Share:
    example_BX = torch.arange(rows)[:, None]
    if not by_row:
        example_BX = example_BX.expand(rows, width)
    return Share(slot, step, example_BX, torch.arange(width).expand(rows, width))


class TestRoute:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=6))
    def test_the_parts_cover_all_tokens_in_order(self, shapes: list[tuple[int, int]]) -> None:
        shares = [share(slot, rows, width, step=slot) for slot, (rows, width) in enumerate(shapes)]
        total = sum(rows * width for rows, width in shapes)
        parts = Route(shares).parts(total)
        assert [part.slot for part in parts] == list(range(len(shapes)))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == total
        for part, (rows, width) in zip(parts, shapes, strict=True):
            expected = token_keys(
                part.slot, torch.arange(rows).repeat_interleave(width), torch.arange(width).repeat(rows)
            )
            assert torch.equal(part.keys, expected)

    def test_a_row_that_is_one_example_has_keys_at_any_width(self) -> None:
        rows = share(0, 3, 5, by_row=True)
        for width in (1, 4, 5, 9):
            expected = token_keys(0, torch.arange(3).repeat_interleave(width), torch.arange(width).repeat(3))
            assert torch.equal(Route([rows]).parts(3 * width)[0].keys, expected)

    def test_a_layer_that_sees_some_of_the_tokens_tells_them_apart_by_their_order(self) -> None:
        keys = Route([share(0, 2, 5, step=3)]).parts(7)[0].keys
        assert len(keys.unique()) == 7
        assert torch.equal(keys, Route([share(0, 4, 4, step=3)]).parts(7)[0].keys)

    def test_jobs_cannot_share_a_layer_that_sees_some_of_the_tokens(self) -> None:
        with pytest.raises(ModelError, match="a layer sees 7 tokens of a pass that has 8: jobs cannot share"):
            Route([share(0, 1, 5), share(1, 1, 3)]).parts(7)

    def test_all_tokens_can_go_to_one_job(self) -> None:
        for tokens in (1, 5):
            (part,) = Route.whole(3).parts(tokens)
            assert (part.slot, part.start, part.stop) == (3, 0, tokens)


SPECS = [
    LoraSpec(rank=4, alpha=8, targets=("q_proj", "down_proj")),
    LoraSpec(rank=2, alpha=1, dropout=0.4),
    LoraSpec(rank=7, alpha=9, targets="attention", dropout=0.1),
]


class TestLayers:
    def test_each_token_has_the_update_of_its_own_job(self) -> None:
        model = tiny.llama().requires_grad_(False)
        torch.manual_seed(0)
        for slot, spec in enumerate(SPECS):
            for name, parameter in add_lora(model, spec, slot, slot).items():
                if "lora_B" in name:
                    nn.init.normal_(parameter)
        model.train()
        shares = [share(0, 2, 3), share(2, 1, 5), share(1, 4, 1)]
        layer = model.model.layers[0].self_attn.q_proj
        x_1ND = torch.randn(1, 15, 64, requires_grad=True)
        set_route(model, Route(shares))
        together = layer(x_1ND)
        (of_together,) = torch.autograd.grad(together.square().sum(), x_1ND)
        start = 0
        for each in shares:
            stop = start + each.position_BT.numel()
            own = x_1ND[:, start:stop].detach().requires_grad_()
            set_route(model, Route([each]))
            alone = layer(own)
            (of_alone,) = torch.autograd.grad(alone.square().sum(), own)
            torch.testing.assert_close(together[:, start:stop], alone)
            torch.testing.assert_close(of_together[:, start:stop], of_alone)
            start = stop

    def test_a_layer_that_a_job_does_not_train_is_that_of_the_base(self) -> None:
        model = tiny.llama().requires_grad_(False)
        for slot, spec in enumerate(SPECS):
            for parameter in add_lora(model, spec, slot, slot).values():
                nn.init.normal_(parameter)
        layer = model.model.layers[1].mlp.down_proj
        assert isinstance(layer, LoraLinear)
        x_1ND = torch.randn(1, 8, 128)
        set_route(model.eval(), Route([share(2, 1, 3), share(0, 1, 5)]))
        y_1NO, base_1NO = layer(x_1ND), layer.base(x_1ND)
        assert torch.equal(y_1NO[:, :3], base_1NO[:, :3])
        assert not torch.isclose(y_1NO[:, 3:], base_1NO[:, 3:]).any(dim=2).all()
        set_route(model, Route.whole(2))
        assert torch.equal(layer(x_1ND), base_1NO)

    def test_the_last_job_leaves_the_base_as_it_was(self) -> None:
        model = tiny.llama()
        before = dict(model.named_modules())
        for slot, spec in enumerate(SPECS):
            add_lora(model, spec, slot, slot)
        for slot in (1, 0, 2):
            assert dict(model.named_modules()) != before
            remove_lora(model, slot)
        assert dict(model.named_modules()) == before

    def test_adapters_around_a_layer_change_no_name(self) -> None:
        model = tiny.llama()
        before = list(linear_modules(model))
        first = add_lora(model, SPECS[1], 0, 0)
        assert list(linear_modules(model)) == before
        assert list(add_lora(model, SPECS[1], 0, 1)) == list(first)


@pytest.mark.parametrize("as_one", [grouped, sliced_update], ids=["grouped", "sliced"])
@pytest.mark.parametrize("ranks", [[4], [1, 8, 3], [16, None, 2], [None, 5]], ids=str)
def test_an_update_in_one_operation_equals_exact_products(ranks: list[int | None], as_one: Update) -> None:
    torch.manual_seed(0)
    sizes = [3, 9, 1][: len(ranks)]
    stops = torch.tensor(sizes).cumsum(0).tolist()
    scales = [2.0, 0.5, 1.5][: len(ranks)]
    x_ND = torch.randn(stops[-1], 16, dtype=torch.bfloat16)
    y_NO = torch.randn(stops[-1], 24, dtype=torch.bfloat16)
    pairs = [None if rank is None else (torch.randn(rank, 16), torch.randn(24, rank)) for rank in ranks]
    found = []
    for update, dtype in ((one_by_one, torch.float32), (as_one, torch.bfloat16)):
        x, y = x_ND.to(dtype).requires_grad_(), y_NO.to(dtype).requires_grad_()
        given = [pair and tuple(w.clone().requires_grad_() for w in pair) for pair in pairs]
        updated = update(x, y, stops, scales, given)  # type: ignore[arg-type]
        updated.float().square().sum().backward()
        of_weights = [weight.grad for pair in given if pair for weight in pair]
        found.append([updated, x.grad, y.grad, *of_weights])
    for exact, rounded in zip(*found, strict=True):
        assert exact is not None
        assert rounded is not None
        limit = 2e-2 * float(exact.detach().abs().max())
        torch.testing.assert_close(rounded.float(), exact.float(), rtol=2e-2, atol=limit)


def test_on_cpu_an_update_of_rounded_tokens_is_rounded_once() -> None:
    torch.manual_seed(0)
    x_ND, y_NO = torch.randn(12, 64).bfloat16(), torch.randn(12, 32).bfloat16()
    pairs = [(torch.randn(8, 64), torch.randn(32, 8)), None]
    found = []
    for update, dtype in ((one_by_one, torch.float32), (sliced_update, torch.bfloat16)):
        given = [pair and tuple(w.clone().requires_grad_() for w in pair) for pair in pairs]
        updated = update(x_ND.to(dtype), y_NO.to(dtype), [7, 12], [2.0, 1.0], given)  # type: ignore[arg-type]
        updated.backward(torch.ones_like(updated))
        of_weights = [weight.grad for pair in given if pair for weight in pair]
        found.append([updated.detach(), *of_weights])
    (exact, *of_exact), (rounded, *of_rounded) = found
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-8, atol=0)
    torch.testing.assert_close(of_rounded, of_exact, rtol=1e-5, atol=1e-4)


def test_what_the_backward_pass_keeps_does_not_grow_with_the_highest_rank_of_others() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    x_ND = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    y_NO = torch.randn(8, 64, dtype=torch.bfloat16)
    pairs = [
        (torch.randn(rank, 64, requires_grad=True), torch.randn(64, rank, requires_grad=True))
        for rank in (128, 1, 1, 1)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped(x_ND, y_NO, [2, 4, 6, 8], [1.0] * 4, pairs)
    # Weights, which are there anyway, and of each token its input, its low ranks and its scale; 16 B of ends.
    weights = sum(weight.numel() * 4 for pair in pairs for weight in pair)
    assert sum(kept) == weights + 8 * (64 * 2 + 128 * 2 + 4) + 16


def test_groups_are_made_once_for_layers_that_scale_alike() -> None:
    route = Route([share(0, 1, 3), share(1, 1, 5)])
    groups = route.groups((2.0, 0.5), torch.device("cpu"))
    assert groups.stop_K.tolist() == [3, 8]
    assert groups.scale_N1.flatten().tolist() == [2.0] * 3 + [0.5] * 5
    assert route.groups((2.0, 0.5), torch.device("cpu")) is groups
    assert route.groups((1.0, 0.5), torch.device("cpu")) is not groups
