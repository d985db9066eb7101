"""Layers against their formulas on small numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlscale.nn import momentum
from vlscale.nn.attention import Attention, SelfAttention, attend, attention_mask
from vlscale.nn.bert import BertEmbeddings, WordHead, bert_layers
from vlscale.nn.queue import KeyQueue, QueueOptions
from vlscale.nn.temperature import Temperature
from vlscale.nn.transformer import PreNormBlock, Stack
from vlscale.nn.vit import PIXEL_MEAN, PIXEL_STD, ImageEncoder, normalize_pixels, resize_positions


def by_hand(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    outs = []
    for q, k, v in zip(query.chunk(heads, 2), key.chunk(heads, 2), value.chunk(heads, 2), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -1e4)
        outs.append(scores.softmax(2) @ v)
    return torch.cat(outs, 2)


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    hidden, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    layer = Attention(8, 2, 6)
    met = by_hand(layer.query(hidden), layer.key(context), layer.value(context), 2, mask)
    torch.testing.assert_close(layer(hidden, context, attention_mask(mask)), layer.output(met))
    own = SelfAttention(8, 2)
    query, key, value = own.qkv(hidden).chunk(3, 2)
    torch.testing.assert_close(own(hidden), own.output(by_hand(query, key, value, 2, None)))


def test_causal_mask_hides_what_comes_later() -> None:
    mask = attention_mask(torch.tensor([[True, True, False]]), causal=True)
    assert mask is not None
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    assert attention_mask(None) is None


def test_blocks_are_pre_and_post_norm() -> None:
    torch.manual_seed(0)
    hidden, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    block = PreNormBlock(8, 2, 16, 1e-6)
    middle = hidden + block.attention(block.attention_norm(hidden))
    torch.testing.assert_close(block(hidden), middle + block.mlp(block.mlp_norm(middle)))
    (layer,) = bert_layers(1, 8, 2, 16, 0.0, context_width=6)
    middle = layer.attention_norm(hidden + layer.attention(hidden, hidden))
    middle = layer.cross_norm(middle + layer.cross_attention(middle, context))
    inner = layer.mlp.fc2(F.gelu(layer.mlp.fc1(middle)))
    torch.testing.assert_close(layer(hidden, None, context), layer.mlp_norm(middle + inner))


def test_stack_runs_blocks_in_order_under_their_numbers() -> None:
    stack = Stack([torch.nn.Linear(2, 2) for _ in range(2)], first=6)
    assert [name for name, _ in stack.named_parameters()][::2] == ["blocks.6.weight", "blocks.7.weight"]
    hidden = torch.randn(1, 1, 2)
    torch.testing.assert_close(stack(hidden), stack.blocks["7"](stack.blocks["6"](hidden)))


def test_bert_embeddings_and_head() -> None:
    embeddings = BertEmbeddings(10, 4, 6, 2, 0.0)
    ids = torch.tensor([[2, 5, 0]])
    total = embeddings.word(ids) + embeddings.position.weight[:3] + embeddings.segment.weight[0]
    torch.testing.assert_close(embeddings(ids), F.layer_norm(total, (4,), eps=1e-12))
    embeddings(ids).square().sum().backward()
    assert embeddings.word.weight.grad is not None
    assert embeddings.word.weight.grad[0].abs().sum() == 0  # padding learns nothing here
    head = WordHead(4, 10)
    hidden = torch.randn(2, 4)
    logits = head.norm(F.gelu(head.dense(hidden))) @ embeddings.word.weight.T + head.bias
    torch.testing.assert_close(head(hidden, embeddings.word.weight), logits)


def test_pixels_are_normalised_on_the_device_in_fp32() -> None:
    pixels = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    want = [(128 / 255 - mean) / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)]
    torch.testing.assert_close(normalize_pixels(pixels, torch.float32)[0, :, 0, 0], torch.tensor(want))
    assert normalize_pixels(pixels, torch.bfloat16).dtype == torch.bfloat16
    ready = torch.randn(1, 3, 2, 2)
    assert normalize_pixels(ready, torch.float32) is ready


def test_vit_keeps_every_token_class_token_first() -> None:
    encoder = ImageEncoder(16, 8, 8, 1, 2, 16)
    patches = encoder.patches(torch.randn(2, 3, 16, 16))
    tokens = encoder.tokens(patches)
    assert tokens.shape == (2, 5, 8)
    torch.testing.assert_close(
        tokens[:, 0], (encoder.tokens.class_token + encoder.tokens.positions[:, :1])[0].expand(2, 8)
    )
    torch.testing.assert_close(tokens[:, 1:], patches + encoder.tokens.positions[:, 1:])


def test_position_table_for_another_size() -> None:
    table = torch.randn(1, 1 + 16, 3)
    assert resize_positions(table, table.shape) is table
    bigger = resize_positions(table, torch.Size([1, 1 + 36, 3]))
    grid = table[0, 1:].T.reshape(1, 3, 4, 4)
    want = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).reshape(3, 36).T
    torch.testing.assert_close(bigger[0, 1:], want)
    torch.testing.assert_close(bigger[0, 0], table[0, 0])
    with pytest.raises(ValueError, match="cannot be resized"):
        resize_positions(table, torch.Size([1, 9, 3]))


def test_temperature_is_fp32_and_clamped_with_a_gradient() -> None:
    temperature = Temperature(0.07, 0.001, 0.5).to(torch.bfloat16)
    assert temperature.value.shape == (1,)
    temperature.value.data.fill_(0.75)
    value = temperature()
    assert value.dtype == torch.float32
    assert value.item() == 0.5
    value.backward()
    assert temperature.value.grad is not None
    assert temperature.value.grad.item() == 1.0


def test_queue_is_a_ring() -> None:
    queue = KeyQueue(QueueOptions(queue=5, queue_start="empty"), 2)
    assert not queue.valid().any()
    keys = torch.arange(24.0).reshape(12, 2)
    queue.push(keys[:3], torch.arange(3), step=1)
    assert queue.valid().tolist() == [True] * 3 + [False] * 2
    assert queue.metrics(2) == {"filled": torch.tensor(0.6), "age_steps": torch.tensor(1.0)}
    queue.push(keys[3:7], torch.arange(3, 7), step=2)  # wraps round
    assert queue.ids.tolist() == [5, 6, 2, 3, 4]
    assert queue.entered.tolist() == [2, 2, 1, 2, 2]
    assert (queue.pointer.item(), queue.filled.item()) == (2, 5)
    torch.testing.assert_close(queue.keys[:2], keys[5:7])
    queue.push(keys, torch.arange(12), step=3)  # more than it holds: the newest stay
    assert queue.ids.tolist() == [8, 9, 10, 11, 7]
    assert queue.pointer.item() == 4  # the oldest, which goes next


def test_random_start_is_the_same_everywhere() -> None:
    torch.manual_seed(1)
    first = KeyQueue(QueueOptions(queue=4), 3, seed=7)
    torch.manual_seed(2)
    second = KeyQueue(QueueOptions(queue=4), 3, seed=7)
    torch.testing.assert_close(first.keys, second.keys, rtol=0, atol=0)
    torch.testing.assert_close(first.keys.norm(dim=1), torch.ones(4))
    assert first.valid().all()
    assert (first.ids == -1).all()
    assert not torch.equal(KeyQueue(QueueOptions(queue=4), 3, seed=8).keys, first.keys)
    assert all(buffer.ndim > 0 for buffer in first.buffers())


def test_momentum_arithmetic() -> None:
    average, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    kept = average
    momentum.update([average], [source], 0.9)
    torch.testing.assert_close(kept, torch.tensor([1.2, 1.8]))
    momentum.update([], [], 0.9)
    assert momentum.coefficient(5, 0.99, "constant", 10) == 0.99
    assert momentum.coefficient(1, 0.99, "cosine", 10) == pytest.approx(0.99)
    assert momentum.coefficient(11, 0.99, "cosine", 10) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="constant, cosine"):
        momentum.coefficient(1, 0.99, "linear", 10)  # type: ignore[arg-type]
    assert [momentum.softening(step, 0.4, 4) for step in (1, 2, 5, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert momentum.softening(1, 0.4, 0) == 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_may_see_nothing_gets_nothing(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = attention_mask(torch.tensor([[True, True, False], [False, False, False]]))
    out = attend(query, key, value, 2, mask, 0.0)
    out.float().square().sum().backward()
    assert out[0].any(dim=1).all()
    assert not out[1].any()
    assert value.grad is not None
    assert value.grad[0].any()
    assert not value.grad[1].any()
