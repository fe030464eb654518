"""`python -m trl_qtarget.cli`, where the program `trl-qtarget` is not on the path."""

from . import main


raise SystemExit(main())
