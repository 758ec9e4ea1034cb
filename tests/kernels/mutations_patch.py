"""Ways to break the kernels of bias_gelu, patch_embed, unpatchify and their partial sums."""

_GELU = "kernels/bias_gelu.py"
_EMBED = "kernels/patch_embed.py"
_TILES = "kernels/patch_tiles.py"
_BACK = "kernels/patch_embed_backward.py"
_UNPATCHIFY = "kernels/unpatchify.py"
_SUMS = "kernels/partials.py"

_GELU_TESTS = ("tests/kernels/test_bias_gelu.py",)
_EMBED_TESTS = ("tests/kernels/test_patch_embed.py",)
TESTS = {
    _GELU: _GELU_TESTS,
    _EMBED: _EMBED_TESTS,
    _TILES: _EMBED_TESTS,
    _BACK: _EMBED_TESTS,
    _UNPATCHIFY: ("tests/kernels/test_unpatchify.py",),
    _SUMS: _GELU_TESTS + _EMBED_TESTS,
}

MUTATIONS = [
    (_GELU, "e * r - bell", "e * r + bell"),
    (_GELU, "return z / (1 + tl.exp2", "return z / (tl.exp2"),
    (_GELU, "r = 1 / (1 + e)", "r = 1 / (1 - e)"),
    (_GELU, "tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)", "tl.abs(z)"),
    (_GELU, ", propagate_nan=tl.PropagateNan.ALL", ""),
    (_GELU, "3 * 0.044715 * SLOPE", "0.044715 * SLOPE"),
    (
        _GELU,
        "inside = (row < rows) & (column < width)\n    bias",
        "inside = column < width\n    bias",
    ),
    (
        _GELU,
        "inside = (row < rows) & (column < width)\n        row",
        "inside = row < rows\n        row",
    ),
    (
        _GELU,
        "x_ptr + row.to(tl.int64) * x_stride + column",
        "x_ptr + row.to(tl.int64) * width + column",
    ),
    (_GELU, "x_ptr + row.to(tl.int64) * x_stride + column", "x_ptr + row * x_stride + column"),
    (_GELU, "dout_ptr + row * dout_stride", "dout_ptr + row * x_stride"),
    (
        _GELU,
        "triton.cdiv(rows, tall), triton.cdiv(width, columns)",
        "rows // tall, triton.cdiv(width, columns)",
    ),
    (_GELU, "rows, splits * ROWS)", "rows, ROWS)"),
    (_GELU, "rows, splits * ROWS)", "rows - ROWS, splits * ROWS)"),
    (_GELU, "partials_ptr + split.to(tl.int64) * width", "partials_ptr + (splits - split) * width"),
    (_GELU, "dbias += dx", "dbias += dout.to(tl.float32)"),
    (_SUMS, "(row < count)[:, None] & inside[None, :]", "inside[None, :]"),
    (_SUMS, "range(0, count, ROWS)", "range(0, count - 1, ROWS)"),
    (_SUMS, "row.to(tl.int64)[:, None] * width", "row.to(tl.int64)[:, None] * (width + 1)"),
    (_SUMS, "triton.cdiv(width, TILE.columns)", "width // TILE.columns"),
    (_TILES, "(a - high.to(tl.float32)).to(b.dtype)", "(a + high.to(tl.float32)).to(b.dtype)"),
    (_TILES, "total = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), total)", "pass"),
    (_TILES, "token // grid_width, token % grid_width", "token % grid_width, token // grid_width"),
    (
        _TILES,
        "(row // tokens).to(tl.int64) * strides[0]",
        "(row // (tokens + 1)).to(tl.int64) * strides[0]",
    ),
    (_TILES, "(row // tokens).to(tl.int64) * strides[0]", "(row // tokens) * strides[0]"),
    (_TILES, "h * P * strides[2] + w * Q * strides[3]", "h * P * strides[2] + w * P * strides[3]"),
    (_TILES, "k // (P * Q) * strides[1]", "k // (P * P) * strides[1]"),
    (_TILES, "k // Q % P * strides[2]", "k // Q % Q * strides[2]"),
    (
        _TILES,
        "mask = (row < rows)[:, None] & (column < width)[None, :]\n    return",
        "mask = (column < width)[None, :]\n    return",
    ),
    (_EMBED, "part_in = row_in & (part < DEPTH)[None, :]", "part_in = row_in"),
    (_EMBED, "out += bias[None, :]", "out -= bias[None, :]"),
    (_EMBED, "pos_at = (row % tokens)[:, None]", "pos_at = row[:, None]"),
    (_BACK, "splits * step):", "step):"),
    (_BACK, "token = part % spans * SPAN + lane % SPAN", "token = lane % SPAN"),
    (_BACK, "inside = (token < period) & (row", "inside = (token <= period) & (row"),
    (_BACK, "inside = (token < period) & (row < rows)", "inside = token < period"),
    (_BACK, "(first + lane // SPAN) * period + token", "(first + lane // SPAN) * SPAN + token"),
    (_BACK, "total += dtokens", "total -= dtokens"),
    (_BACK, "partial = part.to(tl.int64) * width", "partial = part.to(tl.int64) // spans * width"),
    (_BACK, "at = partial * DEPTH", "at = partial"),
    (
        _BACK,
        "mask = column < tl.where(depth_block == 0, width, 0)",
        "mask = column < tl.where(depth_block == 0, width - 1, 0)",
    ),
    (_BACK, "limit = tl.where(depth_block == 0, tokens, 0)", "limit = SPAN"),
    (_BACK, "((part // spans).to(tl.int64) * tokens + token)", "(part.to(tl.int64) + token)"),
    (
        _BACK,
        "column_block, depth_block = block // depth_blocks, block % depth_blocks",
        "column_block, depth_block = block // depth_blocks, 0",
    ),
    (_BACK, "(column_block.to(tl.int64) * rows + row)", "(row.to(tl.int64))"),
    (_BACK, "for block in range(blocks)", "for block in range(blocks - 1)"),
    (_BACK, "(tl.cast(block, tl.int64) * rows + row)", "(row.to(tl.int64))"),
    (_BACK, "tl.where(first < rows, width, 0)", "tl.where(first < rows, width - BLOCK_N, 0)"),
    (_BACK, "k = index % depth_blocks * BLOCK_K", "k = 0 * BLOCK_K"),
    (_BACK, "block * (tl.num_programs(0) - parts) + part - parts", "part - parts"),
    (_BACK, "grid_width, width, dx_strides,", "grid_width, width, strides,"),
    (_BACK, "triton.cdiv(tiles, blocks)", "tiles // blocks"),
    (_BACK, "dtokens.nbytes // max(1, 8", "dtokens.nbytes // max(1, 2"),
    (_BACK, "2 * sizes.width", "0"),
    (
        _UNPATCHIFY,
        "(strip // grid_height).to(tl.int64), strip % grid_height",
        "(strip // grid_width).to(tl.int64), strip % grid_width",
    ),
    (_UNPATCHIFY, "(strip // grid_height).to(tl.int64)", "strip // grid_height"),
    (_UNPATCHIFY, "permute(3, 1, 0, 2)", "permute(3, 0, 1, 2)"),
    (_UNPATCHIFY, "permute(2, 1, 3, 0)", "permute(2, 3, 1, 0)"),
    (_UNPATCHIFY, "* CHANNELS + c0 + c", "* CHANNELS + c"),
    (_UNPATCHIFY, "first * Q + lane % (COLUMNS * TOKENS)", "first + lane % (COLUMNS * TOKENS)"),
    (_UNPATCHIFY, "image_mask = along < width", "image_mask = along < width + 1"),
    (_UNPATCHIFY, "image_mask &= i < P", "pass"),
    (_UNPATCHIFY, "image_mask &= c < CHANNELS", "pass"),
    (_UNPATCHIFY, "token_at < grid_width * TOKEN_STRIDE", "token_at <= grid_width * TOKEN_STRIDE"),
    (
        _UNPATCHIFY,
        "c * image_stride_c + i * image_stride_h",
        "c * image_stride_h + i * image_stride_h",
    ),
    (_UNPATCHIFY, "h.to(tl.int64) * P * image_stride_h", "h.to(tl.int64) * Q * image_stride_h"),
    (_UNPATCHIFY, "if whole and TOKEN_STRIDE == P * Q * CHANNELS:", "if whole:"),
]
