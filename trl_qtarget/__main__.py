"""`python -m trl_qtarget`, where the program `trl-qtarget` is not on the path."""

from .cli import main


raise SystemExit(main())
