"""Options that commands share which ask for signatures or make them."""

from pathlib import Path
from typing import Annotated

import typer

from raytune_ft.catalog import Trust
from raytune_ft.errors import BadInput

RequireSignature = Annotated[
    bool, typer.Option("--require-signature", help="Refuse versions that no trusted key has signed.")
]
TrustedKeys = Annotated[
    list[Path],
    typer.Option(
        "--trusted-keys",
        metavar="FILE",
        help="PEM of ed25519 public keys; their text in RAYTUNE_TRUSTED_KEYS where not given.",
    ),
]


def trust_of(require_signature: bool, trusted_keys: list[Path]) -> Trust:
    """What a command that hands out versions asks of their signatures."""
    if require_signature:
        return Trust.load(trusted_keys, required=True)
    if trusted_keys:
        raise BadInput("--trusted-keys: without --require-signature nothing is held against them; give both")
    return Trust()
