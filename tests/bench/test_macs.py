import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

from block_sparse_support import of_pairs, qkv, random_pairs
from ditkit.bench.macs import MacCounter, count_macs
from ditkit.metrics.features import EfficientNetLite0
from ditkit.ops.block_sparse_attention import attend, build_plan, cpu, with_valid

ones = torch.ones
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}

# name -> (call, closed form)
CASES = {
    "linear": (lambda: F.linear(ones(2, 7, 4), ones(5, 4), ones(5)), 14 * 4 * 5),
    "linear, one row": (lambda: F.linear(ones(4), ones(5, 4), ones(5)), 4 * 5),
    "linear, strided": (lambda: F.linear(ones(2, 4, 7).mT, ones(5, 4), ones(5)), 14 * 4 * 5),
    "matmul": (lambda: ones(3, 4) @ ones(4, 5), 3 * 4 * 5),
    "matmul, broadcast": (lambda: ones(2, 3, 4, 5) @ ones(5, 6), 2 * 3 * 4 * 5 * 6),
    "matrix by vector": (lambda: ones(3, 4) @ ones(4), 3 * 4),
    "dot": (lambda: ones(9) @ ones(9), 9),
    "bmm": (lambda: torch.bmm(ones(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "addmm": (lambda: torch.addmm(ones(5), ones(3, 4), ones(4, 5)), 3 * 4 * 5),
    "addmm_": (lambda: ones(3, 5).addmm_(ones(3, 4), ones(4, 5)), 3 * 4 * 5),
    "addmv": (lambda: torch.addmv(ones(3), ones(3, 4), ones(4)), 3 * 4),
    "baddbmm": (lambda: torch.baddbmm(ones(2, 3, 5), ones(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "baddbmm_": (lambda: ones(2, 3, 5).baddbmm_(ones(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "addbmm": (lambda: torch.addbmm(ones(3, 5), ones(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "einsum": (lambda: torch.einsum("bnld,bnmd->bnlm", ones(2, 3, 4, 5), ones(2, 3, 6, 5)), 6 * 4 * 5 * 6),
    "conv1d": (lambda: F.conv1d(ones(2, 4, 9), ones(6, 4, 3)), 2 * 7 * 6 * 4 * 3),
    "conv2d": (lambda: F.conv2d(ones(2, 3, 8, 8), ones(6, 3, 2, 2), stride=2), 2 * 16 * 6 * 3 * 4),
    "conv2d, grouped": (
        lambda: F.conv2d(ones(1, 4, 8, 8), ones(6, 2, 3, 3), padding=1, groups=2),
        64 * 6 * 2 * 9,
    ),
    "conv3d": (lambda: F.conv3d(ones(1, 2, 4, 4, 4), ones(3, 2, 2, 2, 2), stride=2), 8 * 3 * 2 * 8),
    "conv_transpose2d": (
        lambda: F.conv_transpose2d(ones(1, 4, 5, 5), ones(4, 6, 2, 2), stride=2),
        25 * 4 * 6 * 4,
    ),
    "LSTM": (lambda: nn.LSTM(4, 5)(ones(3, 2, 4)), 3 * 2 * (4 * 5 * 4 + 4 * 5 * 5)),
    "elementwise": (lambda: F.gelu(ones(4, 4)).softmax(-1).mul(2).cumsum(0), 0),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_operations_equal_their_closed_form(name, mode):
    call, expected = CASES[name]
    with MODES[mode]():
        count = count_macs(call)
    assert (count.total, count.uncounted) == (expected, ())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH], ids=["fused", "math"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_counted_once_whichever_kernel_runs(dtype, mask, backend, mode):
    batch, heads, queries, keys, width, value_width = 2, 3, 5, 7, 16, 16
    q = ones(batch, heads, queries, width, dtype=dtype, requires_grad=mode == "grad")
    k, v = (ones(batch, heads, keys, w, dtype=dtype) for w in (width, value_width))
    masks = {"bool": ones(queries, keys, dtype=torch.bool), "float": torch.zeros(queries, keys, dtype=dtype)}
    with MODES[mode](), sdpa_kernel(backend or list(SDPBackend.__members__.values())):
        count = count_macs(
            F.scaled_dot_product_attention, q, k, v, masks.get(mask), is_causal=mask == "causal"
        )
    assert count.total == batch * heads * queries * keys * (width + value_width)
    assert count.uncounted == ()
    if backend is None:
        assert set(count.by_kind) == {"attention"}


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_values_of_another_width_and_grouped_heads(backend):
    q, k = ones(1, 4, 6, 8), ones(1, 2, 6, 8)
    with sdpa_kernel(backend):
        grouped = count_macs(F.scaled_dot_product_attention, q, k, k, enable_gqa=True)
    with sdpa_kernel(SDPBackend.MATH):
        wider = count_macs(F.scaled_dot_product_attention, q, q, ones(1, 4, 6, 24))
    assert grouped.total == 4 * 6 * 6 * (8 + 8)
    assert wider.total == 4 * 6 * 6 * (8 + 24)


def test_backward_of_fused_attention_is_two_and_a_half_forwards():
    q, k, v = (ones(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with MacCounter() as counter:
        out = F.scaled_dot_product_attention(q, k, v).sum()
        forward = counter.total
        out.backward()
    assert forward == 2 * 6 * 6 * 16
    assert counter.total == forward + forward * 5 // 2  # the scores again, and four products


def test_backward_of_linear_is_two_forwards():
    layer, x = nn.Linear(4, 5), ones(3, 4, requires_grad=True)
    assert count_macs(lambda: layer(x).sum().backward()).total == 3 * (3 * 4 * 5)


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_the_fused_encoder_layer_hides_nothing(mode):
    width, hidden, length = 8, 16, 4
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    with MODES[mode]():
        count = count_macs(layer, ones(1, length, width))
    projections = length * (4 * width * width + 2 * width * hidden)
    assert count.by_kind == {"linear": projections, "attention": 2 * length * length * width}
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_block_sparse_attention_is_what_its_plan_visits(rows, heads, mode):
    plan = of_pairs(random_pairs(61, 75, rows, heads, 0.05), (16, 8))
    q, k, _ = qkv(61, 75)
    v = torch.randn(2, 3, 75, 5, dtype=q.dtype)
    assert plan.visited < rows * heads * 4 * 10
    with MODES[mode]():
        count = count_macs(attend, q, k, v, plan)
    assert count.by_kind == {"attention": plan.visited * 16 * 8 * (8 + 5) * (2 // rows) * (3 // heads)}
    assert count.uncounted == ()


def test_block_sparse_attention_is_what_the_products_in_its_kernel_are():
    plan, (q, k, v) = of_pairs(random_pairs(61, 75, 1, 3, 0.1), 16), qkv(61, 75)
    seeds = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    with MacCounter() as counter:
        attended = attend(q, k, v, plan)
        forward = counter.total
        torch.autograd.grad(tuple(attended), (q, k, v), seeds)
    saved = [x.detach() for x in (q, k, v, *attended)]
    inside = count_macs(cpu.forward, *saved[:3], plan, 8**-0.5)
    back = count_macs(cpu.backward, *seeds, *saved, plan, 8**-0.5)
    assert forward == inside.total == inside.by_kind["matmul"] == 2 * plan.visited * 16 * 16 * (8 + 8)
    assert counter.total - forward == back.total == 2 * plan.visited * 16 * 16 * (3 * 8 + 2 * 8)


def test_block_sparse_attention_over_padding_is_what_it_still_visits():
    plan, inputs = build_plan(64, block=16), qkv(64, 64)
    valid = torch.arange(64) < torch.tensor([[20], [64]])
    count = count_macs(lambda: attend(*inputs, plan, valid=valid).out.sum().backward())
    visited = with_valid(plan, valid).visited
    assert visited == 4 * (2 + 4)
    assert count.by_kind == {"attention": visited * 16 * 16 * 3 * (16 + 3 * 8 + 2 * 8)}


def test_what_does_not_run_is_not_counted():
    layer = nn.Linear(8, 8)
    dense, skipped = (count_macs(lambda n=n: [layer(ones(2, 8)) for _ in range(n)]).total for n in (10, 4))
    assert (dense, skipped) == (10 * 128, 4 * 128)


def test_counting_changes_nothing_and_nests():
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    plain = layer(x, x, x)[0]
    with MacCounter() as outer, MacCounter() as inner:
        counted = layer(x, x, x)[0]
    assert torch.equal(plain, counted)
    assert inner.total == outer.total > 0


def test_compiled_functions_are_counted_and_stay_compiled():
    plan, inputs = build_plan(64, block=16), qkv(64, 64)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def attended(q, k, v, layer):
        return layer(attend(q, k, v, plan).out)

    expected = {"attention": plan.visited * 16 * 16 * 3 * 2 * 16, "linear": 2 * 3 * 64 * 8 * 5}
    for compilations in (0, 1):  # counted before and after the first call
        assert count_macs(attended, *inputs, nn.Linear(8, 5).double()).by_kind == expected
        assert counter.frame_count == compilations
        attended(*inputs, nn.Linear(8, 5).double())
        assert counter.frame_count == 1


def test_heavy_operations_without_a_formula_are_named():
    assert count_macs(torch.cdist, ones(30, 4), ones(30, 4)).uncounted == ("aten._euclidean_dist",)


def test_a_whole_network_equals_the_sum_of_its_layers():
    network = EfficientNetLite0().eval()
    sides = {1: 112, 2: 56, 3: 28, 4: 14, 5: 7}  # halvings -> pixels a side
    expected, halvings, width = 112**2 * 32 * 3 * 9 + 7**2 * 320 * 1280 + 1280 * 1000, 1, 32
    for repeats, kernel, stride, expand, out in [
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    ]:
        for i in range(repeats):
            inner = width * expand
            if expand > 1:
                expected += sides[halvings] ** 2 * width * inner
            halvings += stride == 2 and i == 0
            expected += sides[halvings] ** 2 * inner * (kernel**2 + out)
            width = out
    with torch.no_grad():
        assert count_macs(network, torch.zeros(1, 3, 224, 224)).total == expected == 385_187_552
