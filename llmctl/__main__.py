"""`python -m llmctl`, as torchrun starts it."""

from llmctl.cli import main

main()
