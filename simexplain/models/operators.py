"""The operators that an exported program may call: arithmetic on tensors and sizes, nothing else.

Operators that read or write files (``aten.save``, ``aten.from_file``), print, seed the random
generator, replace a tensor's memory or skip the check of an index are not here.
"""

from __future__ import annotations

import re
from typing import Any

import torch

# Base names; the form in place (with a trailing underscore) is allowed where the plain one is.
_ATEN_NAMES = """
abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv
addr adjoint affine_grid_generator alias all allclose alpha_dropout amax amin aminmax angle any
arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere
as_strided asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d
avg_pool3d baddbmm bartlett_window batch_norm bernoulli bilinear bitwise_and bitwise_left_shift
bitwise_not bitwise_or bitwise_right_shift bitwise_xor blackman_window block_diag bmm
broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu chain_matmul
channel_shuffle cholesky_inverse cholesky_solve chunk clamp clamp_max clamp_min clip clone col2im
column_stack combinations complex concat concatenate conj conj_physical constant_pad_nd contiguous
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution copy copysign
corrcoef cos cosh cosine_similarity count_nonzero cov cross cummax cummin cumprod cumsum
cumulative_trapezoid deg2rad det detach detach_copy diag diag_embed diagflat diagonal
diagonal_scatter diff digamma dist div divide dot dropout dsplit dstack einsum elu embedding empty
empty_like empty_permuted empty_strided eq equal erf erfc erfinv exp exp2 expand expand_as
expand_copy expm1 exponential eye fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft
fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft
fft_rfft2 fft_rfftfreq fft_rfftn fill fill_diagonal fix flatten flip fliplr flipud float_power
floor floor_divide fmax fmin fmod frac frexp frobenius_norm full full_like gather ge gelu ger glu
greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt
hamming_window hann_window hardshrink hardsigmoid hardswish hardtanh heaviside histc hsplit hstack
huber_loss hypot im2col imag index index_add index_copy index_fill index_put index_reduce
index_select inner instance_norm inverse isclose isfinite isinf isnan isneginf isposinf isreal
istft item kaiser_window kl_div kron kthvalue l1_loss layer_norm ldexp le leaky_relu lerp less
less_equal lgamma lift_fresh lift_fresh_copy linalg_cholesky linalg_cholesky_ex linalg_cond
linalg_cross linalg_det linalg_diagonal linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
linalg_householder_product linalg_inv linalg_inv_ex linalg_lstsq linalg_lu linalg_lu_factor
linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_matrix_rank
linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_solve_ex
linalg_solve_triangular linalg_svd linalg_svdvals linalg_vander linalg_vecdot linalg_vector_norm
linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp
logdet logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm lstm_cell lt
masked_fill masked_scatter masked_select matmul matrix_exp matrix_H matrix_power max max_pool1d
max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
maximum mean median meshgrid mH min minimum mish mm mode moveaxis movedim mse_loss msort mT mul
multinomial multiply mv nan_to_num nanmean nanmedian nanquantile nansum narrow native_batch_norm
native_channel_shuffle native_dropout native_group_norm native_layer_norm ne neg negative new_empty
new_empty_strided new_full new_ones new_zeros nextafter nonzero nonzero_numpy norm norm_except_dim
normal normal_functional not_equal nuclear_norm numel numpy_T one_hot ones ones_like outer pad
pairwise_distance pdist permute permute_copy pinverse pixel_shuffle pixel_unshuffle polar positive
pow prelu prod quantile rad2deg rand rand_like randint randint_like randn randn_like random
randperm ravel real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6
remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d
reshape reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
roll rot90 round row_stack rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter
scatter_add scatter_reduce searchsorted select select_copy select_scatter selu sgn sigmoid sign
signbit silu sin sinc sinh slice slice_copy slice_scatter slogdet smooth_l1_loss softmax softplus
softshrink sort special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv
special_exp2 special_expit special_expm1 special_gammaln special_i0 special_log1p special_log_ndtr
special_log_softmax special_logit special_logsumexp special_ndtr special_ndtri special_round
special_sinc special_softmax special_xlog1py special_xlogy split split_copy split_with_sizes
split_with_sizes_copy sqrt square squeeze squeeze_copy stack std std_mean stft sub subtract sum
sum_to_size svd swapaxes swapdims sym_constrain_range sym_constrain_range_for_size
sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride t t_copy take take_along_dim tan
tanh tensor_split tensordot threshold tile to topk trace transpose transpose_copy trapezoid tril
tril_indices triu triu_indices true_divide trunc type_as unbind unbind_copy unflatten unfold
unfold_copy uniform unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_trilinear3d vander var var_mean vdot view view_as view_as_complex
view_as_real view_copy vsplit vstack where xlogy zero zeros zeros_like
_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_scalar _assert_tensor_metadata
_batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional _cdist_forward
_conj _conj_physical _convolution _fft_c2c _fft_c2r _fft_r2c _fused_rms_norm
_local_scalar_dense _log_softmax _native_batch_norm_legit _native_batch_norm_legit_functional
_native_batch_norm_legit_no_training _native_multi_head_attention _reshape_alias _safe_softmax
_scaled_dot_product_attention_math _scaled_dot_product_efficient_attention
_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _softmax
_to_copy _transformer_encoder_layer_fwd _trilinear _unsafe_view _upsample_bicubic2d_aa
_upsample_bilinear2d_aa _weight_norm _weight_norm_interface __and__ __or__ __xor__
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_OTHERS = {
    "prims": {
        "broadcast_in_dim", "collapse_view", "convert_element_type", "iota", "split_dim", "squeeze",
        "transpose", "view_of", "where",
    },
    "torchvision": {"deform_conv2d", "ps_roi_align", "roi_align", "roi_pool"},
    "quantized_decomposed": {
        "choose_qparams", "choose_qparams_symmetric", "dequantize_per_channel",
        "dequantize_per_tensor", "dequantize_per_token", "quantize_per_channel",
        "quantize_per_tensor", "quantize_per_token",
    },
}  # fmt: skip
_WHOLE_NAMES = """
torch.ops.higher_order.cond torch.ops.higher_order.wrap_with_set_grad_enabled
torch.ops.higher_order.wrap_with_autocast
_operator.getitem _operator.add _operator.sub _operator.mul _operator.truediv _operator.floordiv
_operator.mod _operator.neg _operator.pos _operator.pow _operator.eq _operator.ne _operator.lt
_operator.le _operator.gt _operator.ge _operator.and_ _operator.or_ _operator.not_
math.ceil math.floor math.trunc math.sqrt
torch.sym_int torch.sym_float torch.sym_max torch.sym_min torch.sym_not torch.sym_ite
torch.sym_sqrt torch.sym_sum torch._sym_sqrt
"""
_WHOLE = frozenset(_WHOLE_NAMES.split())
_QUALIFIED = re.compile(r"torch\.ops\.([a-z_]+)\.(\w+)\.(\w+)", re.ASCII)


def is_known_operator(target: str) -> bool:
    """Whether the target of a node is one of the listed operators, by its full name.

    Args:
        target: As serialised: ``torch.ops.aten.relu.default``, ``_operator.add``.
    """
    if target in _WHOLE:
        return True
    match = _QUALIFIED.fullmatch(target)
    if match is None:
        return False
    namespace, name, overload = match.groups()
    known = _ATEN if namespace == "aten" else _OTHERS.get(namespace, set())
    if name not in known and not (name.endswith("_") and name.removesuffix("_") in known):
        return False
    # The second half is looked up as an attribute, so it must be an overload and no method.
    return overload in _overloads(namespace, name)


def _overloads(namespace: str, name: str) -> list[str]:
    if namespace == "torchvision":
        import torchvision.ops  # noqa: F401  registers them
    operator: Any = getattr(getattr(torch.ops, namespace), name, None)
    names: list[str] = [] if operator is None else operator.overloads()
    # ``data`` is that of packed sequences, whose lengths are not checked.
    return [each for each in names if not each.endswith("out") and each != "data"]
