"""Serving heads in vLLM. Nothing of vLLM is imported before vLLM asks for it."""

# The architecture of exported heads. vLLM gives a model whose name begins otherwise another one
ARCHITECTURE = "EagleFspadLlamaForCausalLM"
