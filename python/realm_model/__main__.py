"""`python -m realm_model`, and so `torchrun ... -m realm_model`: the command realm-model."""

from .cli import main

main()
