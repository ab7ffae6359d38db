"""`python -m hf_vit_lowrank` is the command line."""

from .cli import main

main()
