"""Running what was exported: a transformers model whose quantized layers compute on `quant_kernels`."""
