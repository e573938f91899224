"""Operator classes: which kind of work an operation of torch's dispatcher is, and the bytes that it touches."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_leaves

OpClass = Literal[
    "linear",
    "attention",
    "convolution",
    "normalisation",
    "elementwise",
    "embedding",
    "movement",
    "compiled",
    "host",
]
"""Attention is softmax(q k^T) v alone, its projections are linear; movement copies or reorders; compiled is what a
compiler fused; host is the time in which no operation ran."""
CLASSES: tuple[OpClass, ...] = OpClass.__args__  # type: ignore[attr-defined]

_NAMES: dict[OpClass, str] = {
    "linear": """linear addmm addmm_ mm addmv addmv_ mv dot vdot matmul bmm baddbmm baddbmm_ addbmm addbmm_ einsum
        _int_mm _scaled_mm _weight_int8pack_mm _weight_int4pack_mm linear_dynamic linear_dynamic_fp16
        fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation""",
    "attention": """scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable flex_attention
        block_sparse_attention chosen_attention sparse_linear_attention linear_attention""",
    "convolution": """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution
        mkldnn_convolution cudnn_convolution conv_depthwise3d _conv_depthwise2d thnn_conv2d slow_conv3d""",
    "normalisation": """layer_norm native_layer_norm group_norm native_group_norm rms_norm _fused_rms_norm batch_norm
        native_batch_norm _native_batch_norm_legit _batch_norm_impl_index instance_norm""",
    "embedding": "embedding embedding_bag _embedding_bag",
    "movement": """copy_ clone contiguous cat stack gather scatter scatter_ index index_select index_put_ index_put
        index_copy_ index_copy _to_copy to pad constant_pad_nd roll flip repeat repeat_interleave take_along_dim
        masked_scatter_ fill_ zero_ zeros ones full empty arange unfold im2col pixel_shuffle pixel_unshuffle
        _reshape_alias _unsafe_view reshape permute transpose view unflatten flatten expand select slice split chunk
        unbind t as_strided squeeze unsqueeze narrow tensor_split split_with_sizes index_fill_""",
}
_BY_NAME: dict[str, OpClass] = {name: kind for kind, names in _NAMES.items() for name in names.split()}
DECIDING: frozenset[OpClass] = frozenset(("linear", "attention", "convolution", "normalisation", "embedding"))
"""Classes whose operations take in what they call: the copies inside a convolution are the convolution's."""


def class_of(name: str) -> OpClass:
    """Return the class of an operation of the dispatcher, such as `aten::addmm`; elementwise is what no other names."""
    return _BY_NAME.get(name.rpartition("::")[2].partition(".")[0], "elementwise")


def touched_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Count the bytes that an operation reads and writes if nothing stays in a cache: each tensor once; a view none."""
    if any(
        result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
    ):
        return 0
    tensors = {
        id(leaf): leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)
    }  # written in place: once read, once written, counted once
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())
