"""Products of sorted rows with their experts' matrices on GPU.

Forward and for the gradient of the rows: on Hopper a kernel of jax, elsewhere a batched
product of plain XLA. The gradient of the weights is always the batched product's: its
sums are float32, and jax's own tests leave out the kernel that jax has for it.

The batched product cuts the rows in two (`Division`). The first H = R // e rows of each
expert make a rectangle, one product with the weights as they lie. What experts have
beyond goes in blocks, each a product with the weights of its expert, in a loop that
lasts as long as there are blocks. Both together multiply at most 2·R rows, whatever the
sizes, and copy the weights of one expert at a time. No row is ever scattered.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from moe.model.feed_forward.grouped_method import HOPPER_BLOCK

Method = Literal["hopper", "hopper_interpreted", "batched"]

# Rows that a block has at least, if the rectangle is as high: with fewer, reading the
# weights takes longer than the product.
BLOCK_ROWS = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    rows_RX: jax.Array, matrix_eXY: jax.Array, size_e: jax.Array, method: Method
) -> jax.Array:
    """Multiplies rows by their experts' matrices; gradients cost as much again.

    Args:
        rows_RX: rows sorted by expert; those past the last expert's must be finite, and
            so must their gradients.
        matrix_eXY: matrices, used in the dtype of the rows; their gradient is summed in
            float32 and has the dtype of the matrices.
        size_e: int32, rows of each expert; rows past their sum come out as anything,
            and so do their gradients.
        method: "hopper"; "hopper_interpreted", which does what that does by its
            contract; or "batched".
    Returns:
        rows_RY in the dtype of the rows.
    """
    return _multiply(rows_RX, matrix_eXY, size_e, method, transposed=False)


def _forward(rows_RX, matrix_eXY, size_e, method):
    y_RY = product(rows_RX, matrix_eXY, size_e, method)
    return y_RY, (rows_RX, matrix_eXY, size_e)


def _backward(method, saved, d_y_RY):
    rows_RX, matrix_eXY, size_e = saved
    d_rows_RX = _multiply(d_y_RY, matrix_eXY, size_e, method, transposed=True)
    d_matrix_eXY = _sum_products(rows_RX, d_y_RY, size_e)
    return d_rows_RX, d_matrix_eXY.astype(matrix_eXY.dtype), None


product.defvjp(_forward, _backward)


@jax.custom_vjp
def add_bias(y_RY: jax.Array, bias_eY: jax.Array, size_e: jax.Array) -> jax.Array:
    """Adds their experts' biases to rows; nothing scatters on the way back.

    Args:
        y_RY: rows sorted by expert; the gradients of those past the last expert's must
            be finite.
        bias_eY: biases, used in the dtype of the rows; their gradient is summed in
            float32.
        size_e: int32, rows of each expert.
    """
    expert_R = _experts(y_RY.shape[0], size_e)
    return y_RY + bias_eY.astype(y_RY.dtype).at[expert_R].get(mode="promise_in_bounds")


def _add_bias_forward(y_RY, bias_eY, size_e):
    return add_bias(y_RY, bias_eY, size_e), (bias_eY, size_e)


def _add_bias_backward(saved, d_y_RY):
    bias_eY, size_e = saved
    one_R1 = jnp.ones((d_y_RY.shape[0], 1), d_y_RY.dtype)
    d_bias_eY = _sum_products(one_R1, d_y_RY, size_e)[:, 0]
    return d_y_RY, d_bias_eY.astype(bias_eY.dtype), None


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _multiply(
    rows_RX: jax.Array,
    matrix: jax.Array,
    size_e: jax.Array,
    method: Method,
    *,
    transposed: bool,
) -> jax.Array:
    """Rows times [e, X, Y], or times the transposes of [e, Y, X]."""
    matrix = matrix.astype(rows_RX.dtype)
    if method == "batched":
        return _batched(rows_RX, matrix, size_e, transposed=transposed)
    if method == "hopper":
        return hopper(rows_RX, matrix, size_e, transposed=transposed)
    matrix_eXY = jnp.swapaxes(matrix, 1, 2) if transposed else matrix
    y_RY = jax.lax.ragged_dot(rows_RX, matrix_eXY, size_e)
    written_R1 = jnp.arange(rows_RX.shape[0])[:, None] < jnp.sum(size_e)
    return jnp.where(written_R1, y_RY, jnp.nan)


def hopper(
    rows_RX: jax.Array, matrix: jax.Array, size_e: jax.Array, *, transposed: bool
) -> jax.Array:
    """Calls jax's kernel, which multiplies at most R + 128·e rows.

    Groups may begin and end anywhere and be empty. Rows past the last are not written.
    """
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    R = rows_RX.shape[0]
    # Blocks, steps and grid are the best of 24 choices for bfloat16 on an H100 in a
    # public comparison, of products of 1,280 to 2,560 for 1,024 rows per expert.
    y_RY = ragged_dot(
        jnp.pad(rows_RX, ((0, -R % HOPPER_BLOCK), (0, 0))),
        matrix,
        group_sizes=size_e.astype(jnp.int32),
        block_m=HOPPER_BLOCK,
        block_n=HOPPER_BLOCK,
        block_k=64,
        max_concurrent_steps=6,
        grid_block_n=4,
        transpose_rhs=transposed,
    )
    return y_RY[:R]


def _batched(
    rows_RX: jax.Array, matrix: jax.Array, size_e: jax.Array, *, transposed: bool
) -> jax.Array:
    """Rows times [e, X, Y], or times the transposes of [e, Y, X], in plain XLA."""
    cut = Division.of(rows_RX.shape[0], size_e)
    XY = "YX" if transposed else "XY"
    y_eHY = jnp.einsum(f"eHX,e{XY}->eHY", cut.rectangle(rows_RX), matrix)

    def add_block(block: Block, y_RY: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(matrix, block.expert, keepdims=False)
        y_bY = jnp.einsum(f"bX,{XY}->bY", block.read(rows_RX), own)
        return block.write(y_RY, y_bY)

    return cut.each_block(add_block, cut.unfold(y_eHY))


def _sum_products(x_RX: jax.Array, y_RY: jax.Array, size_e: jax.Array) -> jax.Array:
    """Σ xᵀ·y over the rows of each expert, [e, X, Y] in float32.

    Rows of others enter the sums through the zeros that y is masked with.
    """
    cut = Division.of(x_RX.shape[0], size_e)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    own_y_eHY = jnp.where(cut.own_eH[..., None], cut.rectangle(y_RY), 0)
    sum_eXY = product("eHX,eHY->eXY", cut.rectangle(x_RX), own_y_eHY)

    def add_block(block: Block, sum_eXY: jax.Array) -> jax.Array:
        own_y_bY = jnp.where(block.own_b1, block.read(y_RY), 0)
        term_XY = product("bX,bY->XY", block.read(x_RX), own_y_bY)
        before_XY = jax.lax.dynamic_index_in_dim(sum_eXY, block.expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(
            sum_eXY, before_XY + term_XY, block.expert, axis=0
        )

    return cut.each_block(add_block, sum_eXY)


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of one expert.

    Attributes:
        expert: its index.
        start: the first row.
        own_b1: False for rows that are another's, or in the rectangle.
    """

    expert: jax.Array
    start: jax.Array
    own_b1: jax.Array

    def read(self, x_RX: jax.Array) -> jax.Array:
        """Takes the block's rows."""
        b = self.own_b1.shape[0]
        return jax.lax.dynamic_slice_in_dim(x_RX, self.start, b)

    def write(self, x_RX: jax.Array, rows_bX: jax.Array) -> jax.Array:
        """Replaces the block's own rows."""
        rows_bX = jnp.where(self.own_b1, rows_bX, self.read(x_RX))
        return jax.lax.dynamic_update_slice_in_dim(x_RX, rows_bX, self.start, axis=0)


@dataclasses.dataclass(frozen=True)
class Division:
    """Sorted rows, cut into a rectangle and blocks.

    Attributes:
        start_e: first row of each expert.
        size_e: its rows.
        expert_R: expert of each row; the last for rows of none.
        height: H, rows of each expert in the rectangle, if it has as many.
        block_rows: b, rows of a block.
    """

    start_e: jax.Array
    size_e: jax.Array
    expert_R: jax.Array
    height: int
    block_rows: int

    @classmethod
    def of(cls, R: int, size_e: jax.Array) -> "Division":
        """Divides R rows.

        The rectangle has e·H ≤ R rows. The blocks have Σ b·⌈(size - H)/b⌉ rows, summed
        over experts with rows beyond H; since b ≤ H, that is less than Σ size ≤ R. If
        H = 0, then b = 1 and they have Σ size. So they are at most 2·R in all.
        """
        start_e = jnp.cumsum(size_e) - size_e
        height = R // size_e.shape[0]
        block_rows = max(1, min(height, max(BLOCK_ROWS, height // 4)))
        return cls(start_e, size_e, _experts(R, size_e), height, block_rows)

    @property
    def own_eH(self) -> jax.Array:
        """Says which rows of the rectangle are their expert's."""
        return jnp.arange(self.height) < self.size_e[:, None]

    def rectangle(self, x_RX: jax.Array) -> jax.Array:
        """Gathers each expert's first H rows, and others' where it has fewer."""
        row_eH = self.start_e[:, None] + jnp.arange(self.height)
        row_eH = jnp.minimum(row_eH, x_RX.shape[0] - 1)
        return x_RX.at[row_eH].get(mode="promise_in_bounds")

    def unfold(self, x_eHX: jax.Array) -> jax.Array:
        """Gathers rows from the rectangle; those not in it may come out as anything."""
        e, H, X = x_eHX.shape
        R = self.expert_R.shape[0]
        if H == 0:
            return jnp.zeros((R, X), x_eHX.dtype)
        place_R = jnp.minimum(jnp.arange(R) - self.start_e[self.expert_R], H - 1)
        place_R += self.expert_R * H
        return x_eHX.reshape(e * H, X).at[place_R].get(mode="promise_in_bounds")

    def each_block(
        self, step: Callable[[Block, jax.Array], jax.Array], carried: jax.Array
    ) -> jax.Array:
        """Calls carried = step(block, carried) for all rows beyond the rectangle."""
        R, H, b = self.expert_R.shape[0], self.height, self.block_rows
        if H == R:  # one expert: it has no rows beyond
            return carried
        blocks_e = -(-jnp.maximum(self.size_e - H, 0) // b)
        end_e = jnp.cumsum(blocks_e)

        def one_block(i: jax.Array, carried: jax.Array) -> jax.Array:
            e = jnp.sum(end_e <= i)
            first = self.start_e[e] + H + (i - (end_e[e] - blocks_e[e])) * b
            start = jnp.minimum(first, R - b)
            row_b = start + jnp.arange(b)
            own_b = (row_b >= first) & (row_b < self.start_e[e] + self.size_e[e])
            return step(Block(e, start, own_b[:, None]), carried)

        return jax.lax.fori_loop(0, end_e[-1], one_block, carried)


def _experts(R: int, size_e: jax.Array) -> jax.Array:
    """Says to which expert each of R rows belongs; the last for rows of none."""
    end_e = jnp.cumsum(size_e)
    expert_R = jnp.searchsorted(end_e, jnp.arange(R), "right", method="compare_all")
    return jnp.minimum(expert_R, size_e.shape[0] - 1)
