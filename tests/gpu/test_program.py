"""The reader of compiled programs, on one whose kernels can be counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.gpu.program import cudnn_calls, kernels, nbytes

# A loop of five steps: a matmul of [8, 16] and [16, 4] in a fusion, and one row written into a buffer in place.
TEXT = """HloModule step, entry_computation_layout={(bf16[8,16]{1,0})->f32[8,4]{1,0}}

%fused_dot (p0: bf16[8,16], p1: bf16[16,4]) -> f32[8,4] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_write (p0: f32[100,4], p1: f32[1,4], p2: s32[]) -> f32[100,4] {
  %p0 = f32[100,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[100,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

%body (state: (bf16[8,16], bf16[16,4], f32[100,4], s32[])) -> (bf16[8,16], bf16[16,4], f32[100,4], s32[]) {
  %state = (bf16[8,16]{1,0}, bf16[16,4]{1,0}, f32[100,4]{1,0}, s32[]) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=0
  %w = bf16[16,4]{1,0} get-tuple-element(%state), index=1
  %buffer = f32[100,4]{1,0} get-tuple-element(%state), index=2
  %i = s32[] get-tuple-element(%state), index=3
  %product = f32[8,4]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(step)/dot_general"}
  %row = f32[1,4]{1,0} slice(%product), slice={[0:1], [0:4]}
  %written = f32[100,4]{1,0} fusion(%buffer, %row, %i), kind=kLoop, calls=%fused_write
  ROOT %next = (bf16[8,16]{1,0}, bf16[16,4]{1,0}, f32[100,4]{1,0}, s32[]) tuple(%x, %w, %written, %i)
}

ENTRY %main (x: bf16[8,16]) -> f32[8,4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %start = (bf16[8,16]{1,0}, bf16[16,4]{1,0}, f32[100,4]{1,0}, s32[]) tuple(%x)
  %loop = (bf16[8,16]{1,0}, /*index=1*/bf16[16,4]{1,0}) while(%start), body=%body, condition=%c, backend_config={KNOWN}
  %mixed = (bf16[2,3,8,64]{3,1,2,0}, u8[0]{0}) custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %out = f32[8,4]{1,0} copy(%mixed)
}
"""
KNOWN = '"known_trip_count":{"n":"5"}'


def test_kernels_are_counted_with_what_they_move() -> None:
    product, row, written, attention, copied = kernels(TEXT.replace("KNOWN", KNOWN))
    assert product.times == row.times == written.times == 5 and attention.times == copied.times == 1
    assert product.flops == 2 * 8 * 16 * 4 and product.product and not product.attention
    assert product.bytes == 2 * (8 * 16 + 16 * 4) + 4 * 8 * 4
    assert written.bytes == 2 * 16 + 4  # the row read and written, and the index; not the buffer
    assert product.source == "jit(step)/dot_general"
    assert attention.attention and attention.product and not copied.product
    assert cudnn_calls(TEXT) == 1


# A matmul by cuBLAS on its own, and one in a fusion that reads a slice of a stack; 64 bytes of each are scratch space.
CUBLAS = """HloModule step, entry_computation_layout={(bf16[8,16]{1,0})->f32[8,4]{1,0}}

%dynamic_slice (p0: bf16[5,16,8], p1: bf16[16,4], p2: s32[]) -> (f32[8,4], s8[64]) {
  %p0 = bf16[5,16,8]{2,1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %same = bf16[5,128]{1,0} bitcast(%p0)
  %wide = f32[5,128]{1,0} convert(%same)
  %slice = f32[1,128]{1,0} dynamic-slice(%wide, %p2, %zero), dynamic_slice_sizes={1,128}
  %left = f32[16,8]{1,0} bitcast(%slice)
  ROOT %call = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%left, %p1), custom_call_target="__cublas$lt$matmul", CONFIG0
}

ENTRY %main (x: bf16[8,16], w: bf16[16,4], stack: bf16[5,16,8], i: s32[]) -> f32[8,4] {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,4]{1,0} parameter(1)
  %stack = bf16[5,16,8]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %alone = (bf16[8,4]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", CONFIG1
  %sliced = (f32[8,4]{1,0}, s8[64]{0}) fusion(%stack, %w, %i), kind=kCustom, calls=%dynamic_slice
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%sliced), index=0
}
"""
CONFIG = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["%d"]}}}'


def test_products_by_cublas_count_as_products() -> None:
    alone, sliced = kernels(CUBLAS.replace("CONFIG0", CONFIG % 0).replace("CONFIG1", CONFIG % 1))
    assert alone.product and sliced.product
    assert alone.flops == sliced.flops == 2 * 8 * 16 * 4
    assert alone.bytes == 2 * (8 * 16 + 16 * 4 + 8 * 4)
    assert sliced.bytes == 2 * (16 * 8 + 16 * 4) + 4 + 4 * 8 * 4  # one slice of the stack, w, the index, the result


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="the loop loop has no known length"):
        kernels(TEXT)


def test_bytes_of_shapes() -> None:
    assert nbytes("bf16[3,5]{1,0}") == 30 and nbytes("(f32[], pred[7]{0}, u8[0]{0})") == 4 + 7
