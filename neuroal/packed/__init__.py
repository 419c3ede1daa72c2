"""Packed safetensors files: of a sparse matrix a mask and the surviving values, to the bit.

- `header`: headers of safetensors files, checked
- `codec`: a matrix as mask and values, and back; zstd
- `form`: what a packed file says of itself, and the checks of it
- `reading`: a packed file, opened as if it were the dense one
- `writing`: a dense file to a packed one, and back
"""
