"""Compiled programs are read as they run: loops, groups, bytes, products, sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from launch.planning.compiler import hlo
from launch.planning.compiler.groups import groups_text, members
from launch.planning.compiler.hlo_text import Module, arrays
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

pytestmark = pytest.mark.fast
SIZES = {"replica": 1, "stage": 1, "data": 2, "context": 1, "expert": 4, "model": 1}
LAYERS, WIDTH = 5, 64


def compiled(function, shape, spec):
    """Reads the program of a function under `shard_map` on data 2 × expert 4."""
    mesh = make_mesh(MeshSettings(data=2, expert=4))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False
    )
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
    return Module(jax.jit(mapped).lower(x).compile().as_text())


@pytest.fixture(scope="module")
def scanned():
    """In a scan of 5: gather and scatter over data, exchange over expert, a product."""

    def layer(x_rM, _):
        rows_RM = lax.all_gather(x_rM, "data", axis=0, tiled=True)
        rows_RM = jnp.tanh(rows_RM @ jnp.full((WIDTH, WIDTH), 0.1))
        x_rM = lax.psum_scatter(rows_RM, "data", scatter_dimension=0, tiled=True)
        x_rM = lax.all_to_all(x_rM, "expert", 0, 0, tiled=True)
        return jnp.sin(x_rM), None

    def steps(x_rM):
        y_rM, _ = lax.scan(layer, x_rM, length=LAYERS)
        return lax.psum(jnp.sum(y_rM), ("data", "expert"))

    return compiled(steps, (64, WIDTH), P(("data", "expert")))


def test_a_collective_in_a_scan_counts_as_often_as_it_runs(scanned):
    found = {(c.kind, c.axes): c for c in hlo.collectives(scanned, SIZES)}
    row = WIDTH * 4  # bytes of one of a device's 64/8 = 8 rows
    gathered = found["all-gather", ("data",)]
    assert (gathered.count, gathered.in_loop) == (LAYERS, True)
    assert gathered.bytes == LAYERS * 16 * row / 2  # half of the 16 rows that come out
    assert found["reduce-scatter", ("data",)].bytes == LAYERS * 16 * row / 2
    exchanged = found["all-to-all", ("expert",)]
    assert exchanged.bytes == LAYERS * 8 * row * 3 / 4  # a quarter stays
    total = found["all-reduce", ("data", "expert")]
    assert (total.count, total.in_loop, total.bytes) == (1, False, 2 * 7 / 8 * 4)
    assert not scanned.unknown_loops


def test_a_collective_says_which_line_asked_for_it(scanned):
    (gathered,) = (c for c in hlo.collectives(scanned, SIZES) if "gather" in c.kind)
    assert gathered.source.startswith("tests/launch/test_hlo.py:")


def test_products_in_a_scan_count_as_often_as_they_run(scanned):
    # 16 rows × 64 × 64, five times.
    assert hlo.product_flops(scanned) == 2 * 16 * WIDTH * WIDTH * LAYERS


def test_nested_loops_multiply():
    def inner(x_rM, _):
        return lax.ppermute(x_rM, "expert", [(0, 1), (1, 2), (2, 3), (3, 0)]) * 2, None

    def outer(x_rM, _):
        return jnp.cos(lax.scan(inner, x_rM, length=3)[0]), None

    def steps(x_rM):
        return lax.psum(jnp.sum(lax.scan(outer, x_rM, length=7)[0]), "data")

    program = compiled(steps, (64, WIDTH), P(("data", "expert")))
    (moved,) = (
        c for c in hlo.collectives(program, SIZES) if c.kind == "collective-permute"
    )
    assert (moved.axes, moved.count) == (("expert",), 21)
    assert moved.bytes == 21 * 8 * WIDTH * 4


def test_a_loop_of_unknown_length_is_counted_once_and_named():
    def steps(x_rM):
        def more(carry):
            return jnp.max(carry) < 100.0

        def double(carry):
            return lax.pmax(carry * 2, "data")

        return jnp.sum(lax.while_loop(more, double, x_rM))

    program = compiled(steps, (64, WIDTH), P(("data", "expert")))
    (reduced,) = (c for c in hlo.collectives(program, SIZES) if c.in_loop)
    assert reduced.count == 1
    assert len(program.unknown_loops) == 1


# Snippets as the compiler for v5e writes them, cut to what matters.
LOOP_OF_TPU = """
FileNames
1 "/somewhere/site-packages/jax/_src/lax.py"
2 "/anywhere/checkout/moe/dispatch/exchange.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=28 end_line=28 column=3 end_column=9}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=3 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%cond.1 (p.1: (s32[], f32[4,256])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(6)
  %p.1 = (s32[]{:T(128)}, f32[4,256]{1,0:T(4,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %constant.1), direction=LT
}

%all-reduce-scatter.1 (p.3: f32[4,256]) -> f32[2,256] {
  %p.3 = f32[4,256]{1,0:T(4,128)} parameter(0)
  %all-reduce.9 = f32[4,256]{1,0:T(4,128)} all-reduce(%p.3), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum
  ROOT %cut = f32[2,256]{1,0:T(2,128)} dynamic-slice(%all-reduce.9, %i), dynamic_slice_sizes={2,256}
}

%body.1 (p.2: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %p.2 = (s32[]{:T(128)}, f32[4,256]{1,0:T(4,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x.2 = f32[4,256]{1,0:T(4,128)} get-tuple-element(%p.2), index=1
  %k.1 = f32[4,256]{1,0:T(4,128)} custom-call(%x.2), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/pallas_call" stack_frame_id=2}
  %a.1 = f32[4,256]{1,0:T(4,128)} all-to-all(%k.1), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(f)/all_to_all" stack_frame_id=2}
  %s.1 = f32[2,256]{1,0:T(2,128)} fusion(%a.1), kind=kCustom, calls=%all-reduce-scatter.1
  %g.1 = (f32[2,256]{1,0:T(2,128)}, f32[4,256]{1,0:T(4,128)}) all-gather-start(%s.1), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %g.2 = f32[4,256]{1,0:T(4,128)} all-gather-done(%g.1)
  ROOT %t.1 = (s32[]{:T(128)}, f32[4,256]{1,0:T(4,128)}) tuple(%i.2, %g.2)
}

ENTRY %main.1 (x.1: f32[4,256]) -> f32[4,256] {
  %x.1 = f32[4,256]{1,0:T(4,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t.0 = (s32[]{:T(128)}, f32[4,256]{1,0:T(4,128)}) tuple(%zero, %x.1)
  %w.1 = (s32[]{:T(128)}, /*index=1*/f32[4,256]{1,0:T(4,128)}) while(%t.0), condition=%cond.1, body=%body.1
  ROOT %y.1 = f32[4,256]{1,0:T(4,128)} get-tuple-element(%w.1), index=1
}
"""  # noqa: E501


def test_programs_of_tpus_are_read():
    module = Module(LOOP_OF_TPU)
    found = {c.kind: c for c in hlo.collectives(module, SIZES)}
    row = 256 * 4
    # The loop runs 6 times, by its condition; it is noted nowhere. The lines that the
    # kernel before them breaks end nothing.
    assert {c.count for c in found.values()} == {6}
    assert found["all-to-all"].bytes == 6 * 4 * row * 3 / 4
    assert found["all-to-all"].axes == ("expert",)
    # Started, then done: one gather, of 4 rows that come out.
    assert found["all-gather"].bytes == 6 * 4 * row / 2
    assert found["all-gather"].axes == ("data",)
    # An all-reduce fused with a slice is a reduce-scatter, of 4 rows that go in.
    assert found["reduce-scatter"].bytes == 6 * 4 * row / 2
    assert "all-reduce" not in found


def test_a_source_is_the_innermost_line_of_our_own_code():
    module = Module(LOOP_OF_TPU)
    for opcode in ("all-to-all", "custom-call"):
        (line,) = (i for i, _, _ in module.runs() if i.opcode == opcode)
        assert module.source(line) == "moe/dispatch/exchange.py:28"


OVERLAPPED = """
%start.1 (p.1: f32[2,256]) -> (f32[2,256], f32[4,256]) {
  %p.1 = f32[2,256]{1,0:T(2,128)} parameter(0)
  %g.1 = f32[4,256]{1,0:T(4,128)} all-gather(%p.1), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %c.1 = (f32[2,256]{1,0:T(2,128)}, f32[4,256]{1,0:T(4,128)}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: f32[2,256], m: f32[256,256]) -> f32[2,256] {
  %p.2 = f32[2,256]{1,0:T(2,128)} parameter(0)
  %m = f32[256,256]{1,0:T(8,128)} parameter(1)
  %g.2 = f32[4,256]{1,0:T(4,128)} all-gather(%p.2), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %c.2 = f32[2,256]{1,0:T(2,128)} convolution(%p.2, %m), dim_labels=bf_io->bf
}

%done.1 (p.3: f32[2,256]) -> f32[4,256] {
  %p.3 = f32[2,256]{1,0:T(2,128)} parameter(0)
  %g.3 = f32[4,256]{1,0:T(4,128)} all-gather(%p.3), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, frontend_attributes={chain_id="1"}
  ROOT %c.3 = f32[4,256]{1,0:T(4,128)} custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main.1 (x.1: f32[2,256], w.1: f32[256,256]) -> f32[4,256] {
  %x.1 = f32[2,256]{1,0:T(2,128)} parameter(0)
  %w.1 = f32[256,256]{1,0:T(8,128)} parameter(1)
  %a = (f32[2,256]{1,0:T(2,128)}, f32[4,256]{1,0:T(4,128)}) fusion(%x.1), kind=kCustom, calls=%start.1
  %b = f32[2,256]{1,0:T(2,128)} fusion(%x.1, %w.1), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %c = f32[4,256]{1,0:T(4,128)} fusion(%x.1), kind=kCustom, calls=%done.1
}
"""  # noqa: E501


def test_a_collective_that_overlaps_with_products_counts_once():
    module = Module(OVERLAPPED)
    (gathered,) = hlo.collectives(module, SIZES)
    assert (gathered.count, gathered.bytes) == (1, 4 * 256 * 4 / 2)
    assert hlo.product_flops(module) == 2 * 2 * 256 * 256


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("{}", [range(8)]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b'}", [range(8)]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (
            "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
    ],
)
def test_groups_are_read_in_every_form(text, rows):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    found = members(groups_text(attributes), 8)
    np.testing.assert_array_equal(found, [list(row) for row in rows])


def test_what_is_sent_to_another_slice_is_found():
    module = Module("""
ENTRY %main.1 (x.1: bf16[2,128]) -> bf16[2,128] {
  %x.1 = bf16[2,128]{1,0:T(2,128)(2,1)} parameter(0)
  %token = token[] after-all()
  %send.1 = (bf16[2,128]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}, token[]) send(%x.1, %token), channel_id=30, is_host_transfer=true
  %send-done.1 = token[] send-done(%send.1), channel_id=30, is_host_transfer=true
  ROOT %y.1 = bf16[2,128]{1,0:T(2,128)(2,1)} copy(%x.1)
}
""")  # noqa: E501
    (sent,) = hlo.collectives(module, SIZES | {"replica": 2})
    assert (sent.kind, sent.axes, sent.bytes) == ("send", ("replica",), 2 * 128 * 2)


def test_products_written_as_convolutions_do_not_count_their_padding():
    def flops(line):
        return hlo.product_flops(
            Module(f"""
ENTRY %main.1 (l: bf16[8,16,32], r: bf16[8,32,64]) -> bf16[8,16,64] {{
  %l = bf16[8,16,32]{{2,1,0}} parameter(0)
  %r = bf16[8,32,64]{{2,1,0}} parameter(1)
  %m = bf16[16,32]{{1,0}} parameter(2)
  %n = bf16[32,64]{{1,0}} parameter(3)
  ROOT %c = {line}
}}
""")
        )

    # [16, 32] by [32, 64].
    plain = "bf16[16,64]{1,0} convolution(%m, %n), dim_labels=bf_io->bf"
    assert flops(plain) == 2 * 16 * 32 * 64
    # Eight of them: a window of 8 over inputs 8 apart, of which one place of 8 meets.
    batched = (
        "bf16[8,16,64]{2,1,0} convolution(%l, %r), window={size=8 stride=7 "
        "lhs_dilate=8}, dim_labels=0bf_0io->0bf"
    )
    assert flops(batched) == 8 * 2 * 16 * 32 * 64


def test_bytes_on_a_tpu_include_the_padding_of_tiles():
    (array,) = arrays("bf16[4,2,320]{2,1,0:T(8,128)(2,1)}")
    assert array.bytes == 4 * 2 * 320 * 2
    assert array.padded_bytes == 4 * 8 * 384 * 2
    (small,) = arrays("f32[]{:T(128)}")
    assert small.padded_bytes == 4
    inside, outside = arrays("(f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)})")
    assert (inside.in_main_memory, outside.in_main_memory) == (False, True)


def test_the_largest_values_are_named_with_their_source(scanned):
    found = hlo.largest_buffers(scanned, 3)
    assert found[0].bytes >= found[-1].bytes > 0
    assert any(one.source.startswith("tests/launch/test_hlo.py:") for one in found)
