"""The decoder: a Llama-shaped language model whose parameter names are Hugging Face's.

shape.py     sizes, presets, and the parameters they imply (no torch)
initial.py   initial weights from a seed (no torch)
decoder.py   the torch module
flat.py      a decoder whose parameters and gradients are views of flat buffers
"""
