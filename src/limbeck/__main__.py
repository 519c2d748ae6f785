"""`python -m limbeck`, for launchers such as `accelerate launch -m limbeck distill …`."""

from limbeck.cli import main

main()
